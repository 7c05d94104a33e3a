"""A joined model in transformers: it loads the directory whole, and computes what we compute."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from rave_jax.checkpoint.hf_import import import_hf
from rave_jax.checkpoint.join import join
from rave_jax.checkpoint.tiny import Tiny, byte_tokenizer, write_tiny
from rave_jax.data.collate import collate, smallest_shape
from rave_jax.data.processor import Processor
from tests.checkpoint.test_join import write_tower
from tests.data.pictures import noise
from tests.parity.test_families import LIMIT, SCRIPT, with_files

pytestmark = pytest.mark.parity


def test_transformers_computes_the_same(torch_python: str, tmp_path: Path) -> None:
    text = tmp_path / "text"
    write_tiny(text, Tiny(family="qwen3", hidden_size=32, num_layers=2, mlp_size=48))
    byte_tokenizer("qwen2_5_vl").save(str(text / "tokenizer.json"))
    both = tmp_path / "both.out"
    join(write_tower(tmp_path / "siglip"), text, both)
    (tmp_path / "both").symlink_to(both)
    # In the size of the tower: transformers' loader of a picture is not what is compared.
    Image.fromarray(noise(30, 30)).save(both / "picture.png")
    parts = [{"type": "image", "image": "picture.png"}, {"type": "text", "text": "What is it?"}]
    messages = [{"role": "user", "content": parts}]
    processor, model = Processor.from_hf(both), import_hf(both)
    example = processor.encode(with_files(messages, both), add_generation_prompt=True)
    sizes = processor.rules.patch_sizes
    batch = collate([[example]], smallest_shape([[example]], 1, sizes.window), sizes)
    with jax.default_matmul_precision("highest"):
        ours = np.asarray(model.logits(model.forward(batch).hidden))[0]
    np.savez(tmp_path / "both.npz", logits0=ours)
    (tmp_path / "cases.json").write_text(json.dumps([{"name": "both", "conversations": [messages]}]))
    subprocess.run([torch_python, str(SCRIPT), "again", str(tmp_path)], check=True, timeout=300)
    (found,) = json.loads((tmp_path / "again.json").read_text()).values()
    assert found["missing_keys"] == found["unexpected_keys"] == found["mismatched_keys"] == []
    assert np.abs(ours).max() > 0.5
    assert found["difference"] <= LIMIT * np.abs(ours).max()

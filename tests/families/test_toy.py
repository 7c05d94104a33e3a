"""A family is added by its folder and a registry line alone: a toy goes from an HF directory to numbers and back."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import pytest

from rave_jax.batch import Kind
from rave_jax.checkpoint.hf_export import export_hf
from rave_jax.checkpoint.hf_import import import_hf, load_config
from rave_jax.config import ConfigError
from rave_jax.data.collate import BatchShape, collate
from rave_jax.data.processor import Processor
from rave_jax.data.sample import ImageError
from rave_jax.data.survey import measure
from rave_jax.families import FAMILIES
from rave_jax.families.config import TextConfig, VlmConfig
from rave_jax.families.directory import picture_rules
from rave_jax.layout import ContextTokens, FixedRegions, VisualLayout
from rave_jax.models.config import ModelOptions
from rave_jax.models.parameters import named_parameters
from rave_jax.models.vlm import Vlm
from tests.data.conftest import TEMPLATE, byte_tokenizer
from tests.data.pictures import noise
from tests.families.toy import FAMILY
from tests.families.toy.config import ToyTower

IDS = byte_tokenizer().get_vocab()
CONFIG = VlmConfig(
    TextConfig(vocab_size=300, hidden_size=64),
    ToyTower(depth=2, patch_size=4, out_size=64),
    image_token_id=IDS["<|image_pad|>"],
    video_token_id=IDS["<|video_pad|>"],
    eos_token_ids=(IDS["<|im_end|>"],),
    family="toy",
)


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FAMILIES, "toy", FAMILY)


@pytest.fixture
def processor(tmp_path: Path) -> Processor:
    (tmp_path / "config.json").write_text(json.dumps(FAMILY.render(CONFIG)))
    (tmp_path / "preprocessor_config.json").write_text('{"crop": true}')
    return Processor(byte_tokenizer(), picture_rules(tmp_path), TEMPLATE)


def conversation(*frames: np.ndarray) -> list[dict]:
    image = {"type": "image", "image": noise(9, 30)}
    video = {"type": "video", "video": list(frames), "fps": 4.0}
    return [{"role": "user", "content": [image, {"type": "text", "text": "and"}, video]}]


def test_its_pictures_become_tokens(processor: Processor) -> None:
    """Crops have one size; text that the family writes stands between the frames, each of which is a picture."""
    messages = conversation(*(noise(10, 12, seed=n) for n in range(3)))
    example = processor.encode(messages)
    info, visual = example.info, example.info.kind == Kind.VISUAL
    assert visual.sum() == 4 * 3
    assert "and<0s><0.5s>" in processor.decode(example.tokens[~visual])
    np.testing.assert_array_equal(np.unique(info.image), [0, 1, 2, 3])
    np.testing.assert_array_equal(info.row[visual], [0, 0, 1, 1] * 3)
    np.testing.assert_array_equal(example.visual_index[visual], np.arange(12))
    np.testing.assert_array_equal(example.positions, np.tile(np.arange(len(example.tokens)), (3, 1)))
    np.testing.assert_array_equal(example.patches.frame, np.repeat([1, 2, 3], 4))
    assert measure(processor, messages) == (len(example.tokens), 12)
    assert processor.count_tokens(500, 7) == 4


def test_context_tokens_count_on_like_text_where_a_position_is_one_number(processor: Processor) -> None:
    """With 1-D RoPE a model reads the first axis alone, on which no two tokens may share a position."""
    layout = VisualLayout(FixedRegions(1, 2), 99, ContextTokens(3))
    example = Processor(byte_tokenizer(), processor.rules, TEMPLATE, layout).encode(
        conversation(*(noise(10, 12, seed=n) for n in range(3)))
    )
    assert (example.info.kind == Kind.CONTEXT).sum() == 3 * 3
    np.testing.assert_array_equal(example.positions, np.tile(np.arange(len(example.tokens)), (3, 1)))


def test_what_its_rules_refuse_names_the_part(processor: Processor) -> None:
    video = {"type": "video", "video": [noise(8, 8)], "name": "clip"}
    with pytest.raises(ImageError, match="clip: the times of frames need the part's own 'fps'"):
        processor.encode([{"role": "user", "content": [video]}])


def test_its_model_goes_through_files(processor: Processor, tmp_path: Path) -> None:
    model = Vlm(CONFIG, ModelOptions(), key=jax.random.key(0))
    folder = export_hf(model, tmp_path / "out")
    assert load_config(folder) == (CONFIG, FAMILY)
    again = import_hf(folder)
    for path, param in named_parameters(model).items():
        np.testing.assert_array_equal(param[...], named_parameters(again)[path][...], err_msg=path)

    rows = [[processor.encode(conversation(np.full((8, 8, 3), shade, np.uint8)))] for shade in (0, 255)]
    example = rows[0][0]
    shape = BatchShape(2, len(example.tokens), example.patches.length)
    batch = collate(rows, shape, processor.rules.patch_sizes)
    black, white = np.asarray(jax.jit(lambda model, batch: model.forward(batch).hidden)(again, batch))[:, -1]
    assert np.isfinite(black).all() and np.abs(black - white).max() > 1e-3


def test_a_text_family_has_no_tower() -> None:
    config = dataclasses.replace(CONFIG, family="qwen3")
    with pytest.raises(ConfigError, match="vision is given, expected None: qwen3 is a text model and has no tower"):
        Vlm(config, ModelOptions(), key=jax.random.key(0))

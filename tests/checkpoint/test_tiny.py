"""The tiny checkpoint is complete: model, tokenizer, chat template and processor settings that fit together."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer

from rave_jax.checkpoint.hf_import import import_hf, load_config
from rave_jax.checkpoint.tiny import Tiny, byte_tokenizer, small_models, tiny_config, token_ids, write_tiny
from rave_jax.config import ConfigError
from rave_jax.data.processor import Processor

IDS = token_ids(small_models("qwen2_5_vl"))
SMALL = Tiny(hidden_size=32, num_layers=2, mlp_size=48, vision_hidden_size=16, vision_heads=2, vision_mlp_size=24)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("tiny") / "model", SMALL)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_heads", 0),
        ("num_layers", 0),
        ("mlp_size", -1),
        ("window_size", 3),
        ("seed", -1),
        ("patch_size", 0),
    ],
)
def test_sizes_that_make_no_model_are_refused_at_once(field: str, value: int) -> None:
    with pytest.raises(ConfigError, match=rf"{field} is {value}"):
        Tiny(**{field: value})


def test_a_family_without_small_models_is_refused() -> None:
    with pytest.raises(ConfigError, match="family is 'bert', expected qwen2_5_vl or "):
        Tiny(family="bert")


def test_the_config_comes_back(folder: Path) -> None:
    assert load_config(folder)[0] == tiny_config(SMALL)
    weights = np.asarray(import_hf(folder).decoder.layer_runs[0].layers.mlp.up.weight[...])
    assert 0.8 < weights.std() * 32**0.5 < 1.2


def test_any_text_survives_the_tokenizer() -> None:
    tokenizer = byte_tokenizer()
    text = "Grüße, 世界! \t\n<|im_end|> 7"
    ids = tokenizer.encode(text).ids
    assert IDS["<|im_end|>"] in ids and len(ids) == len(text.encode()) - len("<|im_end|>") + 1
    assert tokenizer.decode(ids, skip_special_tokens=False) == text


def test_a_conversation_renders_in_the_qwen_format(folder: Path) -> None:
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": " How many? "}, {"type": "video"}]},
        {"role": "assistant", "content": "7"},
    ]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>"
        " How many? <|vision_start|><|video_pad|><|vision_end|><|im_end|>\n<|im_start|>assistant\n7<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    assert tokenizer.eos_token_id == IDS["<|im_end|>"] and tokenizer.pad_token_id == IDS["<|endoftext|>"]


def test_the_processor_reads_it(folder: Path) -> None:
    processor = Processor.from_hf(folder)
    image = {"type": "image", "image": np.zeros((84, 84, 3), np.uint8)}
    question = {"role": "user", "content": [image, {"type": "text", "text": "?"}]}
    example = processor.encode([question, {"role": "assistant", "content": "42"}])
    assert (example.tokens == IDS["<|image_pad|>"]).sum() == 9
    assert processor.decode(example.tokens[example.loss_mask > 0]) == "42"
    assert processor.end_id == IDS["<|im_end|>"]


def test_a_seed_is_a_model(folder: Path, tmp_path: Path) -> None:
    again = write_tiny(tmp_path / "again", SMALL)
    assert (again / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()


def test_sizes_that_make_no_model() -> None:
    with pytest.raises(ConfigError, match="hidden_size is 30"):
        Tiny(hidden_size=30)


def test_patches_and_merge_units_of_other_sizes(tmp_path: Path) -> None:
    sizes = dataclasses.replace(SMALL, patch_size=7, merge_size=2, window_size=28)
    processor = Processor.from_hf(write_tiny(tmp_path / "model", sizes))
    image = {"type": "image", "image": np.zeros((112, 112, 3), np.uint8)}
    example = processor.encode([{"role": "user", "content": [image, {"type": "text", "text": "?"}]}])
    assert (example.info.grid_h.max(), example.info.grid_w.max(), example.patches.length) == (8, 8, 256)
    assert example.patches.window.max() == 16, "a window is 28 pixels, two tokens, along each side"

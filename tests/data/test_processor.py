"""Whole conversations in numbers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from rave_jax.batch import Kind, Role, TokenInfo
from rave_jax.config import ConfigError
from rave_jax.data.collate import BatchShape, collate
from rave_jax.data.processor import Processor, ProcessorSettings
from rave_jax.data.sample import ImageError, OverBudget, SampleError
from tests.data.conftest import TEMPLATE, byte_tokenizer, tiny_settings
from tests.data.pictures import noise


def image(height: int, width: int) -> dict:
    return {"type": "image", "image": noise(height, width)}


def text(words: str) -> dict:
    return {"type": "text", "text": words}


def test_placeholders_grow_to_the_picture(qwen: Processor) -> None:
    """The text that transformers tokenizes: one placeholder per merged patch."""
    messages = [
        {"role": "user", "content": [text("A "), image(84, 140), text(" and "), image(60, 60), text("?")]},
        {"role": "assistant", "content": "The left."},
        {"role": "user", "content": [image(56, 56), text("And this?")]},
    ]
    example = qwen.encode(messages, add_generation_prompt=True)
    rendered = qwen.chat.render(messages, add_generation_prompt=True)
    for count in (3 * 5, 2 * 2, 2 * 2):
        rendered = rendered.replace("<|image_pad|>", "<#>" * count, 1)
    expected = qwen.tokenizer(rendered.replace("<#>", "<|image_pad|>"), add_special_tokens=False)["input_ids"]
    np.testing.assert_array_equal(example.tokens, expected)
    assert example.patches.shape == ((15 + 4 + 4) * 4, 1176)
    visual = example.info.kind == Kind.VISUAL
    np.testing.assert_array_equal(visual, example.tokens == qwen.settings.image_token_id)
    assert sorted(example.visual_index[visual]) == list(range(23))
    np.testing.assert_array_equal(np.unique(example.info.image), [0, 1, 2, 3])
    np.testing.assert_array_equal(example.info.turn[example.info.image > 0], [1] * 19 + [2] * 4)
    assert set(example.info.role[visual]) == {Role.QUESTION}
    assert qwen.decode(example.tokens[example.loss_mask > 0]) == "The left."


@given(st.lists(st.tuples(st.integers(1, 40), st.integers(1, 40)), max_size=4), st.booleans())
def test_a_visual_token_is_its_patches(processor: Processor, sizes: list[tuple[int, int]], prompt: bool) -> None:
    """row, col, image and visual_index of a token lead to the patches that stand there."""
    messages = [{"role": "user", "content": [*(image(h, w) for h, w in sizes), text("?")]}]
    example = processor.encode(messages, prompt)
    info = example.info
    for name, array in example._asdict().items():
        arrays = array if isinstance(array, TokenInfo) else [array]
        for item in arrays:
            expected = {"loss_mask": np.float32, "patches": np.uint8}.get(name, np.int32)
            assert item.dtype == expected, name
    merge = processor.settings.merge_size
    place = example.patch_place.reshape(-1, merge**2, 2)
    segment = example.patch_segment.reshape(-1, merge**2)
    for token in np.flatnonzero(info.kind == Kind.VISUAL):
        unit = example.visual_index[token]
        assert (place[unit] // merge == [info.row[token], info.col[token]]).all()
        assert (segment[unit] == info.image[token]).all()
        assert info.grid_t[token] == 1
        assert info.row[token] < info.grid_h[token]
        assert info.col[token] < info.grid_w[token]
    assert (np.diff(example.patch_window) >= 0).all()
    assert set(np.unique(example.patch_window)) == set(range(1, example.patch_window.max(initial=0) + 1))
    for window in np.unique(example.patch_window):
        mine = example.patch_window == window
        assert len(set(example.patch_segment[mine])) == 1
        assert len(set(map(tuple, example.patch_place[mine] * 1 // 4))) == 1  # 2 merge units of 2 patches each way
    assert example.loss_mask.sum() == 0


def test_a_video(processor: Processor) -> None:
    frames = [noise(24, 16, seed=n) for n in range(5)]
    messages = [
        {"role": "user", "content": [{"type": "video", "video": frames, "fps": 1.0}, image(8, 8), text("?")]},
        {"role": "assistant", "content": "ok"},
    ]
    low = processor.settings
    processor = Processor(processor.tokenizer, _with_video(low), processor.chat._template)
    example = processor.encode(messages)
    info = example.info
    video = info.image == 1
    assert (example.tokens[video] == low.video_token_id).all()
    assert video.sum() == 3 * 3 * 2
    np.testing.assert_array_equal(info.frame[video], np.repeat([0, 1, 2], 6))
    np.testing.assert_array_equal(np.unique(example.patch_segment), [1, 2, 3, 4])
    start = example.positions[0][video][0]
    np.testing.assert_array_equal(example.positions[0][video] - start, np.repeat([0, 4, 8], 6))
    group = example.patches[example.patch_segment == 3].reshape(-1, 3, 2, 16)
    np.testing.assert_array_equal(group[:, :, 0], group[:, :, 1])  # the fifth frame stands twice


def _with_video(settings: ProcessorSettings) -> ProcessorSettings:
    from dataclasses import replace

    return replace(settings, video=replace(settings.video, min_pixels=64, max_pixels=4096))


def test_text_alone(processor: Processor) -> None:
    example = processor.encode([{"role": "user", "content": "hello"}])
    assert example.patches.shape == (0, processor.settings.patch_numbers)
    np.testing.assert_array_equal(example.positions, np.tile(np.arange(len(example.tokens)), (3, 1)))


def test_a_written_placeholder_is_an_error(processor: Processor) -> None:
    messages = [{"role": "user", "content": [image(8, 8), text("what is <|image_pad|>?")]}]
    with pytest.raises(SampleError, match=r"s1: the rendered text holds .* placeholder written out"):
        processor.encode(messages, name="s1")


def test_errors_name_sample_and_file(processor: Processor, tmp_path: Path) -> None:
    path = tmp_path / "cut.jpg"
    Image.fromarray(noise(64, 64)).save(path)
    path.write_bytes(path.read_bytes()[:900])
    messages = [{"role": "user", "content": [{"type": "image", "image": str(path)}]}]
    with pytest.raises(ImageError, match=r"q17: .*cut\.jpg: .*truncated"):
        processor.encode(messages, name="q17")


def test_a_model_without_eyes(qwen: Processor) -> None:
    blind = Processor(qwen.tokenizer, ProcessorSettings(has_vision=False), qwen.chat._template)
    assert len(blind.encode([{"role": "user", "content": "hi"}]).tokens) > 0
    with pytest.raises(SampleError, match="the model takes none"):
        blind.encode([{"role": "user", "content": [image(28, 28)]}])


def test_settings_of_an_hf_directory(qwen_dir: Path) -> None:
    settings = ProcessorSettings.from_hf(qwen_dir)
    assert (settings.min_pixels, settings.max_pixels) == (3136, 12845056)
    assert (settings.patch_numbers, settings.window_patches, settings.tokens_per_second) == (1176, 64, 2)
    assert (settings.video.min_pixels, settings.video.max_pixels) == (3136, 12845056)
    assert settings.grid.window == 4


def test_settings_in_other_places(qwen_dir: Path, tmp_path: Path) -> None:
    for path in qwen_dir.iterdir():
        shutil.copy(path, tmp_path)
    old = json.loads((tmp_path / "preprocessor_config.json").read_text())
    (tmp_path / "preprocessor_config.json").unlink()
    with pytest.raises(ConfigError, match=r"preprocessor_config\.json: no such file"):
        ProcessorSettings.from_hf(tmp_path)
    size = {"size": {"shortest_edge": 784, "longest_edge": 7840}}
    nested = {"image_processor": {**old, "min_pixels": None, "max_pixels": None, **size}, "video_processor": {"fps": 3}}
    (tmp_path / "processor_config.json").write_text(json.dumps(nested))
    settings = ProcessorSettings.from_hf(tmp_path)
    assert (settings.min_pixels, settings.max_pixels) == (784, 7840)
    assert settings.video.fps is None  # a rate without do_sample_frames samples nothing, as in transformers
    assert settings.video.max_pixels == 768 * 28 * 28
    assert Processor.from_hf(tmp_path, max_pixels=1568).count_tokens(500, 500) <= 2


@pytest.mark.parametrize(("key", "value"), [("do_resize", False), ("resample", 2), ("rescale_factor", 1.0)])
def test_settings_that_are_not_done_here(key: str, value: object, qwen_dir: Path, tmp_path: Path) -> None:
    for path in qwen_dir.iterdir():
        shutil.copy(path, tmp_path)
    config = json.loads((tmp_path / "preprocessor_config.json").read_text())
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({**config, key: value}))
    with pytest.raises(ConfigError, match=f"{key} is"):
        ProcessorSettings.from_hf(tmp_path)


def test_every_token_knows_its_place_in_the_document(processor: Processor) -> None:
    question = {"role": "user", "content": [image(16, 24), text("?")]}
    example = processor.encode([question, {"role": "assistant", "content": "7"}])
    length = len(example.tokens)
    np.testing.assert_array_equal(example.info.place, np.arange(length))
    packed = collate([[example, example]], BatchShape(1, 2 * length, 256), processor.settings.patch_numbers)
    np.testing.assert_array_equal(packed.info.place[0, length:], np.arange(length))


@pytest.mark.parametrize("character", ["a", "é", "語", "\U0001f600"])
def test_megabytes_of_text_are_refused_before_they_become_tokens(character: str, monkeypatch) -> None:
    """In any script, whatever room the caller has; and a text that is too long for its budget however it is cut."""
    tokenizer = byte_tokenizer()
    processor = Processor(tokenizer, tiny_settings(tokenizer), TEMPLATE)
    asked = [{"role": "user", "content": [{"type": "text", "text": "short"}, {"type": "text", "text": character * 4}]}]
    fits = processor.encode(asked, most_tokens=1)
    assert len(fits.tokens) > 1, "what may fit is for the caller to count"

    def untouched(*arguments):
        raise AssertionError("the text became tokens")

    monkeypatch.setattr(processor.chat, "runs", untouched)
    huge = [{"role": "user", "content": character * (6_000_000 // len(character.encode()))}]
    with pytest.raises(OverBudget, match=r"q: the text has (6000000|5999999|5999998) bytes, expected at most 4194304"):
        processor.encode(huge, name="q")
    longest = max(map(len, tokenizer.get_vocab()))
    with pytest.raises(OverBudget, match=f"the budget of tokens 10 holds at most {40 * longest}"):
        processor.encode([{"role": "user", "content": character * (40 * longest + 1)}], most_tokens=10)

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

from rave_jax.batch import Kind, Role
from rave_jax.config import ConfigError
from rave_jax.data.collate import BatchShape, collate
from rave_jax.data.config import DataConfig
from rave_jax.data.processor import Processor
from rave_jax.data.sample import ImageError, OverBudget, SampleError
from rave_jax.data.vocabulary import check_directory
from rave_jax.families import family_for
from rave_jax.families.directory import picture_rules
from rave_jax.families.shared.grids.pictures import Pictures
from rave_jax.layout import WHOLE, Shown, VisualLayout
from tests.data.conftest import TEMPLATE, TEXT_ALONE, byte_tokenizer, tiny_settings
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
    assert example.patches.pixels.shape == ((15 + 4 + 4) * 4, 1176)
    visual = example.info.kind == Kind.VISUAL
    np.testing.assert_array_equal(visual, example.tokens == qwen.rules.image_token_id)
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
    assert example.shown == tuple(Shown(number, WHOLE) for number in range(1, len(sizes) + 1))
    for name, array in zip(example._fields[:-1], example, strict=False):
        for part, item in array._asdict().items() if isinstance(array, tuple) else [(name, array)]:
            expected = {"loss_mask": np.float32, "weight": np.float32, "pixels": np.uint8}.get(part, np.int32)
            assert item.dtype == expected, part
    merge = processor.rules.config.vision.merge_size
    place = example.patches.place.reshape(-1, merge**2, 2)
    frame = example.patches.frame.reshape(-1, merge**2)
    for token in np.flatnonzero(info.kind == Kind.VISUAL):
        unit = example.visual_index[token]
        assert (place[unit] // merge == [info.row[token], info.col[token]]).all()
        assert (frame[unit] == info.image[token]).all()
        assert info.grid_t[token] == 1
        assert info.row[token] < info.grid_h[token]
        assert info.col[token] < info.grid_w[token]
    assert (np.diff(example.patches.window) >= 0).all()
    assert set(np.unique(example.patches.window)) == set(range(1, example.patches.window.max(initial=0) + 1))
    for window in np.unique(example.patches.window):
        mine = example.patches.window == window
        assert len(set(example.patches.frame[mine])) == 1
        assert len(set(map(tuple, example.patches.place[mine] * 1 // 4))) == 1  # 2 merge units of 2 patches each way
    assert example.loss_mask.sum() == 0


def test_a_video(processor: Processor) -> None:
    frames = [noise(24, 16, seed=n) for n in range(5)]
    messages = [
        {"role": "user", "content": [{"type": "video", "video": frames, "fps": 1.0}, image(8, 8), text("?")]},
        {"role": "assistant", "content": "ok"},
    ]
    low = processor.rules
    processor = Processor(processor.tokenizer, _with_video(low), processor.chat._template)
    example = processor.encode(messages)
    info = example.info
    video = info.image == 1
    assert (example.tokens[video] == low.video_token_id).all()
    assert video.sum() == 3 * 3 * 2
    np.testing.assert_array_equal(info.frame[video], np.repeat([0, 1, 2], 6))
    np.testing.assert_array_equal(np.unique(example.patches.frame), [1, 2, 3, 4])
    start = example.positions[0][video][0]
    np.testing.assert_array_equal(example.positions[0][video] - start, np.repeat([0, 4, 8], 6))
    group = example.patches.pixels[example.patches.frame == 3].reshape(-1, 3, 2, 16)
    np.testing.assert_array_equal(group[:, :, 0], group[:, :, 1])  # the fifth frame stands twice


def _with_video(settings: Pictures) -> Pictures:
    from dataclasses import replace

    return replace(settings, video=replace(settings.video, min_pixels=64, max_pixels=4096))


def test_text_alone(processor: Processor) -> None:
    example = processor.encode([{"role": "user", "content": "hello"}])
    assert example.patches.pixels.shape == (0, processor.rules.patch_sizes.numbers)
    np.testing.assert_array_equal(example.positions, np.tile(np.arange(len(example.tokens)), (3, 1)))


def test_a_written_placeholder_is_text(processor: Processor) -> None:
    messages = [{"role": "user", "content": [image(8, 8), text("what is <|image_pad|>?")]}]
    example = processor.encode(messages, name="s1")
    assert np.sum(example.tokens == processor.rules.image_token_id) == np.sum(example.info.kind == Kind.VISUAL) == 1
    assert "what is <|image_pad|>?" in processor.decode(example.tokens)
    tokens = Processor(processor.tokenizer, processor.rules, TEMPLATE, special_tokens_in_text="tokens")
    with pytest.raises(SampleError, match=r"s1: the rendered text has .* spell out a placeholder"):
        tokens.encode(messages, name="s1")


def test_a_config_says_what_written_tokens_are(qwen: Processor, qwen_dir: Path) -> None:
    meant = DataConfig(special_tokens_in_text="tokens").processor(qwen_dir, VisualLayout())
    messages = [{"role": "user", "content": "<|box_start|>"}]
    box = meant.tokenizer.convert_tokens_to_ids("<|box_start|>")
    assert [int(np.sum(p.encode(messages).tokens == box)) for p in (meant, qwen)] == [1, 0]


def test_errors_name_sample_and_file(processor: Processor, tmp_path: Path) -> None:
    path = tmp_path / "cut.jpg"
    Image.fromarray(noise(64, 64)).save(path)
    path.write_bytes(path.read_bytes()[:900])
    messages = [{"role": "user", "content": [{"type": "image", "image": str(path)}]}]
    with pytest.raises(ImageError, match=r"q17: .*cut\.jpg: .*truncated"):
        processor.encode(messages, name="q17")


def test_a_model_without_eyes(qwen: Processor) -> None:
    blind = Processor(qwen.tokenizer, TEXT_ALONE, qwen.chat._template)
    assert len(blind.encode([{"role": "user", "content": "hi"}]).tokens) > 0
    with pytest.raises(SampleError, match="the model is for text only"):
        blind.encode([{"role": "user", "content": [image(28, 28)]}])


def test_settings_of_an_hf_directory(qwen_dir: Path) -> None:
    settings = picture_rules(qwen_dir)
    assert (settings.min_pixels, settings.max_pixels) == (3136, 12845056)
    assert (settings.patch_sizes.numbers, settings.patch_sizes.window, settings.config.tokens_per_second) == (
        1176,
        64,
        2,
    )
    assert (settings.video.min_pixels, settings.video.max_pixels) == (3136, 12845056)
    assert settings.config.vision.window_units == 4


def test_settings_in_other_places(qwen_dir: Path, tmp_path: Path) -> None:
    for path in qwen_dir.iterdir():
        shutil.copy(path, tmp_path)
    old = json.loads((tmp_path / "preprocessor_config.json").read_text())
    (tmp_path / "preprocessor_config.json").unlink()
    with pytest.raises(ConfigError, match=r"preprocessor_config\.json: no such file"):
        picture_rules(tmp_path)
    size = {"size": {"shortest_edge": 784, "longest_edge": 7840}}
    nested = {"image_processor": {**old, "min_pixels": None, "max_pixels": None, **size}, "video_processor": {"fps": 3}}
    (tmp_path / "processor_config.json").write_text(json.dumps(nested))
    settings = picture_rules(tmp_path)
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
        picture_rules(tmp_path)


def test_pictures_are_cut_as_the_tower_reads_them(qwen_dir: Path, tmp_path: Path) -> None:
    for path in qwen_dir.iterdir():
        shutil.copy(path, tmp_path)
    file = tmp_path / "preprocessor_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "merge_size": 3}))
    with pytest.raises(ConfigError, match=r"config\.json: merge_size is 3, expected 2 as config\.json has it"):
        picture_rules(tmp_path)


LIMITS = {"min_pixels": 784, "max_pixels": 7840}
EDGES = {"shortest_edge": 784, "longest_edge": 7840}


@pytest.mark.parametrize("nested", [False, True], ids=["preprocessor_config.json", "processor_config.json"])
@pytest.mark.parametrize(
    ("stated", "found"),
    [
        (LIMITS, (784, 7840)),
        ({"size": EDGES}, (784, 7840)),
        ({"size": LIMITS}, (784, 7840)),
        ({"size": {"shortest_edge": 1, "longest_edge": 2}, **LIMITS}, (784, 7840)),
        ({"size": {"shortest_edge": 784}, "max_pixels": 7840}, (784, 7840)),
        ({"min_pixels": 784}, (784, 28 * 28 * 1280)),
        ({"max_pixels": 7840}, (56 * 56, 7840)),
        ({"size": {"height": 448, "width": 448}}, r"size is {'height': 448, 'width': 448}, expected {'shortest_edge'"),
        ({"size": 448}, r"size is 448, expected"),
        ({"size": [448, 448]}, r"size is \[448, 448\], expected"),
        ({"size": {"longest_edge": 2048}}, "min_pixels is missing"),
        ({"size": {"shortest_edge": 784}}, "max_pixels is missing"),
        ({"size": {}}, "min_pixels is missing"),
        ({"min_pixels": 0}, "min_pixels is 0, expected a number of pixels"),
        ({"max_pixels": "7840"}, "max_pixels is '7840', expected a number"),
        ({"min_pixels": 9, "max_pixels": 8}, "min_pixels is 9, above max_pixels 8"),
    ],
)
def test_pixel_limits_in_every_form(
    stated: dict, found: tuple[int, int] | str, nested: bool, qwen_dir: Path, tmp_path: Path
) -> None:
    """What transformers' Qwen2VLImageProcessor makes of them; what it refuses at the first picture is refused here."""
    shutil.copy(qwen_dir / "config.json", tmp_path)
    settings = {"patch_size": 14, **stated}
    name = "processor_config.json" if nested else "preprocessor_config.json"
    (tmp_path / name).write_text(json.dumps({"image_processor": settings} if nested else settings))
    (tmp_path / "video_preprocessor_config.json").write_text(json.dumps({"size": EDGES}))
    if isinstance(found, str):
        with pytest.raises(ConfigError, match=f"{name}: .*{found}"):
            picture_rules(tmp_path)
        return
    settings = picture_rules(tmp_path)
    assert (settings.min_pixels, settings.max_pixels) == found
    assert (settings.video.min_pixels, settings.video.max_pixels) == (784, 7840)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"vocab_size": 151665}, None),
        ({"vocab_size": 7}, r"the token '\(' the id 7, and 151,658 tokens have ids from 7 on"),
        ({"image_token_id": 152064}, r"config\.json: image_token_id is 152,064, but the embedding has 152,064 rows"),
        ({"vocab_size": 151650}, r"the token '<\|quad_start\|>' the id 151,650, and 15 tokens .*at least 151,665 rows"),
    ],
)
def test_every_id_needs_a_row_of_the_embedding(
    change: dict, says: str | None, qwen: Processor, qwen_dir: Path, tmp_path: Path
) -> None:
    hf = {**json.loads((qwen_dir / "config.json").read_text()), **change}
    config = family_for(hf).parse(hf)
    if says is None:
        return check_directory(qwen_dir, config, qwen.tokenizer)
    with pytest.raises(ConfigError, match=says):
        check_directory(qwen_dir, config, qwen.tokenizer)
    if "vocab_size" in change:
        for path in qwen_dir.iterdir():
            shutil.copy(path, tmp_path)
        (tmp_path / "config.json").write_text(json.dumps(hf))
        files = r"config\.json has .* but the tokenizer of vocab\.json, tokenizer_config\.json gives "
        with pytest.raises(ConfigError, match=files + says):
            Processor.from_hf(tmp_path)


def test_every_token_knows_its_place_in_the_document(processor: Processor) -> None:
    question = {"role": "user", "content": [image(16, 24), text("?")]}
    example = processor.encode([question, {"role": "assistant", "content": "7"}])
    length = len(example.tokens)
    np.testing.assert_array_equal(example.info.offset, np.arange(length))
    packed = collate([[example, example]], BatchShape(1, 2 * length, 256), processor.rules.patch_sizes)
    np.testing.assert_array_equal(packed.info.offset[0, length:], np.arange(length))


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

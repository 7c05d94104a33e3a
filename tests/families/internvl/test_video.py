"""Videos: which frames are used, what stands between them, and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer

from rave_jax.checkpoint.tiny import Tiny, tiny_config, token_ids, write_tiny_files
from rave_jax.config import ConfigError
from rave_jax.data.processor import Processor
from rave_jax.data.sample import SampleError
from rave_jax.data.survey import measure
from rave_jax.families.internvl import FAMILY
from rave_jax.families.internvl.pictures import Pictures, pictures
from rave_jax.families.internvl.video import Sampling
from rave_jax.families.pictures import PictureError, ProcessorFiles
from tests.data.pictures import noise

SIZES = Tiny(family="internvl", patch_size=6, merge_size=2)
CONFIG = tiny_config(SIZES)


def said(*parts: Any) -> list[dict[str, Any]]:
    """A question: texts, frames of a video, and pictures."""
    kinds = {str: "text", list: "video"}
    named = [(kinds.get(type(part), "image"), part) for part in parts]
    return [{"role": "user", "content": [{"type": kind, kind: part} for kind, part in named]}]


@pytest.fixture
def processor(tmp_path: Path) -> Processor:
    write_tiny_files(tmp_path, SIZES)
    return Processor.from_hf(tmp_path)


@pytest.mark.parametrize(
    ("sampling", "expected"),
    [
        (Sampling(4), [1, 3, 6, 8]),
        (Sampling(4, shift=0.0), [0, 2, 5, 7]),
        (Sampling(10), list(range(10))),
        (Sampling(fps=1.0), [1, 3, 5, 7, 9]),
        (Sampling(3, shift=9.5), [9]),
    ],
)
def test_frames_are_sampled_from_the_middle_of_equal_parts(sampling: Sampling, expected: list[int]) -> None:
    np.testing.assert_array_equal(Pictures(CONFIG, sampling=sampling).frames(10, 2.0).indices, expected)


def test_every_frame_is_used_where_none_are_sampled() -> None:
    found = Pictures(CONFIG).frames(5, None)
    np.testing.assert_array_equal(found.indices, range(5))
    assert found.guessed


@pytest.mark.parametrize(
    ("sampling", "fps", "message"),
    [
        (Sampling(11), 1.0, r"the video has 10 frames, of which 11 \(num_frames\) are sampled: expected 1 to 10"),
        (Sampling(fps=1.0), 30.0, "the video has 10 frames, of which 0 are sampled"),
        (Sampling(fps=1.0), None, "sampling 1.0 frames per second needs the part's own 'fps'"),
        (Sampling(2, shift=10.0), 1.0, "the video has 10 frames, and the first one that is used would be 10"),
    ],
)
def test_videos_that_cannot_be_sampled_are_refused(sampling: Sampling, fps: float | None, message: str) -> None:
    with pytest.raises(PictureError, match=message):
        Pictures(CONFIG, sampling=sampling).frames(10, fps)


def test_each_frame_is_a_tile_behind_its_name(processor: Processor) -> None:
    frames = [noise(11, 17, seed=n) for n in range(3)]
    example = processor.encode(said("In", frames, "or", noise(9, 30), "?"))
    text = processor.tokenizer.decode(example.tokens)
    seen = f"<img>{'<IMG_CONTEXT>' * 4}</img>"
    assert f"InFrame1: {seen}\nFrame2: {seen}\nFrame3: {seen}\nor<img>" in text
    assert [int(n) for n in np.unique(example.info.image)] == [0, 1, 2, 3, 4, 5, 6, 7]
    assert example.patches.length == 7 * 16


@pytest.mark.parametrize("frames", [1, 2, 16])
def test_what_is_measured_is_what_is_encoded(processor: Processor, frames: int) -> None:
    video = [noise(13, 40, seed=n) for n in range(frames)]
    messages = [*said("See", video, noise(50, 20), video[::-1], "?"), {"role": "assistant", "content": "b"}]
    example = processor.encode(messages)
    assert measure(processor, messages) == (len(example.tokens), example.patches.length)


def test_a_placeholder_in_a_message_is_text(processor: Processor) -> None:
    example = processor.encode(said("What is <video> or <img>?", [noise(8, 8)]))
    assert "What is <video> or <img>?Frame1: <img>" in processor.tokenizer.decode(example.tokens)


def test_the_placeholder_of_videos_needs_no_row_of_the_embedding(tmp_path: Path) -> None:
    """It never stands in a prompt, and a tokenizer may have it behind the tokens that the model was trained with."""
    write_tiny_files(tmp_path, SIZES)
    file, words = tmp_path / "config.json", tmp_path / "tokenizer.json"
    tokenizer = Tokenizer.from_file(str(words))
    rows, number = tokenizer.get_vocab_size(), tokenizer.token_to_id("<video>")
    text = words.read_text().replace(f'"<video>": {number}', f'"<video>": {rows}')
    words.write_text(text.replace(f'"id": {number},', f'"id": {rows},'))
    config = json.loads(file.read_text())
    config["text_config"]["vocab_size"] = rows
    file.write_text(json.dumps(config))
    processor = Processor.from_hf(tmp_path)
    assert processor.tokenizer.convert_tokens_to_ids("<video>") == rows
    assert processor.encode(said("See", [noise(8, 8)] * 2, "<video>?")).tokens.max() < rows
    processor = Processor.from_hf(tmp_path, special_tokens_in_text="tokens")
    for messages, found, videos in ((said([noise(8, 8)], "<video>?"), 2, 1), (said("<video>?"), 1, 0)):
        with pytest.raises(
            SampleError, match=f"has {found} placeholders '<video>', but the conversation has {videos} "
        ):
            processor.encode(messages)


def test_a_chat_template_without_videos_is_refused_for_them(processor: Processor) -> None:
    template = processor.tokenizer.chat_template.replace("<video>", "")
    other = Processor(processor.tokenizer, processor.rules, template)
    assert len(other.encode(said("Only text")).tokens)
    with pytest.raises(SampleError, match="q: the rendered text has 0 placeholders '<video>', but the conversation"):
        other.encode(said([noise(8, 8)]), name="q")


def files_of(**change: Any) -> ProcessorFiles:
    stated = FAMILY.small.files(CONFIG, token_ids(FAMILY.small))
    image, video = stated["preprocessor_config.json"], stated["video_preprocessor_config.json"] | change
    return ProcessorFiles(Path("image.json"), image, Path("video.json"), video)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, None),
        ({"num_frames": 8}, None),
        ({"do_sample_frames": True, "num_frames": 8}, Sampling(8)),
        ({"do_sample_frames": True, "fps": 2, "initial_shift": True}, Sampling(fps=2)),
        ({"do_sample_frames": True, "num_frames": 8, "fps": 2, "initial_shift": 3}, Sampling(8, 2, 3.0)),
        ({"do_sample_frames": True, "num_frames": 8, "initial_shift": False}, Sampling(8, shift=0.0)),
    ],
)
def test_what_the_file_says_of_frames(change: dict[str, Any], expected: Sampling | None) -> None:
    assert pictures(CONFIG, files_of(**change)) == replace(Pictures(CONFIG), sampling=expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"size": {"height": 448, "width": 448}}, "size is .*, expected 24 x 24, the image_size of vision_config"),
        ({"image_mean": [0.5, 0.5, 0.5]}, r"image_mean is \[0.5, 0.5, 0.5\], expected .*, as pictures have it"),
        ({"size": None}, "size is {'height': 384, 'width': 384}, expected 24 x 24"),
        ({"do_center_crop": True}, "do_center_crop is True, expected False"),
        ({"do_sample_frames": "yes"}, "do_sample_frames is 'yes', expected true or false"),
        ({"do_sample_frames": True}, "do_sample_frames is True, expected num_frames or fps beside it"),
        ({"do_sample_frames": True, "num_frames": 2.5}, "num_frames is 2.5, expected a number, 1 or more"),
        ({"do_sample_frames": True, "fps": 0}, "fps is 0, expected a number above 0"),
        ({"do_sample_frames": True, "num_frames": 2, "initial_shift": -1}, "initial_shift is -1, expected true or a"),
    ],
)
def test_other_processing_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=f"^video.json: {message}"):
        pictures(CONFIG, files_of(**change))


def test_a_directory_without_a_file_for_videos_has_that_of_pictures(tmp_path: Path) -> None:
    write_tiny_files(tmp_path, SIZES)
    (tmp_path / "video_preprocessor_config.json").unlink()
    file = tmp_path / "preprocessor_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"do_sample_frames": True, "num_frames": 2}))
    example = Processor.from_hf(tmp_path).encode(said([noise(8, 8)] * 5))
    assert example.patches.length == 2 * 16

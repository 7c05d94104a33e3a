"""Videos: which frames are used, their times as text, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rave_jax.checkpoint.tiny import Tiny, tiny_config, token_ids, write_tiny_files
from rave_jax.config import ConfigError
from rave_jax.data.processor import Processor
from rave_jax.data.sample import ImageError
from rave_jax.data.survey import measure
from rave_jax.data.template import Template
from rave_jax.families.directory import processor_files
from rave_jax.families.pictures import Frames, ProcessorFiles
from rave_jax.families.smolvlm import FAMILY, presets
from rave_jax.families.smolvlm.numbers import spelled
from rave_jax.families.smolvlm.pictures import Pictures, pictures
from rave_jax.families.smolvlm.video import VIDEO_TEMPLATE, VideoLimits, at_time, introduction
from tests.data.pictures import noise

SIZES = Tiny(family="smolvlm", patch_size=6, merge_size=2)
CONFIG = tiny_config(SIZES)
SIDE = 24


def said(*parts: Any, fps: float | None = 4.0) -> list[dict[str, Any]]:
    """A question: texts, frames of a video at a rate, and pictures."""
    kinds = {str: "text", list: "video"}
    named = [(kinds.get(type(part), "image"), part) for part in parts]
    content = [{"type": kind, kind: part} | ({"fps": fps} if kind == "video" else {}) for kind, part in named]
    return [{"role": "user", "content": content}]


@pytest.fixture
def processor(tmp_path: Path) -> Processor:
    write_tiny_files(tmp_path, SIZES)
    return Processor.from_hf(tmp_path)


@pytest.mark.parametrize(
    ("limits", "total", "fps", "expected"),
    [
        (VideoLimits(), 4, None, [0, 1, 2, 3]),
        (VideoLimits(fps=1.0), 10, 2.0, [0, 2, 4, 6, 9]),
        (VideoLimits(fps=1.0, count=3), 10, 2.0, [0, 4, 9]),
        (VideoLimits(fps=1.0), 10, 100.0, [0]),
        (VideoLimits(fps=30.0), 3, 1.0, [0, 1, 2]),
        (VideoLimits(fps=2.0, count=2), 70, 10.0, [10, 60]),
    ],
)
def test_which_frames_are_used(limits: VideoLimits, total: int, fps: float | None, expected: list[int]) -> None:
    """The last case is a long video, whose first and last seconds are left out."""
    np.testing.assert_array_equal(limits.indices(total, fps), expected)


@pytest.mark.parametrize(
    ("limits", "size", "expected"),
    [
        (VideoLimits(longest=100), (30, 60), (50, 100)),
        (VideoLimits(longest=100), (61, 30), (100, 50)),
        (VideoLimits(longest=101), (1, 300), (1, 101)),
        (VideoLimits(longest=9000), (40, 40), (4096, 4096)),
        (VideoLimits(size=(7, 9)), (40, 40), (7, 9)),
    ],
)
def test_the_size_of_a_frame(limits: VideoLimits, size: tuple[int, int], expected: tuple[int, int]) -> None:
    assert limits.frame_size(*size) == expected


def test_numbers_are_written_in_words() -> None:
    """tests/parity/test_videos.py compares more of them with the package that transformers uses."""
    assert [spelled(n) for n in (0, 13, 40, 64, 100)] == ["zero", "thirteen", "forty", "sixty-four", "one hundred"]
    assert spelled(1_234_021) == "one million, two hundred and thirty-four thousand and twenty-one"
    with pytest.raises(ValueError, match="-1 is not from 0 to 999,999,999"):
        spelled(-1)


def test_the_time_of_a_frame_and_of_a_video() -> None:
    assert (at_time(0), at_time(61.9), at_time(6000)) == tuple(
        f"\nFrame from {t}:" for t in ("00:00", "01:01", "100:00")
    )
    frames = np.arange(0, 24, 12)
    known, guessed = Frames(frames, 24, 24.0), Frames(frames, 24, 24.0, guessed=True)
    begin = "You are provided the following series of two frames from a"
    assert introduction(known) == f"{begin} 0:00:01 [H:MM:SS] video.\n"
    assert introduction(guessed) == f"{begin} 0:00:00 [H:MM:SS] video.\n"


def test_the_template_of_videos_is_that_of_transformers(processor: Processor) -> None:
    from transformers.models.smolvlm.processing_smolvlm import DEFAULT_CHAT_TEMPLATE

    talk = [
        {"role": "system", "content": [{"type": "text", "text": "Be brief."}]},
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": " a\n"}, {"type": "video"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "b"}]},
        {"role": "user", "content": [{"type": "video"}, {"type": "text", "text": "c"}]},
    ]
    ours, theirs = (Template(processor.tokenizer, text) for text in (VIDEO_TEMPLATE, DEFAULT_CHAT_TEMPLATE))
    for asks in (True, False):
        assert ours.render(talk, asks).text == theirs.render(talk, asks).text


def test_each_frame_is_a_tile_behind_its_time(processor: Processor) -> None:
    """The introduction and the text around a video become tokens together: there is one token for a space and a word
    behind it."""
    talk = [*said([noise(11, 17, seed=n) for n in range(8)], "How many?"), {"role": "assistant", "content": "8"}]
    example = processor.encode(talk)
    text = processor.tokenizer.decode(example.tokens)
    seen = f"<fake_token_around_image><global-img>{'<image>' * 4}<fake_token_around_image>"
    assert text == (
        "<|im_start|>User: You are provided the following series of four frames from a 0:00:02 [H:MM:SS] video.\n\n"
        f"Frame from 00:00:{seen}\nFrame from 00:00:{seen}\nFrame from 00:01:{seen}\nFrame from 00:01:{seen}\n\n"
        "How many?<end_of_utterance>\nAssistant: 8<end_of_utterance>\n"
    )
    assert example.patches.length == 4 * 16
    learned = processor.tokenizer.decode(example.tokens[example.loss_mask > 0])
    assert learned.strip() == "8<end_of_utterance>"
    outer = text.replace(seen, "<image>")
    joined = processor.tokenizer.encode(outer, add_special_tokens=False)
    inner = len(processor.tokenizer.encode(seen, add_special_tokens=False)) - 1
    assert len(example.tokens) == len(joined) + 4 * inner


@pytest.mark.parametrize("frames", [1, 3, 16])
def test_what_is_measured_is_what_is_encoded(processor: Processor, frames: int) -> None:
    video = [noise(13, 40, seed=n) for n in range(frames)]
    messages = [*said("See", video, noise(50, 20), video[1:] or video, "?"), {"role": "assistant", "content": "b"}]
    example = processor.encode(messages)
    assert measure(processor, messages) == (len(example.tokens), example.patches.length)


def test_each_video_names_its_own_frames(processor: Processor) -> None:
    """transformers names the frames of the longest."""
    text = processor.tokenizer.decode(processor.encode(said([noise(8, 8)] * 6, "or", [noise(8, 8)] * 2)).tokens)
    assert "series of three frames from a 0:00:01 [" in text and "series of one frames from a 0:00:00 [" in text


def test_a_rate_is_needed_where_frames_are_sampled(processor: Processor) -> None:
    messages = said([noise(8, 8)] * 3, fps=None)
    with pytest.raises(ImageError, match=r"q: video: sampling 2\.0 frames per second needs the part's own 'fps'"):
        processor.encode(messages, name="q")
    with pytest.raises(ImageError, match=r"video: sampling 2\.0 frames per second needs"):
        measure(processor, messages)


def test_the_released_processor(shared_data: Path) -> None:
    """It says `video_sampling`, and frames become as large as pictures before they are tiles."""
    config = presets.smolvlm2_500m()
    rules = pictures(config, processor_files(shared_data / "configs" / "smolvlm2-500m-video-instruct"))
    assert rules.video == VideoLimits(fps=1.0, count=64, longest=2048)
    used = rules.frames(3000, 30.0)
    assert len(used.indices) == 64 and used.indices[0] == 30
    assert rules.video_grid(360, 640, used) == (64, 8, 8)


def files_of(**change: Any) -> ProcessorFiles:
    stated = FAMILY.small.files(CONFIG, token_ids(FAMILY.small))
    image, video = stated["preprocessor_config.json"], stated["video_preprocessor_config.json"] | change
    return ProcessorFiles(Path("image.json"), image, Path("video.json"), video)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, VideoLimits(2.0, 16, 48)),
        ({"do_sample_frames": None}, VideoLimits(2.0, 16, 48)),
        ({"do_sample_frames": False}, VideoLimits(longest=48)),
        ({"do_sample_frames": None, "num_frames": None, "fps": None}, VideoLimits(longest=48)),
        ({"size": {"height": 30, "width": 20}}, VideoLimits(2.0, 16, size=(30, 20))),
        ({"video_sampling": {"fps": 1, "max_frames": 9, "video_size": {"longest_edge": 7}}}, VideoLimits(1.0, 9, 48)),
    ],
)
def test_what_the_file_says_of_frames(change: dict[str, Any], expected: VideoLimits) -> None:
    found = pictures(CONFIG, files_of(**change))
    assert isinstance(found, Pictures) and found.video == expected


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_image_size": {"longest_edge": 364}}, "max_image_size is .*, expected {'longest_edge': 24}, the"),
        ({"size": {"shortest_edge": 9}}, "size is {'shortest_edge': 9}, expected {'height': pixels, 'width'"),
        ({"image_std": [1.0, 1.0, 1.0]}, r"image_std is \[1.0, 1.0, 1.0\], expected \[0.5, 0.5, 0.5\], as pictures"),
        ({"resample": 3}, r"resample is 3, expected 1 \(Lanczos\)"),
        ({"video_sampling": [1]}, r"video_sampling is \[1\], expected {'fps'"),
        ({"fps": None}, "fps is missing: frames are sampled by num_frames and fps; to use every frame, set"),
        ({"num_frames": 1.5}, "num_frames is 1.5, expected a number, 1 or more"),
        ({"num_frames": True}, "num_frames is True, expected a number, 1 or more"),
        ({"do_sample_frames": 1}, "do_sample_frames is 1, expected true or false"),
    ],
)
def test_other_processing_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=f"^video.json: {message}"):
        pictures(CONFIG, files_of(**change))

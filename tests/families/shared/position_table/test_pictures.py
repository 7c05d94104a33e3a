"""Videos with times between their frames, and what their settings files may say."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rave_jax.config import ConfigError
from rave_jax.families.pictures import PictureError, ProcessorFiles
from rave_jax.families.qwen3_vl.presets import qwen3_vl_4b
from rave_jax.families.shared.position_table.pictures import FrameLimits, TimedPictures, timed_pictures

CONFIG = qwen3_vl_4b()
RULES = TimedPictures(CONFIG)


def rules_of(**video: Any) -> TimedPictures:
    """The rules of a model whose settings file of videos says this."""
    return timed_pictures(CONFIG, ProcessorFiles(Path("images.json"), {}, Path("videos.json"), video))


def test_times_stand_before_the_frames_of_a_video_and_markers_around_them() -> None:
    """A pair of frames becomes one frame of the tower, at the mean of their times; the last is repeated in a pair."""
    frames = replace(RULES, video=FrameLimits(fps=None)).frames(5, 4.0)
    pieces = RULES.expand("video", (3, 1, 2), frames, lambda text: [ord(c) for c in text])
    start, end, video = (getattr(CONFIG, f"{name}_token_id") for name in ("vision_start", "vision_end", "video"))
    text = [(bool(piece.grid), [chr(n) if n < 128 else n for n in piece.tokens.tolist()]) for piece in pieces]
    assert text == [
        (False, [*"<0.1 seconds>", start]),
        (True, [video] * 2),
        (False, [end, *"<0.6 seconds>", start]),
        (True, [video] * 2),
        (False, [end, *"<1.0 seconds>", start]),
        (True, [video] * 2),
        (False, [end]),
    ]
    assert {piece.grid for piece in pieces} == {None, (1, 1, 2)}
    assert {piece.seconds for piece in pieces} == {None}


def test_frames_lie_evenly_from_the_first_to_the_last() -> None:
    np.testing.assert_array_equal(RULES.frames(10, 5.0).indices, [0, 3, 6, 9])
    np.testing.assert_array_equal(RULES.frames(3, 30.0).indices, [0, 1, 2])
    assert len(RULES.frames(3000, 2.0).indices) == 768


def test_the_pixels_of_all_frames_are_bounded_together() -> None:
    rules = replace(RULES, video=FrameLimits(4096, 32 * 32 * 128))
    assert rules.frame_size(256, 256, 2) == (256, 256)
    assert rules.frame_size(256, 256, 4) == (160, 160)
    assert replace(rules, video=replace(rules.video, cap_total=True, max_tokens=4)).frame_size(256, 256, 4) == (64, 64)
    assert RULES.frame_size(5, 20, 2) == (128, 512), "a frame smaller than a merge unit keeps its shape"


def test_what_is_no_video_is_refused() -> None:
    with pytest.raises(PictureError, match="has 1 frames, of which 1 are used; expected at least 2"):
        RULES.frames(1, 1.0)
    with pytest.raises(PictureError, match=r"sampling 2.0 frames per second needs the part's own 'fps'"):
        RULES.frames(8, None)
    with pytest.raises(PictureError, match="the sides must be within a factor of 200"):
        RULES.frame_size(40, 10_000, 4)


def test_what_a_file_leaves_out_is_as_in_transformers() -> None:
    assert rules_of().video == FrameLimits()
    assert rules_of(do_sample_frames=False).video.fps is None
    said = rules_of(fps=1, max_frames=9, cap_pixels_per_frame=True, size={"shortest_edge": 9, "longest_edge": 99}).video
    assert said == FrameLimits(9, 99, 1.0, max_frames=9, cap_total=True)


@pytest.mark.parametrize(
    ("video", "message"),
    [
        ({"num_frames": 8}, "videos.json: num_frames is 8, expected null"),
        ({"fps": "2"}, "videos.json: fps is '2', expected a number above 0"),
        ({"do_sample_frames": 1}, "videos.json: do_sample_frames is 1, expected true or false"),
        ({"min_frames": 0}, "videos.json: min_frames is 0, expected a number, 1 or more"),
        ({"image_mean": [0.4, 0.5, 0.5]}, r"videos.json: image_mean is .*expected \[0.5, 0.5, 0.5\], as pictures"),
        ({"size": {"shortest_edge": 9}}, "videos.json: size is .*max_pixels is missing"),
    ],
)
def test_settings_that_are_not_carried_out_are_refused(video: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        rules_of(**video)

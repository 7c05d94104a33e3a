"""Videos: which frames, at what size."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rave_jax.data.images import PatchGrid, image_patches, smart_resize
from rave_jax.data.sample import ImageError
from rave_jax.data.video import VideoLimits, frame_size, sample_frames, video_patches
from tests.data.pictures import noise

GRID = PatchGrid(patch=14, temporal=2, merge=2, window=4)
SMALL = VideoLimits(min_pixels=784, max_pixels=15680)


def test_every_frame_where_no_rate_is_asked() -> None:
    np.testing.assert_array_equal(sample_frames(7, 30.0, SMALL, 2), range(7))


@given(st.integers(2, 2000), st.sampled_from([1.0, 23.976, 25.0, 30.0]), st.sampled_from([0.5, 1.0, 2.0, 4.0]))
def test_sampled_frames_are_spread_over_the_video(total: int, fps: float, wanted: float) -> None:
    limits = replace(SMALL, fps=wanted, max_frames=64)
    frames = sample_frames(total, fps, limits, 2)
    assert len(frames) % 2 == 0
    assert 2 <= len(frames) <= min(64, total)
    assert len(frames) == min(max(total / fps * wanted, 4), 64, total) // 2 * 2
    assert frames[0] == 0
    assert frames[-1] < total
    steps = np.diff(frames)
    assert steps.max() - steps.min() <= 1


def test_too_few_frames_to_sample() -> None:
    with pytest.raises(ImageError, match="clip: 1 frames"):
        video_patches([noise(28, 28)], 1.0, GRID, replace(SMALL, fps=1.0), "clip")
    with pytest.raises(ImageError, match="needs the part's own 'fps'"):
        video_patches([noise(28, 28)] * 4, None, GRID, replace(SMALL, fps=1.0))
    for fps in (0, -1.0, "x"):
        with pytest.raises(ImageError, match=r"clip: fps is .*expected a number from 0.001 to 1000"):
            video_patches([noise(28, 28)] * 4, fps, GRID, SMALL, "clip")
    with pytest.raises(ImageError, match="no frames"):
        video_patches([], 1.0, GRID, SMALL)
    with pytest.raises(ImageError, match="several sizes"):
        video_patches([noise(28, 28), noise(28, 30)], 1.0, GRID, SMALL)


def test_the_budget_of_the_whole_video() -> None:
    limits = VideoLimits(cap_total=True, max_tokens=1000)
    budget = int(1000 * 28 * 28 * 0.9)
    few, many = (frame_size(1080, 1920, n, GRID, limits) for n in (2, 12))
    assert few == frame_size(1080, 1920, 2, GRID, VideoLimits())
    assert many[0] * many[1] <= budget * 2 // 12 < few[0] * few[1]
    floor = smart_resize(1080, 1920, 28, limits.min_pixels, int(limits.min_pixels * 1.05))
    assert frame_size(1080, 1920, 768, GRID, limits) == floor


def test_frames_have_the_pixels_of_pictures() -> None:
    """A video is its frames, two to a patch, the last one repeated."""
    frames = [noise(60, 90, seed=n) for n in range(3)]
    video, seconds = video_patches(frames, 2.0, GRID, SMALL)
    assert seconds == 1.0
    singles = [image_patches(frame, GRID, SMALL.min_pixels, SMALL.max_pixels) for frame in frames]
    units = singles[0].patches.length
    pixels = video.patches.pixels.reshape(2, units, 3, 2, 196)
    for group, slot, frame in ((0, 0, 0), (0, 1, 1), (1, 0, 2), (1, 1, 2)):
        np.testing.assert_array_equal(
            pixels[group, :, :, slot], singles[frame].patches.pixels.reshape(units, 3, 2, 196)[:, :, 0]
        )
    np.testing.assert_array_equal(video.patches.frame, np.repeat([1, 2], units))
    np.testing.assert_array_equal(video.patches.place, np.tile(singles[0].patches.place, (2, 1)))
    window = singles[0].patches.window
    np.testing.assert_array_equal(video.patches.window, np.concatenate([window, window + window.max()]))
    np.testing.assert_array_equal(video.order, np.concatenate([singles[0].order, singles[0].order + units // 4]))


def test_a_real_video(shared_data: Path) -> None:
    folder = shared_data / "video_mini/red-panda"
    times = [frame["t"] for frame in json.loads((folder / "frames.json").read_text())["sampled"]]
    fps = (len(times) - 1) / (times[-1] - times[0])
    video, seconds = video_patches(sorted(folder.glob("*.jpg")), fps, GRID, SMALL, "red-panda")
    assert video.grid[0] == 4
    assert seconds == pytest.approx(2 / fps)
    assert video.patches.length == 4 * len(video.order)

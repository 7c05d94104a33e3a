"""Videos: which frames, at what size."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rave_jax.data.images import cut_image
from rave_jax.data.sample import ImageError
from rave_jax.data.video import cut_video
from rave_jax.families.qwen2_5_vl.presets import qwen2_5_vl_7b
from rave_jax.families.shared.grids.images import smart_resize
from rave_jax.families.shared.grids.pictures import Pictures
from rave_jax.families.shared.grids.video import VideoLimits, frame_size, sample_frames
from tests.data.pictures import noise

CONFIG = qwen2_5_vl_7b()
SMALL = VideoLimits(min_pixels=784, max_pixels=15680)
RULES = Pictures(CONFIG, 784, 15680, SMALL)


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
    sampling = replace(RULES, video=replace(SMALL, fps=1.0))
    with pytest.raises(ImageError, match="clip: 1 frames"):
        cut_video([noise(28, 28)], 1.0, sampling, "clip")
    with pytest.raises(ImageError, match="needs the part's own 'fps'"):
        cut_video([noise(28, 28)] * 4, None, sampling)
    for fps in (0, -1.0, "x"):
        with pytest.raises(ImageError, match=r"clip: fps is .*expected a number from 0.001 to 1000"):
            cut_video([noise(28, 28)] * 4, fps, RULES, "clip")
    with pytest.raises(ImageError, match="no frames"):
        cut_video([], 1.0, RULES)
    with pytest.raises(ImageError, match="several sizes"):
        cut_video([noise(28, 28), noise(28, 30)], 1.0, RULES)


def test_the_budget_of_the_whole_video() -> None:
    limits = VideoLimits(cap_total=True, max_tokens=1000)
    budget = int(1000 * 28 * 28 * 0.9)
    few, many = (frame_size(1080, 1920, n, CONFIG.vision, limits) for n in (2, 12))
    assert few == frame_size(1080, 1920, 2, CONFIG.vision, VideoLimits())
    assert many[0] * many[1] <= budget * 2 // 12 < few[0] * few[1]
    floor = smart_resize(1080, 1920, 28, limits.min_pixels, int(limits.min_pixels * 1.05))
    assert frame_size(1080, 1920, 768, CONFIG.vision, limits) == floor


def test_frames_have_the_pixels_of_pictures() -> None:
    """A video is its frames, two to a patch, the last one repeated. They keep their size: to another one, frames are
    resized as torch does, and pictures as Pillow does."""
    frames = [noise(56, 84, seed=n) for n in range(3)]
    cut, used = cut_video(frames, 2.0, RULES)
    assert cut.grid == RULES.video_grid(56, 84, used)
    assert [piece.seconds for piece in RULES.expand("video", cut.grid, used, list)] == [1.0]
    video, pictures = cut.patches, [cut_image(frame, RULES) for frame in frames]
    singles = [picture.patches for picture in pictures]
    units = singles[0].length
    pixels = video.pixels.reshape(2, units, 3, 2, 196)
    for group, slot, frame in ((0, 0, 0), (0, 1, 1), (1, 0, 2), (1, 1, 2)):
        np.testing.assert_array_equal(
            pixels[group, :, :, slot], singles[frame].pixels.reshape(units, 3, 2, 196)[:, :, 0]
        )
    np.testing.assert_array_equal(video.frame, np.repeat([1, 2], units))
    np.testing.assert_array_equal(video.place, np.tile(singles[0].place, (2, 1)))
    windows = singles[0].window.max()
    np.testing.assert_array_equal(video.window, np.concatenate([singles[0].window, singles[0].window + windows]))
    order = pictures[0].order
    np.testing.assert_array_equal(cut.order, np.concatenate([order, order + units // 4]))


def test_a_real_video(shared_data: Path) -> None:
    folder = shared_data / "video_mini/red-panda"
    times = [frame["t"] for frame in json.loads((folder / "frames.json").read_text())["sampled"]]
    fps = (len(times) - 1) / (times[-1] - times[0])
    cut, used = cut_video(sorted(folder.glob("*.jpg")), fps, RULES, "red-panda")
    assert cut.grid[0] == 4
    assert used.used_rate == pytest.approx(fps)
    assert cut.patches.length == 4 * len(cut.order)

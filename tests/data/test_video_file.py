"""Video files: what their headers say, which frames are decoded, and files that cannot be used."""

from __future__ import annotations

import base64
import importlib
import weakref
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from PIL import Image
from transformers.video_utils import load_video

from rave_jax.config import ConfigError
from rave_jax.data.patches import empty_patches
from rave_jax.data.processor import Processor
from rave_jax.data.sample import ImageError, OverBudget, VideoError
from rave_jax.data.survey import measure
from rave_jax.data.video import cut_video, grey_frames
from rave_jax.data.video_file import TURNS, decoded, read_header
from rave_jax.families.pictures import CutPicture, Frames, PictureRules
from tests.data.conftest import TEXT_ALONE
from tests.data.films import film, shown, sound


def arrays(source: Any, indices: Any) -> list[np.ndarray]:
    return [np.asarray(image) for image in decoded(source, indices)]


@pytest.mark.parametrize("ending", ["mp4", "mov", "avi", "mkv"])
def test_frames_are_those_of_pyav(ending: str, tmp_path: Path) -> None:
    """Matroska's header has no number of frames; its packets are counted."""
    path = film(tmp_path / f"a.{ending}")
    all_of_them = shown(path)
    for source in (str(path), path.read_bytes()):
        assert read_header(source) == (12, 6.0, 48, 64)
        found = arrays(source, [0, 3, 3, 11])
        for one, index in zip(found, [0, 3, 3, 11], strict=True):
            np.testing.assert_array_equal(one, all_of_them[index])


def test_vp9_in_webm(tmp_path: Path) -> None:
    path = film(tmp_path / "a.webm", 7, codec="vp9")
    assert read_header(str(path)).frames == len(shown(path)) == 7
    np.testing.assert_array_equal(arrays(str(path), [6])[0], shown(path)[6])


def test_a_data_uri(tmp_path: Path) -> None:
    data = base64.b64encode(film(tmp_path / "a.mp4", 3).read_bytes()).decode()
    assert read_header(f"data:video/mp4;base64,{data}").frames == 3


@pytest.mark.parametrize("matrix", TURNS)
def test_frames_stand_upright(matrix: tuple[int, int, int, int], tmp_path: Path) -> None:
    """The display matrix says where each corner is to be seen; a red one is drawn at the top left."""
    path = film(tmp_path / "a.mp4", 3, matrix=matrix)
    a, b, c, d = matrix
    header = read_header(str(path))
    assert (header.height, header.width) == ((48, 64) if a else (64, 48))
    (image,) = arrays(str(path), [1])
    assert image.shape[:2] == (header.height, header.width)
    x, y = a + c, b + d  # where (1, 1), right and down, points to; the red corner lies at (-1, -1)
    corner = image[6 if y > 0 else -7, 7 if x > 0 else -8]
    assert corner[0] > 180 > corner[1] + 50


def test_a_turn_that_is_no_quarter(tmp_path: Path) -> None:
    path = film(tmp_path / "a.mp4", 3, matrix=(1, 1, -1, 1))
    with pytest.raises(VideoError, match=r"a\.mp4: its frames are to be turned by .* or stretched, expected quarter"):
        read_header(str(path))


def test_frames_of_uneven_times_are_counted_not_timed(tmp_path: Path) -> None:
    """As transformers does: index by index, at the average rate."""
    path = film(tmp_path / "a.mp4", 6, times=[0, 1, 2, 10, 11, 30])
    header = read_header(str(path))
    assert header.frames == 6
    assert header.fps == pytest.approx(6 * 6 / 31, rel=0.05)
    np.testing.assert_array_equal(arrays(str(path), [3])[0], shown(path)[3])


def cut(path: Path, share: float) -> bytes:
    data = path.read_bytes()
    return data[: int(len(data) * share)]


def claims(path: Path, frames: int) -> bytes:
    """An AVI file with another number of frames in the header of its stream."""
    data = bytearray(path.read_bytes())
    at = data.index(b"strh") + 8 + 32
    assert int.from_bytes(data[at : at + 4], "little") == 12
    data[at : at + 4] = frames.to_bytes(4, "little")
    return bytes(data)


def test_files_that_cannot_be_used(tmp_path: Path) -> None:
    mp4, mkv, avi = (film(tmp_path / f"a.{ending}") for ending in ("mp4", "mkv", "avi"))
    files = {
        "empty.mp4": (b"", "Invalid data"),
        "noise.mp4": (bytes(range(256)) * 8, "Invalid data"),
        "text.mp4": (b"a film\n" * 99, "not a video file that is read"),
        "cut.mp4": (cut(mp4, 0.5), "Invalid data"),
        "cut.mkv": (cut(mkv, 0.6), r"the file is cut off: its header says 2\.0 s, and it ends after [01]\.\d s"),
        "none.mp4": (film(tmp_path / "b.mp4", 0).read_bytes(), "no frame of it can be decoded|no video in it"),
        "sound.mp4": (sound(tmp_path / "c.mp4").read_bytes(), "no video in it, only audio"),
        "huge.avi": (claims(avi, 2_000_000_000), "the header claims 2,000,000,000 frames, expected at most 4,194,304"),
    }
    for name, (data, says) in files.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(VideoError, match=rf"{name}: .*({says})") as caught:
            read_header(str(tmp_path / name))
        assert "\n" not in str(caught.value)
        assert caught.value.reason == "broken video"
    with pytest.raises(VideoError, match=r"gone\.mp4: No such file"):
        read_header(str(tmp_path / "gone.mp4"))
    with pytest.raises(VideoError, match="it is a directory; only regular files"):
        read_header(str(tmp_path))
    with pytest.raises(VideoError, match="a URL: videos are not downloaded; save the video"):
        read_header("https://here/a.mp4")


@pytest.mark.parametrize(("ending", "codec"), [("mp4", "mpeg4"), ("mkv", "mpeg4"), ("ts", "mpeg2video")])
def test_damage_anywhere_is_a_skipped_sample(ending: str, codec: str, tmp_path: Path) -> None:
    """Whatever bytes are wrong, the frames are there or the error is one that skips the sample."""
    whole = film(tmp_path / f"a.{ending}", codec=codec).read_bytes()
    rng, read = np.random.default_rng(0), 0
    for _ in range(40):
        data = bytearray(whole)
        for place in rng.integers(0, len(data), rng.integers(1, 12)):
            data[place] = rng.integers(0, 256)
        data = data[: rng.integers(len(data) // 3, 2 * len(data))]
        try:
            header = read_header(bytes(data), "x")
            assert len(list(decoded(bytes(data), [0, header.frames - 1], "x"))) == 2
            read += 1
        except VideoError as error:
            assert str(error).startswith("x: ") and "\n" not in str(error)
    assert 0 < read < 40


def test_a_file_with_fewer_frames_than_it_says(tmp_path: Path) -> None:
    """Its table comes first, its frames end early."""
    path = film(tmp_path / "a.mp4", 40, options={"movflags": "faststart"})
    (tmp_path / "cut.mp4").write_bytes(cut(path, 0.5))
    source = str(tmp_path / "cut.mp4")
    assert read_header(source).frames == 40
    assert len(arrays(source, [0, 2])) == 2
    with pytest.raises(VideoError, match=r"cut\.mp4: frame 39 is not there: only \d+ frames can be decoded"):
        arrays(source, [0, 2, 39])


def test_other_files_are_not_opened_for_a_video(tmp_path: Path) -> None:
    """A playlist, or a picture whose name has a number in it, leads FFmpeg to further files."""
    film(tmp_path / "a.mp4", 3)
    playlist = tmp_path / "list.mp4"
    playlist.write_text(f"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\nfile://{tmp_path}/a.mp4\n#EXT-X-ENDLIST\n")
    concat = tmp_path / "concat.mp4"
    concat.write_text("ffconcat version 1.0\nfile a.mp4\n")
    for path in (playlist, concat):
        with pytest.raises(VideoError, match="not a video file that is read, such as mp4"):
            read_header(str(path))


def test_without_pyav(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No sample of the kind can be used, so the run ends at the first."""
    real = importlib.import_module

    def missing(name: str, *rest: Any) -> Any:
        if name == "av":
            raise ImportError("No module named 'av'")
        return real(name, *rest)

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(ConfigError, match=r"package av, which is not installed: pip install 'rave-jax\[video\]'"):
        read_header("a.mp4")


def with_video(processor: Processor, **limits: Any) -> Processor:
    rules: Any = processor.rules
    video = replace(rules.video, min_pixels=64, max_pixels=4096, **limits)
    return Processor(processor.tokenizer, replace(rules, video=video), processor.chat._template)


def asked(video: Any, **more: Any) -> list[dict[str, Any]]:
    part = {"type": "video", "video": video, **more}
    return [
        {"role": "user", "content": [part, {"type": "text", "text": "Why?"}]},
        {"role": "assistant", "content": "A"},
    ]


@pytest.mark.parametrize("limits", [{}, {"fps": 2.0}, {"fps": 1.0, "max_frames": 2}])
def test_a_file_is_its_frames(limits: dict[str, Any], processor: Processor, tmp_path: Path) -> None:
    """The same arrays as of a list of all its frames; tokens and patches are known from the header."""
    path, made = film(tmp_path / "a.mp4"), with_video(processor, **limits)
    ours = made.encode(asked(str(path)))
    theirs = made.encode(asked(shown(path), fps=6.0))
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)
    assert measure(made, asked(str(path))) == (len(ours.tokens), ours.patches.length)


def test_the_rate_of_a_file_is_its_own(processor: Processor, tmp_path: Path) -> None:
    path, made = film(tmp_path / "a.mp4"), with_video(processor, fps=1.0)
    assert made.encode(asked(str(path), fps=6)).patches.length == made.encode(asked(str(path))).patches.length
    with pytest.raises(ImageError, match=r"a\.mp4: fps is 2, but the file holds 6 frames per second; leave 'fps' out"):
        made.encode(asked(str(path), fps=2))
    with pytest.raises(ImageError, match="a video is int: expected a list of frames or a video file"):
        made.encode(asked(7))


def test_a_video_over_budget_is_not_decoded(
    processor: Processor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, made = film(tmp_path / "a.mp4"), with_video(processor)
    need = measure(made, asked(str(path)))
    monkeypatch.setattr("rave_jax.data.video.decoded", lambda *_: pytest.fail("decoded"))
    with pytest.raises(OverBudget, match=r"x: the video takes \d+ tokens, over the budget of 50 tokens") as caught:
        made.encode(asked(str(path)), name="x", most_tokens=50)
    assert 50 < caught.value.tokens < need.tokens
    assert caught.value.patches == need.patches
    monkeypatch.setattr("rave_jax.data.processor.MOST_TOKENS", 60)
    with pytest.raises(OverBudget, match="over the budget of 60 tokens"):
        made.encode(asked(str(path)))


def test_a_header_may_claim_any_number_of_frames(processor: Processor, tmp_path: Path) -> None:
    data, made = claims(film(tmp_path / "a.avi"), 4_000_000), with_video(processor)
    with pytest.raises(OverBudget, match=r"film: \d+ patches, expected at most 16777216"):
        made.encode(asked(data, name="film"))


class Watching(PictureRules):
    """Rules that take every frame, and see how many frames are held at a time."""

    most = 0

    def frames(self, total: int, fps: float | None) -> Frames:
        return Frames(np.arange(total), total, 1.0)

    def cut_video(self, images: Sequence[Image.Image], frames: Frames) -> CutPicture:
        seen: list[weakref.ref[Image.Image]] = []
        for image in images:
            seen.append(weakref.ref(image))
            Watching.most = max(Watching.most, sum(one() is not None for one in seen))
        assert len(seen) == len(images)
        return CutPicture(UNCUT, np.arange(0), (len(images), 1, 1))


UNCUT = empty_patches((0,), 1)


def test_frames_of_full_size_do_not_wait_for_each_other(tmp_path: Path) -> None:
    """A family gets them one by one, so a long video takes the memory of what is made of it."""
    cut, _ = cut_video(str(film(tmp_path / "a.mp4", 30)), None, Watching(TEXT_ALONE.config))
    assert cut.grid == (30, 1, 1)
    assert 0 < Watching.most <= 2


def test_a_grey_video(tmp_path: Path) -> None:
    frames, fps = grey_frames(str(film(tmp_path / "a.mp4", 5)), None, (9, 9, 9))
    assert (len(frames), fps) == (5, 6.0)
    assert np.asarray(frames[0]).shape == (48, 64, 3)


@pytest.mark.parametrize("limits", [{}, {"fps": 2.0}, {"fps": 3.0, "max_frames": 4}])
@pytest.mark.parametrize("ending", ["mp4", "avi"])
def test_the_header_and_the_pixels_are_those_of_transformers(
    ending: str, limits: dict[str, Any], processor: Processor, tmp_path: Path
) -> None:
    """`load_video` with PyAV asks the same rules for the frames of a file, and reads the same pixels."""
    path = film(tmp_path / f"a.{ending}", 25, rate=5)
    rules: Any = with_video(processor, **limits).rules
    theirs, metadata = load_video(
        str(path), backend="pyav", sample_indices_fn=lambda metadata: rules.frames(*counted(metadata)).indices
    )
    header = read_header(str(path))
    assert header == (*counted(metadata), metadata.height, metadata.width)
    indices = rules.frames(header.frames, header.fps).indices
    assert len(indices) == len(theirs)
    np.testing.assert_array_equal(np.stack(arrays(str(path), indices)), theirs)


def counted(metadata: Any) -> tuple[int, float]:
    return metadata.total_num_frames, metadata.fps

"""Positions, tower windows and frame sampling against transformers itself, on random prompts and conversations.

Positions are theirs in every prompt without a video that lasts longer than it is wide. Behind one that does, theirs go
on behind the longer side of its grid and ours behind its last frame (the family's `positions.py` says why), so whatever
follows is later by as much as the last frame stands beyond that side.
"""

from __future__ import annotations

import json
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from rave_jax.batch import Kind
from rave_jax.data.processor import Processor
from rave_jax.data.sample import Example
from rave_jax.families.pictures import Visual
from rave_jax.families.shared.grids.images import window_order
from rave_jax.families.shared.grids.positions import mrope_positions
from rave_jax.families.shared.grids.video import VideoLimits, sample_frames
from tests.data.conftest import TEMPLATE, byte_tokenizer, tiny_settings
from tests.data.pictures import noise

pytestmark = pytest.mark.parity
SCRIPT = Path(__file__).parent / "positions_torch.py"


def layout(rng: np.random.Generator) -> dict:
    """A random document: stretches of text with images and videos in between (always some text between two)."""
    case: dict = {"types": [], "images": [], "videos": [], "seconds": [], "visuals": []}
    case["tokens_per_second"] = int(rng.choice([1, 2, 4, 25]))
    for _ in range(rng.integers(0, 6)):
        case["types"] += [0] * int(rng.integers(1, 9))
        video = bool(rng.random() < 0.4)
        grid = (int(rng.integers(1, 6)) if video else 1, *map(int, rng.integers(1, 12, 2)))
        seconds = float(np.float32(rng.choice([0.5, 1.0, 1 / 3, 0.7, 2.0, rng.random() * 3]))) if video else None
        case["visuals"].append((len(case["types"]), grid, seconds))
        case["types"] += [2 if video else 1] * int(np.prod(grid))
        case["videos" if video else "images"].append([grid[0], grid[1] * 2, grid[2] * 2])
        if video:
            case["seconds"].append(seconds)
    case["types"] += [0] * int(rng.integers(1, 9))
    return case


def conversation(rng: np.random.Generator) -> list[dict]:
    """A random conversation with pictures and videos in any of its questions."""
    messages = [{"role": "system", "content": "s"}] if rng.random() < 0.5 else []
    for _ in range(rng.integers(1, 4)):
        parts: list[dict] = [{"type": "text", "text": "q" * int(rng.integers(0, 5))}]
        for _ in range(rng.integers(0, 3)):
            height, width = map(int, rng.integers(4, 60, 2))
            if rng.random() < 0.3:
                frames = [noise(height, width)] * int(rng.integers(1, 6))
                parts.append({"type": "video", "video": frames, "fps": float(rng.choice([0.5, 1.0, 3.0]))})
            else:
                parts.append({"type": "image", "image": noise(height, width)})
        messages += [
            {"role": "user", "content": parts},
            {"role": "assistant", "content": "a" * int(rng.integers(1, 5))},
        ]
    return messages


def as_case(example: Example, processor: Processor, messages: list[dict]) -> dict:
    """What transformers would be told of an encoded conversation."""
    types = np.where(example.tokens == processor.rules.image_token_id, 1, 0)
    types = np.where(example.tokens == processor.rules.video_token_id, 2, types)
    case: dict = {"types": types.tolist(), "images": [], "videos": [], "tokens_per_second": 2}
    info = example.info
    for number in range(1, info.image.max(initial=0) + 1):
        first = np.flatnonzero((info.image == number) & (info.kind == Kind.VISUAL))[0]
        grid = [int(info.grid_t[first]), int(info.grid_h[first]) * 2, int(info.grid_w[first]) * 2]
        case["videos" if types[first] == 2 else "images"].append(grid)
    parts = [part for m in messages if not isinstance(m["content"], str) for part in m["content"]]
    # Their processor divides the temporal patch by the rate of the frames it used.
    case["seconds"] = [2 / part["fps"] for part in parts if part["type"] == "video"]
    return case


def visuals_of(example: Example, case: dict) -> list[tuple[int, tuple[int, int, int], float | None]]:
    """Start, grid and seconds of each picture and video of an encoded conversation."""
    seconds = iter(case["seconds"])
    found = []
    for number in range(1, int(example.info.image.max(initial=0)) + 1):
        first = int(np.flatnonzero(example.info.image == number)[0])
        grid = tuple(int(code[first]) for code in (example.info.grid_t, example.info.grid_h, example.info.grid_w))
        found.append((first, grid, next(seconds) if case["types"][first] == 2 else None))
    return found


def later(length: int, visuals: list[tuple[int, tuple[int, int, int], float | None]], rate: float) -> np.ndarray:
    """How much later our positions are than theirs, token by token: by what earlier videos last beyond their sides."""
    more = np.zeros(length, np.int64)
    for start, (t, h, w), seconds in visuals:
        step = 1 if seconds is None else np.float32(rate) * np.float32(seconds)
        last = int(np.float32(t - 1) * step)
        more[start + t * h * w :] += max(0, last + 1 - max(h, w))
    return more


@pytest.fixture(scope="module")
def processor() -> Processor:
    tokenizer = byte_tokenizer()
    settings = replace(tiny_settings(tokenizer), video=VideoLimits(min_pixels=64, max_pixels=1024))
    return Processor(tokenizer, settings, TEMPLATE)


def test_positions_windows_and_frames(processor: Processor, torch_python: str, tmp_path: Path) -> None:
    rng = np.random.default_rng(5)
    layouts = [layout(rng) for _ in range(150)]
    talks = [conversation(rng) for _ in range(50)]
    examples = [processor.encode(talk) for talk in talks]
    grids = [[[1, *(int(n) * 2 for n in rng.integers(1, 20, 2))]] for _ in range(60)]
    sampled = [
        (int(total), int(count) * 2)
        for total in rng.integers(2, 3000, 150)
        for count in [rng.integers(1, total // 2 + 1)]
    ]
    cases = {
        "positions": [*layouts, *(as_case(e, processor, t) for e, t in zip(examples, talks, strict=True))],
        "windows": [{"grids": grid, "window_size": 112, "patch_size": 14} for grid in grids],
        "frames": [{"total": total, "count": count} for total, count in sampled],
    }
    (tmp_path / "cases.json").write_text(json.dumps(cases))
    subprocess.run([torch_python, SCRIPT, tmp_path], check=True, timeout=300)
    theirs = np.load(tmp_path / "out.npz")
    assert len(theirs.files) == 150 + 50 + 60 + 150

    differ = []
    for number, case in enumerate(layouts):
        visuals = [Visual(*visual) for visual in case["visuals"]]
        ours = mrope_positions(len(case["types"]), visuals, case["tokens_per_second"])
        more = later(len(case["types"]), case["visuals"], case["tokens_per_second"])
        np.testing.assert_array_equal(ours - more, theirs[f"positions{number}"], err_msg=str(case["visuals"]))
        differ.append(bool(more.any()))
    for number, (example, case) in enumerate(zip(examples, cases["positions"][150:], strict=True), start=len(layouts)):
        more = later(len(example.tokens), visuals_of(example, case), 2)
        np.testing.assert_array_equal(example.positions - more, theirs[f"positions{number}"])
        differ.append(bool(more.any()))
    assert 20 < sum(differ) < len(differ) - 20, "both kinds of prompts are met"
    for number, [(_, rows, cols)] in enumerate(grids):
        np.testing.assert_array_equal(window_order(rows // 2, cols // 2, 4), theirs[f"windows{number}"])
    for number, (total, count) in enumerate(sampled):
        limits = VideoLimits(fps=1.0, min_frames=count, max_frames=count)
        ours = sample_frames(total, float(total), limits, 2)
        # For some lengths the float range of theirs ends one late, with a frame that is not there.
        wanted = theirs[f"frames{number}"]
        assert len(wanted) == count or wanted[count:].tolist() == [total]
        np.testing.assert_array_equal(ours, wanted[:count], err_msg=f"{total} {count}")

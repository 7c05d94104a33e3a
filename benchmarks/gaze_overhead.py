"""What Gaze adds: FLOPs of ranking regions and of context tokens, to those of dense attention to the same pictures.

Counted by `rave_jax/evaluation/accounting.py` for one text query behind a picture or video: no times. A descriptor of
a region of m tokens is a product where its keys are 2 m, so ranking by means is 1 / (2 m) of dense attention, by bounds
twice that, and c context tokens behind each frame of n are c / n.

    python benchmarks/gaze_overhead.py [--json FILE]
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from estimates import ratio

from rave_jax.attention import Gaze
from rave_jax.attention.gaze.descriptors import DescriptorName
from rave_jax.batch import Kind, TokenInfo
from rave_jax.data.layout import lay_out
from rave_jax.data.patches import empty_patches
from rave_jax.data.sample import Example
from rave_jax.evaluation.accounting import account
from rave_jax.families.config import TextConfig
from rave_jax.layout import ContextTokens, FixedRegions
from rave_jax.models.config import ModelOptions

AIM = 0.1
DESCRIPTORS: tuple[DescriptorName, ...] = ("mean", "min_max")
CONTEXT = 4
"""Context tokens behind each picture or frame."""
TEXT = TextConfig(num_layers=28, num_heads=28, num_kv_heads=4, head_dim=128, hidden_size=3584)
"""Heads and layers of Qwen2.5-VL 7B: ratios are the same for any."""


class Case(NamedTuple):
    """Frames of visual tokens, and regions over them."""

    name: str
    grid: tuple[int, int, int]
    side: int


CASES = (
    Case("8 frames of 24 x 24, regions of 6 x 6", (8, 24, 24), 6),
    Case("64 frames of 16 x 20, regions of 6 x 6", (64, 16, 20), 6),
    Case("64 frames of 12 x 12, regions of 3 x 3", (64, 12, 12), 3),
    Case("a picture of 32 x 32, regions of 6 x 6", (1, 32, 32), 6),
    Case("configs/quickstart_gaze.py, a picture of 8 x 8, regions of 2 x 2", (1, 8, 8), 2),
)


def question(grid: tuple[int, int, int], options: ModelOptions) -> TokenInfo:
    """Codes of a picture or video and one text token behind it."""
    frames, height, width = grid
    n = frames * height * width
    codes: dict[str, Any] = {name: np.zeros(n + 1, np.int32) for name in TokenInfo._fields}
    frame, row, col = (x.ravel() for x in np.indices(grid))
    visual = {"kind": Kind.VISUAL, "image": 1, "frame": frame, "row": row, "col": col}
    visual |= {"grid_t": frames, "grid_h": height, "grid_w": width}
    for name, values in visual.items():
        codes[name][:n] = values
    codes["kind"][n], codes["document"][:], codes["offset"][:] = Kind.TEXT, 1, np.arange(n + 1)
    zero = np.zeros(n + 1, np.int32)
    positions = np.tile(np.arange(n + 1, dtype=np.int32), (3, 1))
    info, weights = TokenInfo(**codes), zero.astype(np.float32)
    example = Example(zero, weights, info, positions, zero, empty_patches((0,), 0))
    return lay_out(example, options.layout).info


def rows() -> Iterator[dict[str, Any]]:
    """A row for each layout and kind of descriptor."""
    for name, grid, side in CASES:
        for descriptor in DESCRIPTORS:
            gaze = Gaze(FixedRegions(side, side), max_regions=1024, top_k=0.25, descriptor=descriptor)
            options = ModelOptions(mechanisms=(gaze,), context=ContextTokens(CONTEXT))
            found = account(question(grid, options), TEXT, options)
            assert found is not None
            parts = {"routing": found.routing, "context": found.context}
            more = {part: round(flops / found.dense_attention, 4) for part, flops in parts.items()}
            what = f"FLOPs of routing by {descriptor} and of {CONTEXT} context tokens a frame to dense attention"
            yield ratio(f"{what}, {name}", "any", sum(parts.values()) / found.dense_attention, AIM, more)


def main() -> None:
    """Count and print; with --json also write the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the rows there")
    target = parser.parse_args().json
    found = list(rows())
    if target:
        target.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()

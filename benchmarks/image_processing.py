"""Our image processing against transformers' `Qwen2VLImageProcessorPil`, the same pictures in one run.

Each round times one call of ours and one of theirs, so that a machine that slows down slows both; the ratio is the
median over rounds of theirs / ours in processor time of one thread, above 1 when ours is faster. Theirs gives floats
ready for the tower of transformers; ours gives bytes in the order our tower reads, and the tower scales them.

    python benchmarks/image_processing.py [--json FILE] [--rounds 15]
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from rave_jax.data.images import cut_image
from rave_jax.families.qwen2_5_vl.presets import qwen2_5_vl_7b
from rave_jax.families.shared.grids.pictures import Pictures

RULES = Pictures(qwen2_5_vl_7b())
SIZES = ((84, 84), (224, 224), (480, 640), (1080, 1920))
AIM = 1.0


def picture(height: int, width: int) -> Image.Image:
    """A smooth picture with some noise, as photographs have."""
    rng = np.random.default_rng(0)
    rows, cols = np.mgrid[0:height, 0:width]
    base = np.stack([rows * 255 / height, cols * 255 / width, (rows + cols) % 256], -1)
    return Image.fromarray(np.clip(base + rng.normal(0, 8, base.shape), 0, 255).astype(np.uint8))


def seconds(call: Callable[[], Any], repeats: int) -> float:
    """Processor time of `repeats` calls."""
    start = time.process_time()
    for _ in range(repeats):
        call()
    return time.process_time() - start


def measure(height: int, width: int, rounds: int) -> float:
    """Median over rounds of their time over ours."""
    image = picture(height, width)
    theirs = Qwen2VLImageProcessorPil(size={"shortest_edge": RULES.min_pixels, "longest_edge": RULES.max_pixels})

    def one() -> Any:
        return cut_image(image, RULES)

    def other() -> Any:
        return theirs(images=[image])

    repeats = max(1, 250_000 // (height * width))
    one(), other()
    return statistics.median(seconds(other, repeats) / seconds(one, repeats) for _ in range(rounds))


def main() -> None:
    """Measure and print; with --json also write the rows."""
    parser = argparse.ArgumentParser(description="Our image processing against transformers'.")
    parser.add_argument("--json", type=Path, help="write the rows there")
    parser.add_argument("--rounds", type=int, default=15, help="rounds of one call each")
    args = parser.parse_args()
    where = f"one CPU core ({platform.machine()})"
    rows = []
    for height, width in SIZES:
        value = round(measure(height, width, args.rounds), 2)
        name = f"image processing, {width} x {height}: speed against transformers"
        rows.append(
            {"name": name, "where": where, "value": value, "unit": "x", "aim": f">= {AIM}", "holds": value >= AIM}
        )
        print(f"{name}: {value} x (aim >= {AIM})")
    if args.json:
        args.json.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()

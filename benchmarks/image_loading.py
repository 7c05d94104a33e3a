"""Our loader against the one of transformers and torch, on the same picture files: images a second of one core.

Both read the same JSON Lines: a picture and a question each. Ours gives rows of a batch (`Pipeline.load`); theirs is a
`torch.utils.data.DataLoader` over the files whose batches the model's own processor makes of conversations, with the
text padded. Each has one thread, and processor time is counted. A round does all files of a kind on our side and then
on theirs; the ratio is the median over rounds of theirs / ours, above 1 when ours is faster. The pictures are made here
(photos have noise, so that files are as large as cameras make them), or they are all of a folder (--images).

transformers resizes with torchvision where that is installed, and with Pillow otherwise or when told so. Both are
measured. Ours gives the very pixels of Pillow's; torchvision's differ from them in some last bits.

    RAVE_JAX_TORCH_PYTHON=/path/to/python-with-torch python benchmarks/image_loading.py [--json FILE] [--rounds 5]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

from image_processing import picture
from small_vlm import TorchSide

from rave_jax.checkpoint.tiny import Tiny, write_tiny_files
from rave_jax.data.config import DataConfig
from rave_jax.data.pipeline import Pipeline
from rave_jax.data.processor import Processor
from rave_jax.data.sources import QaJsonl

KINDS = {
    "JPEG of 640 x 480": (480, 640, "jpg", 16),
    "JPEG of 1280 x 960": (960, 1280, "jpg", 8),
    "JPEG of 4032 x 3024": (3024, 4032, "jpg", 4),
    "PNG of 800 x 600": (600, 800, "png", 8),
}
"""Height, width, ending and number of the pictures of a kind."""
BACKENDS = ("torchvision", "pil")
"""What transformers resizes with."""
Taken = dict[str, list[float]]
"""Seconds of processor time of each round, by side."""
BATCH = 4
MOST_PIXELS = 1280 * 28 * 28
AIM = 1.5


def make_pictures(folder: Path) -> dict[str, list[Path]]:
    """The pictures of each kind."""
    found: dict[str, list[Path]] = {}
    for kind, (height, width, ending, count) in KINDS.items():
        image = picture(height, width)
        for number in range(count):
            path = folder / f"{width}_{number}.{ending}"
            image.rotate(180 * (number % 2)).save(path, quality=90)
            found.setdefault(kind, []).append(path)
    return found


def write_records(path: Path, pictures: list[Path]) -> None:
    """A question for each picture."""
    answer = "A smooth picture with some noise."
    records = ({"image": str(p), "question": "What does the picture show?", "answers": [answer]} for p in pictures)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


class OurSide:
    """Our loader on the files of a kind.

    Attributes:
        patches: of all its pictures.
    """

    def __init__(self, records: Path, processor: Processor, count: int):
        self._steps = -(-count // BATCH)
        source = QaJsonl(str(records))
        config = DataConfig((source,), rows=BATCH, tokens=2048, patches=6144, on_error="fail", cache_mb=0)
        self._pipeline = Pipeline(config, processor)
        self.patches = 0

    def seconds(self) -> float:
        """Processor time of one pass."""
        start = time.process_time()
        batches = [self._pipeline.load(step, 0, BATCH).batch for step in range(self._steps)]
        taken = time.process_time() - start
        self.patches = sum(int((batch.patches.frame > 0).sum()) for batch in batches)
        return taken


def measure(ours: OurSide, theirs: TorchSide, kind: str, rounds: int) -> Taken:
    """Seconds of each side for the files of a kind, round after round."""
    taken: Taken = {name: [] for name in ("ours", *BACKENDS)}
    for number in range(rounds + 1):
        once = {"ours": ours.seconds()} | {name: theirs.seconds(f"{kind}/{name}") for name in BACKENDS}
        for name in once if number else ():  # the first round warms caches up
            taken[name].append(once[name])
    return taken


def results(kind: str, count: int, taken: Taken, where: str) -> list[dict[str, Any]]:
    """Rows of results, one for each way in which transformers resizes."""
    speeds = {name: count / statistics.median(seconds) for name, seconds in taken.items()}
    rows = []
    for name in BACKENDS:
        value = round(statistics.median(t / o for t, o in zip(taken[name], taken["ours"], strict=True)), 2)
        said = f"{speeds['ours']:.1f} images/s of one core to {speeds[name]:.1f}"
        print(f"loading of {kind}, against transformers with {name}: {value} x, {said} (aim >= {AIM})")
        row = {"name": f"loading of {kind}: images/s of one core against transformers ({name}) and torch"}
        rows.append(row | {"where": where, "value": value, "unit": "x", "aim": f">= {AIM}", "holds": value >= AIM})
    return rows


def main() -> None:
    """Measure and print; with --json also write the rows."""
    parser = argparse.ArgumentParser(description="Our loader against transformers' and torch's on the same files.")
    parser.add_argument("--json", type=Path, help="write the rows there")
    parser.add_argument("--images", type=Path, help="take the JPEG and PNG files of this folder")
    parser.add_argument("--rounds", type=int, default=5, help="rounds that are counted")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_tiny_files(folder, Tiny())
        limits = {"min_pixels": 56 * 56, "max_pixels": MOST_PIXELS, "size": None}
        file = folder / "preprocessor_config.json"
        stated = json.loads(file.read_text()) | limits
        file.write_text(json.dumps(stated))
        if args.images is None:
            kinds = make_pictures(folder)
        else:
            files = sorted(path for path in args.images.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg", ".png"))
            if len(files) < BATCH:
                raise SystemExit(f"{args.images}: {len(files)} JPEG and PNG files, expected at least {BATCH}")
            kinds = {f"the pictures of {args.images.name}": files[: len(files) // BATCH * BATCH]}
        processor = Processor.from_hf(folder)
        sides: dict[str, OurSide] = {}
        told: dict[str, Any] = {"batch": BATCH, "files": {}, "patches": {}}
        for number, (kind, pictures) in enumerate(kinds.items()):
            records = folder / f"{number}.jsonl"
            write_records(records, pictures)
            sides[kind] = OurSide(records, processor, len(pictures))
            sides[kind].seconds()
            told["files"][kind], told["patches"][kind] = records.name, sides[kind].patches
        (folder / "loading.json").write_text(json.dumps(told))
        torch = TorchSide("image_loading_torch.py", name, {})
        taken = {kind: measure(sides[kind], torch, kind, args.rounds) for kind in kinds}
        rows = [row for kind in kinds for row in results(kind, len(kinds[kind]), taken[kind], torch.where)]
        if len(kinds) > 1:
            together = {
                name: [sum(times) for times in zip(*(each[name] for each in taken.values()), strict=True)]
                for name in ("ours", *BACKENDS)
            }
            rows += results("all of these", sum(map(len, kinds.values())), together, torch.where)
        torch.close()
    if args.json:
        args.json.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()

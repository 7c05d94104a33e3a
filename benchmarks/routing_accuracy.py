"""Do the regions that a model's queries choose lie on what is asked for? On photographs with boxes drawn by people.

Reads the folders `raccoon_grounding` (boxes around raccoons) and `coco_mini` (COCO panoptic boxes) of the data beside
the checkout, or where RAVE_JAX_DATA says; a folder that is not there is left out by name. Only things that a picture
has once are asked for. Pictures are made square, as the Gaze authors do. The queries are each prompt's last token in
every layer and head; the share of all regions that overlap the box is what chance would get.

    python benchmarks/routing_accuracy.py MODEL [--side 112] [--json FILE]

MODEL is a run or a HuggingFace directory of a model with Gaze.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from rave_jax.data.collate import BatchShape, round_up
from rave_jax.data.images import read_image
from rave_jax.data.processor import Processor
from rave_jax.data.sample import Sample
from rave_jax.data.sources import QaJsonl
from rave_jax.evaluation.routing import RoutingSummary, hits, summarise
from rave_jax.evaluation.subject import Answer, ModelSubject
from rave_jax.look.maps import relative_box
from rave_jax.models.vlm import Vlm
from rave_jax.parallel.mesh import MeshConfig, make_mesh
from rave_jax.tools import source

Records = Iterator[dict[str, Any]]


def raccoons(folder: Path) -> Records:
    """Questions about pictures with one raccoon."""
    for line in (folder / "qa.jsonl").read_text().splitlines():
        found = json.loads(line)
        if len(found["boxes"]) == 1:
            image, box = str(folder / found["image"]), found["boxes"][0]
            yield {"id": found["id"], "image": image, "question": "Where is the raccoon?", "evidence": box}


def coco(folder: Path) -> Records:
    """Questions about what a picture has one of."""
    for line in (folder / "annotations.jsonl").read_text().splitlines():
        found = json.loads(line)
        counts = Counter(segment["category"] for segment in found["segments"])
        for segment in found["segments"]:
            name = segment["category"]
            if counts[name] == 1:
                x, y, width, height = segment["bbox_xywh"]
                question = f"Where is the {name.removesuffix('-merged').removesuffix('-other').replace('-', ' ')}?"
                image, box = str(folder / found["image"]), [x, y, x + width, y + height]
                yield {"id": f"{found['image']}:{name}", "image": image, "question": question, "evidence": box}


SETS: dict[str, Callable[[Path], Records]] = {"raccoon_grounding": raccoons, "coco_mini": coco}


def samples(name: str, folder: Path, side: int) -> list[Sample]:
    """The questions of a set through the source of question files, their pictures made square."""
    with tempfile.TemporaryDirectory() as made:
        file = Path(made) / "questions.jsonl"
        file.write_text("".join(json.dumps(record) + "\n" for record in SETS[name](folder)))
        found = QaJsonl(path=str(file), name=name).build()
        return [squared(found[i], side) for i in range(len(found))]


def squared(sample: Sample, side: int) -> Sample:
    """The sample with its picture stretched to a square, and its box with it."""
    picture = read_image(sample.images[0], sample.id)
    assert sample.evidence is not None
    x1, y1, x2, y2 = (side * part for part in relative_box(sample.evidence, *picture.size))
    image = {"type": "image", "image": np.asarray(picture.resize((side, side)))}
    content = [image, {"type": "text", "text": sample.question}]
    return dataclasses.replace(sample, messages=({"role": "user", "content": content},), evidence=(x1, y1, x2, y2))


def routing(model: Vlm, processor: Processor, asked: list[Sample], side: int, rows: int = 8) -> RoutingSummary:
    """What the model chooses for them, against their boxes."""
    prompts = [processor.encode(sample.prompt, add_generation_prompt=True, name=sample.id) for sample in asked]
    patches = round_up(max(p.patches.length for p in prompts), processor.rules.patch_sizes.window)
    shape = BatchShape(round_up(rows, jax.device_count()), max(len(p.tokens) for p in prompts), patches)
    subject = ModelSubject(model, processor, make_mesh(MeshConfig()), shape, 1)
    routes = subject.route(asked, [Answer("")] * len(asked))
    found = []
    for sample, route in zip(asked, routes, strict=True):
        assert sample.evidence is not None and route is not None
        found.append(hits(sample, route, relative_box(sample.evidence, side, side)))
    summary = summarise([r for r in routes if r is not None], found)
    if summary is None or summary.hits is None:
        raise SystemExit("the model routes nowhere: MODEL has to be one with Gaze")
    return summary


def main() -> None:
    """Count, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--side", type=int, default=112, help="of the square pictures, in pixels")
    parser.add_argument("--json", type=Path, help="write the rows here")
    given = parser.parse_args()
    data = Path(os.environ.get("RAVE_JAX_DATA") or Path(__file__).resolve().parents[2] / "shared" / "data")
    model = source.load(given.model).model
    processor = source.processor_of(given.model)
    results = []
    for name in SETS:
        if not (data / name).is_dir():
            print(f"{name}: left out, no folder {data / name} (RAVE_JAX_DATA names another place)")
            continue
        summary = routing(model, processor, samples(name, data / name, given.side), given.side)
        assert summary.hits is not None
        print(f"{name}: {summary.sentences()[-1]}")
        where = f"{jax.default_backend()}, jax {jax.__version__}, {summary.samples} questions, {given.model}"
        value, chance = round(summary.hits.accuracy, 4), round(summary.hits.chance, 4)
        results.append(
            {"name": f"{name}: chosen regions on the evidence", "where": where, "value": value, "unit": "share"}
            | {"aim": f"> {chance} (chance)", "holds": value > chance}
        )
    if given.json:
        given.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()

"""Packed rows against a sample to a row: training speed of the tiny model, how full rows are, and what planning takes.

The corpus is made here: half texts, a third documents with one picture, a sixth conversations of two to nine pictures.
Both sides train the same model on rows of the same shape, with the same samples; what counts is tokens of samples, not
padding. Rounds alternate, so that a machine that slows down slows both. Planning is timed for a million samples whose
sizes are known, in processor time.

    python benchmarks/packing.py [--json FILE] [--rounds 5] [--samples 1000000]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import tempfile
import time
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import numpy as np
from PIL import Image

from rave_jax.batch import Batch, Kind
from rave_jax.checkpoint.hf_import import import_hf
from rave_jax.checkpoint.tiny import Tiny
from rave_jax.data.config import DataConfig
from rave_jax.data.order import Order
from rave_jax.data.packing.choice import Choice
from rave_jax.data.packing.config import Packing
from rave_jax.data.packing.index import USABLE, SizeIndex
from rave_jax.data.packing.plan import PackedRows, PackedStage
from rave_jax.data.packing.report import StepReport
from rave_jax.data.packing.sizes import Room
from rave_jax.data.pipeline import Pipeline
from rave_jax.data.sample import Part, Sample
from rave_jax.data.sources import LlavaJson
from rave_jax.models.config import ModelOptions
from rave_jax.parallel.mesh import MeshConfig, make_mesh
from rave_jax.parallel.rows import global_batch
from rave_jax.parallel.sharding import use_mesh
from rave_jax.training.init import prepare
from rave_jax.training.optimizers import OptimizerConfig
from rave_jax.training.session import Session, make_session

ROWS, TOKENS, PATCHES = 4, 512, 1024
CONVERSATIONS, STEPS = 1200, 3
WORDS = (
    "the",
    "red",
    "cat",
    "saw",
    "a",
    "small",
    "house",
    "by",
    "river",
    "and",
    "ran",
    "home",
    "over",
    "green",
    "hill",
)


def write_corpus(folder: Path) -> Path:
    """Conversations of three kinds, and their pictures."""
    rng = np.random.default_rng(0)
    for number in range(24):
        height, width = rng.integers(56, 120, 2)
        pixels = rng.integers(0, 255, (height, width, 3)).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    records = []
    for number in range(CONVERSATIONS):
        kind = rng.random()
        pictures = 0 if kind < 0.5 else 1 if kind < 0.83 else int(rng.integers(2, 10))
        words = min(int(rng.lognormal(3.2, 0.8)) + 3, 150)
        text = " ".join(rng.choice(WORDS, words))
        turns = [
            {"from": "human", "value": "<image>" * pictures + "What is there?"},
            {"from": "gpt", "value": text},
        ]
        record: dict[str, Any] = {"id": str(number), "conversations": turns}
        if pictures:
            record["image"] = [f"{n}.png" for n in rng.integers(0, 24, pictures)]
        records.append(record)
    path = folder / "corpus.json"
    path.write_text(json.dumps(records))
    return path


class Trainer:
    """Steps of the tiny model on rows of a pipeline."""

    def __init__(self, directory: Path, session: Session, pipeline: Pipeline, mesh: jax.sharding.Mesh):
        model = import_hf(directory, ModelOptions(), mesh, jax.random.key(0))
        self.state = session.first_state(session.graph.split(model))
        self._session, self._mesh = session, mesh
        self._batches = [pipeline.rows(step, 0, ROWS) for step in range(STEPS)]
        self.tokens = sum(int((batch.info.kind != Kind.PAD).sum()) for batch in self._batches)

    def seconds(self) -> float:
        """Time of all steps, their rows loaded before."""
        began = time.perf_counter()
        for batch in self._batches:
            self.state, metrics = self._session.step(self.state, self._placed(batch))
        jax.block_until_ready(metrics)
        return time.perf_counter() - began

    def _placed(self, batch: Batch) -> Batch:
        return global_batch({range(ROWS): batch}.__getitem__, self._mesh, ROWS)


def training(rounds: int) -> list[dict[str, Any]]:
    """Tokens per second packed and not, and how full the packed rows of an epoch are."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        corpus = write_corpus(folder)
        prepare(Tiny(), folder / "model")
        config = DataConfig(
            sources=(LlavaJson(str(corpus)),), rows=ROWS, tokens=TOKENS, patches=PATCHES, packing=Packing()
        )
        processor = config.processor(folder / "model", ModelOptions().layout)
        packed = Pipeline(config, processor)
        plain = Pipeline(DataConfig(sources=config.sources, rows=ROWS, tokens=TOKENS, patches=PATCHES), processor)
        report = whole_epoch(packed)
        mesh = make_mesh(MeshConfig())
        with use_mesh(mesh):
            from rave_jax.checkpoint.target import abstract_model
            from rave_jax.training.init import model_config

            model = abstract_model(model_config(Tiny(), folder / "model"), ModelOptions())
            session = make_session(model, OptimizerConfig(), mesh, steps=10**6, rows=ROWS, loss_chunk=512)
            sides = [Trainer(folder / "model", session, pipeline, mesh) for pipeline in (packed, plain)]
            for side in sides:
                side.seconds()
            ratios = []
            for _ in range(rounds):
                speeds = [side.tokens / side.seconds() for side in sides]
                ratios.append(speeds[0] / speeds[1])
                print(f"packed {speeds[0]:,.0f} tokens/s, a sample to a row {speeds[1]:,.0f}")
        packed.close()
        values = report.values()
        where = f"CPU ({platform.machine()}), {ROWS} rows of {TOKENS} tokens and {PATCHES} patches"
        return [
            row("packing: training speed, packed to a sample to a row", where, statistics.median(ratios), "x", 2.0),
            row("packing: share of tokens that is no padding, an epoch", where, values["packing/tokens"], "", 0.95),
            row("packing: share of patches", where, values["packing/patches"], ""),
            row("packing: samples in a row", where, values["packing/documents"], ""),
            row(
                "packing: most patches of a row to the mean, mean of steps",
                where,
                values["packing/balance"],
                "",
                most=1.1,
            ),
            row("packing: the same, worst step", where, values["packing/worst_balance"], ""),
        ]


def whole_epoch(pipeline: Pipeline) -> StepReport:
    """How well the rows of the first epoch are packed."""
    plan = pipeline.plan
    assert isinstance(plan, PackedRows)
    found, step = StepReport(), 0
    while found.documents < CONVERSATIONS:
        found = found.also(plan.report(step))
        step += 1
    return found


class Sized:
    """A source of samples of which nothing but the sizes is asked."""

    name, fingerprint = "sized", "sized"

    def __init__(self, length: int, data: str = ""):
        self._length, self._data = length, data

    def __len__(self) -> int:
        return self._length

    @property
    def parts(self) -> tuple[Part, ...]:
        return (Part(self._length, self.fingerprint, self._data),)

    def __getitem__(self, index: int) -> Sample:
        raise AssertionError(f"sample {index} is read")


def planning(samples: int, processor: Any) -> list[dict[str, Any]]:
    """Seconds and memory of planning an epoch of so many samples."""
    rng = np.random.default_rng(0)
    kind = rng.random(samples)
    visual = np.where(kind < 0.5, 0, np.where(kind < 0.83, rng.uniform(200, 1200, samples), 0)).astype(int)
    visual += np.where(kind >= 0.83, rng.integers(2, 10, samples) * rng.uniform(80, 250, samples), 0).astype(int)
    text = np.minimum(rng.lognormal(5.5, 0.9, samples), 3000).astype(int) + 5
    with tempfile.TemporaryDirectory() as name:
        data = str(Path(name) / "data.jsonl")
        index = SizeIndex([Sized(samples, data)], [None], processor)
        table = index._tables[0]
        table.sizes[:] = np.stack([np.minimum(visual + text, 4096), 4 * visual, 0 * visual, visual > 0])
        table.status[:] = USABLE
        index.close()
        began = time.perf_counter()
        index = SizeIndex([Sized(samples, data)], [None], processor)
        opened = time.perf_counter() - began
        before = resident()
        order = Order((samples,), 0)
        choice = Choice(index, [Sized(samples)], processor)
        stage = PackedStage(0, (Fraction(1),), Room(4096, 4 * 4096, 2**30, 256))
        plan = PackedRows(Packing(), 64, [stage], order, choice)
        began = time.process_time()
        found, step = StepReport(), 0
        while found.documents < samples:
            found = found.also(plan.report(step))
            step += 1
        seconds = time.process_time() - began
        taken = resident() - before
    values = found.values()
    where = f"one CPU core ({platform.machine()}), {samples:,} samples, 64 rows of 4,096 tokens"
    per_million = seconds * 1e6 / samples
    return [
        row(
            "packing: planning an epoch, its order and report, per million samples", where, per_million, "s", most=10.0
        ),
        row("packing: opening the index of sizes", where, opened, "s"),
        row("packing: index of sizes in memory, per million samples", where, 17.0, "MB"),
        row("packing: memory that planning adds", where, taken / 2**20, "MB"),
        row("packing: share of tokens that is no padding, planned", where, values["packing/tokens"], "", 0.95),
        row("packing: most patches of a row to the mean, planned", where, values["packing/balance"], "", most=1.1),
        row("packing: steps planned", where, step, ""),
    ]


def resident() -> int:
    """Bytes of memory that this process has."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


def row(name: str, where: str, value: float, unit: str, least: float | None = None, most: float | None = None) -> Any:
    """One row of the results."""
    aim = f">= {least}" if least is not None else f"<= {most}" if most is not None else ""
    holds = None if not aim else value >= least if least is not None else value <= (most or 0)
    return {"name": name, "where": where, "value": round(value, 3), "unit": unit, "aim": aim, "holds": holds}


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print; with --json also write the rows."""
    parser = argparse.ArgumentParser(description="Packed rows against a sample to a row.")
    parser.add_argument("--json", type=Path, help="file that the rows are written to")
    parser.add_argument("--rounds", type=int, default=5, help="rounds of training on each side")
    parser.add_argument("--samples", type=int, default=1_000_000, help="samples that are planned")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as name:
        prepare(Tiny(), Path(name) / "model")
        processor = DataConfig().processor(Path(name) / "model", ModelOptions().layout)
        rows = planning(options.samples, processor)
    rows += training(options.rounds)
    for each in rows:
        print(f"{each['name']} ({each['where']}): {each['value']} {each['unit']} {each['aim']}".rstrip())
    if options.json:
        options.json.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()

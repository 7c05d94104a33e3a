"""Saving and restoring a checkpoint with digests against without, in turn in one run.

Each round saves and restores the same arrays both ways. Three times are compared: what `save` itself holds up the step
for, the whole save until it is on disk, and a restore of parameters and optimizer state. The ratio is the median over
rounds of with / without. Files come from the page cache, so that digests are at their dearest beside reading.

    python benchmarks/checkpoint_digests.py [--json FILE] [--rounds 5] [--megabytes 400]
"""

from __future__ import annotations

import argparse
import contextlib
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Generator
from pathlib import Path
from unittest import mock

import jax
import jax.numpy as jnp

from rave_jax.checkpoint import digests, saved_step
from rave_jax.checkpoint.store import Store, abstract
from rave_jax.parallel.mesh import MeshConfig, make_mesh
from rave_jax.parallel.sharding import replicated

ARRAYS = 8
WHAT = ("the step waits for a save", "a whole save", "a restore")
AIMS = (1.1, None, None)


@contextlib.contextmanager
def without_digests() -> Generator[None]:
    """The store as it would be if it neither wrote nor checked digests."""
    with (
        mock.patch.object(digests, "write", lambda *_: None),
        mock.patch.object(saved_step, "verify", lambda *_: True),
    ):
        yield


def once(folder: Path, parameters: dict, optimizer: dict, targets: tuple[dict, dict]) -> tuple[float, float, float]:
    """Seconds of the three, each begun when the one before is over."""
    with Store(folder, keep=1) as store:
        start = time.perf_counter()
        store.save(1, parameters, optimizer, {})
        held = time.perf_counter()
        store.wait()
        saved = time.perf_counter()
        store.restore(1, *targets)
        return held - start, saved - start, time.perf_counter() - saved


def measure(megabytes: int, rounds: int) -> list[float]:
    """Medians over rounds of with / without."""
    place = replicated(make_mesh(MeshConfig(), jax.devices()[:1]))
    count = megabytes * 10**6 // 4 // ARRAYS // 3
    made = {f"a{n}": jax.device_put(jax.random.normal(jax.random.key(n), (count,)), place) for n in range(ARRAYS)}
    moments = {name: {"mu": jnp.copy(x), "nu": jnp.square(x)} for name, x in made.items()}
    targets = tuple(abstract(tree, jax.tree.map(lambda _: place, tree)) for tree in (made, moments))
    ratios: list[tuple[float, ...]] = []
    for number in range(rounds + 1):
        times = {}
        for digested in (True, False) if number % 2 else (False, True):  # neither is always the first
            way = contextlib.nullcontext() if digested else without_digests()
            with way, tempfile.TemporaryDirectory() as folder:
                times[digested] = once(Path(folder), made, moments, targets)
        if number:  # the first round warms up
            ratios.append(tuple(a / b for a, b in zip(times[True], times[False], strict=True)))
    return [statistics.median(column) for column in zip(*ratios, strict=True)]


def main() -> None:
    """Measure and print; with --json also write the rows."""
    parser = argparse.ArgumentParser(description="Checkpoints with digests against without.")
    parser.add_argument("--json", type=Path, help="write the rows there")
    parser.add_argument("--rounds", type=int, default=5, help="rounds of both ways each")
    parser.add_argument("--megabytes", type=int, default=400, help="parameters and optimizer state together")
    args = parser.parse_args()
    where = f"{jax.devices()[0].device_kind} ({platform.machine()})"
    rows = []
    for what, aim, value in zip(WHAT, AIMS, measure(args.megabytes, args.rounds), strict=True):
        name = f"checkpoint of {args.megabytes} MB with digests against without: {what}"
        holds = None if aim is None else value <= aim
        rows.append({"name": name, "where": where, "value": round(value, 2), "unit": "x", "aim": aim, "holds": holds})
        print(f"{name}: {value:.2f} x" + (f" (aim <= {aim})" if aim else ""))
    if args.json:
        args.json.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

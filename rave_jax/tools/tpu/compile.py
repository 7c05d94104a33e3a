"""Compiles functions for a TPU that is not there, each batch of them in a process of its own.

A compiler that meets something unexpected aborts its process, and libtpu reads its flags once per process. So a
process takes the cases of one chip in turn; when it dies, the case it was at is the one to blame, and the rest goes on
in the next process.
"""

from __future__ import annotations

import dataclasses
import pickle
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rave_jax.plan.libtpu import INSTALL, CompilerUnavailable, available, ending, last_words, start
from rave_jax.tools.tpu import dumps
from rave_jax.tools.tpu.result import Compiled

TOPOLOGIES = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "tpu7x": "tpu7x:2x2x1"}
"""Chip -> the smallest topology that libtpu knows for every one of its versions tried. Programs are for one chip."""

READY = "ready"
"""File that a worker writes when it has found its compiler."""

_WORKER = "rave_jax.tools.tpu.worker"


@dataclasses.dataclass(frozen=True)
class Case:
    """A program to compile.

    Args:
        name: of the case, each one once.
        make: "module:function", importable here. It is called as `function(place, **arguments)`, where
            `place(shape, dtype)` gives an abstract array on the chip, and returns what to jit and its arguments.
        arguments: picklable.
    """

    name: str
    make: str
    arguments: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Job:
    """What a worker reads from its folder."""

    topology: str
    cases: tuple[Case, ...]
    hlo: bool
    dumps: Path
    limit: float


def compile_cases(
    chip: str,
    cases: Sequence[Case],
    *,
    hlo: bool = False,
    cycles: bool = False,
    bundles: bool = False,
    limit: float = 300.0,
) -> dict[str, Compiled]:
    """Compile each case; a case that cannot be compiled has an error as its result.

    Args:
        chip: of `TOPOLOGIES`.
        cases: in this order.
        hlo: keep the text of the optimised program.
        cycles: estimate cycles. Slow for grids of more than some hundred steps.
        bundles: count instruction bundles.
        limit: seconds for a case; one that takes longer is ended and has that as its error.

    Raises:
        ValueError: no such chip, or a name twice.
        CompilerUnavailable: no compiler here.
    """
    if chip not in TOPOLOGIES:
        raise ValueError(f"no chip {chip!r}: one of {', '.join(TOPOLOGIES)}")
    if len({case.name for case in cases}) != len(cases):
        raise ValueError("two cases have one name")
    if not available():
        raise CompilerUnavailable(INSTALL)
    results: dict[str, Compiled] = {}
    left = tuple(cases)
    while left:
        with tempfile.TemporaryDirectory(prefix="rave_jax_tpu_") as name:
            folder = Path(name)
            job = Job(TOPOLOGIES[chip], left, hlo, folder / "dumps", limit)
            args = dumps.flags(job.dumps, cycles=cycles, bundles=bundles)
            done, death = _run(job, folder, args)
        results |= done
        left = tuple(case for case in left if case.name not in results)
        if left:
            results[left[0].name] = Compiled(death)
            left = left[1:]
    return results


def _run(job: Job, folder: Path, flags: str) -> tuple[dict[str, Compiled], str]:
    """What one process got done, and how it ended."""
    job.dumps.mkdir()
    (folder / "job").write_bytes(pickle.dumps(job))
    process = start(_WORKER, [str(folder)], flags)
    _, stderr = process.communicate()
    said = last_words(stderr)
    if not (folder / READY).exists():
        raise CompilerUnavailable(f"libtpu does not start for {job.topology}: {said}")
    done = {}
    for number, case in enumerate(job.cases):
        if (file := folder / f"{number}.result").exists():
            done[case.name] = pickle.loads(file.read_bytes())
    return done, f"the compiling process ended with {ending(process.returncode)}: {said}"

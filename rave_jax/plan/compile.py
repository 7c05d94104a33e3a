"""Compiles steps for TPUs that are not there, each in a process of its own, two at a time."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import pickle
import re
import subprocess
import tempfile
import threading
from collections.abc import Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from rave_jax import config as configs
from rave_jax.config import ConfigError
from rave_jax.families.config import VlmConfig
from rave_jax.plan import libtpu
from rave_jax.plan.chips import Topology
from rave_jax.plan.depth import depths, extrapolated
from rave_jax.plan.result import Step
from rave_jax.plan.worker import JOB, READY, RESULT, Job
from rave_jax.training.config import TrainConfig

AT_ONCE = 2
"""Processes: a compile takes 1 to 3 GB of memory, and most of it runs on one core."""
_TURNS = threading.BoundedSemaphore(AT_ONCE)


@dataclasses.dataclass(frozen=True)
class Wanted:
    """A step to compile.

    Args:
        config: of the run.
        vlm: its model.
        topology: the devices.
        hlo: file to write the compiled module's text to, or None.
        full: compile all layers, where those of fewer would do, and to the end, so that the size of the code is known.
        plain: without the mechanisms.
    """

    config: TrainConfig
    vlm: VlmConfig
    topology: Topology
    hlo: Path | None = None
    full: bool = False
    plain: bool = False


def compile_steps(wanted: Sequence[Wanted]) -> list[Step | Exception]:
    """Compile steps; where one cannot be compiled, what it raised stands in its place.

    Raises:
        CompilerUnavailable: no compiler here.
    """
    if not libtpu.available():
        raise libtpu.CompilerUnavailable(libtpu.INSTALL)

    def attempt(one: Wanted) -> Step | Exception:
        try:
            return compile_step(one)
        except (ConfigError, RuntimeError) as error:
            return error

    with ThreadPoolExecutor(AT_ONCE) as pool:
        return list(pool.map(attempt, wanted))


def compile_all(wanted: Sequence[Wanted]) -> list[Step]:
    """Compile steps, each of which is needed.

    Raises:
        ConfigError, CompilerUnavailable, RuntimeError: what `compile_step` raises for the first that fails.
    """
    with ThreadPoolExecutor(AT_ONCE) as pool:
        return list(pool.map(compile_step, wanted))


def compile_step(wanted: Wanted) -> Step:
    """Compile one step, or where its layers are compiled one by one, two of fewer layers, of which it follows.

    Raises:
        ConfigError: config, mesh and devices do not go together, or there is no such topology.
        CompilerUnavailable: libtpu is not installed, or does not start.
        RuntimeError: the compiler failed on the step; the message has its last words.
    """
    if not libtpu.available():
        raise libtpu.CompilerUnavailable(libtpu.INSTALL)
    two = None if wanted.full or wanted.hlo is not None else depths(wanted.vlm, wanted.config.model)
    if two is None:
        return _compiled(wanted, None)
    with ThreadPoolExecutor(AT_ONCE) as pool:
        few, more = pool.map(lambda layers: _compiled(wanted, layers), two)
    return extrapolated(few, more, two, wanted.vlm.text.num_layers, wanted.topology.chip.usable)


def _compiled(wanted: Wanted, layers: int | None) -> Step:
    with _TURNS, tempfile.TemporaryDirectory(prefix="rave_jax_plan_") as name:
        folder = Path(name)
        hlo = None if wanted.hlo is None else wanted.hlo.absolute()
        job = Job(
            configs.dumps(wanted.config),
            wanted.vlm,
            wanted.topology,
            os.getpid(),
            hlo,
            layers,
            wanted.plain,
            wanted.full,
        )
        (folder / JOB).write_bytes(pickle.dumps(job))
        with _ended_with_us(folder) as process:
            _, stderr = process.communicate()
        if (folder / RESULT).exists():
            result: Step | ConfigError = pickle.loads((folder / RESULT).read_bytes())
            if isinstance(result, ConfigError):
                raise result
            return result
        said = why(libtpu.last_words(stderr))
        if not (folder / READY).exists():
            raise libtpu.CompilerUnavailable(f"libtpu does not start for {wanted.topology}: {said}")
        raise RuntimeError(
            f"the compiler of TPUs could not compile the step for {wanted.topology}; its process ended with "
            f"{libtpu.ending(process.returncode)}: {said}"
        )


def why(words: str) -> str:
    """The line that says why a process ended: that of an exception, if there is one, or the last.

    Args:
        words: the end of what it wrote.
    """
    lines = [line for line in words.splitlines() if line.strip()]
    raised = [line for line in lines if re.match(r"[\w.]*(Error|Exception)\b", line)]
    return (raised or lines or ["it said nothing"])[-1]


@contextlib.contextmanager
def _ended_with_us(folder: Path) -> Generator[subprocess.Popen[str]]:
    process = libtpu.start("rave_jax.plan.worker", [str(folder)])
    try:
        yield process
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()

"""The process in which `compile_cases` compiles: `python -m rave_jax.tools.tpu.worker FOLDER`."""

from __future__ import annotations

import faulthandler
import importlib
import pickle
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, SingleDeviceSharding, use_abstract_mesh

from rave_jax.tools.tpu import dumps
from rave_jax.tools.tpu.compile import READY, Case, Job
from rave_jax.tools.tpu.result import Compiled, Memory


def compiled(case: Case, device: Any, hlo: bool, folder: Path) -> Compiled:
    """The result of one case; a failure is a result too."""
    module, function = case.make.split(":")
    sharding = SingleDeviceSharding(device)

    def place(shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    start = time.perf_counter()
    try:
        make = getattr(importlib.import_module(module), function)
        # Lowering a kernel may ask which chip it is for; without a mesh it would look at the CPU it runs on.
        with use_abstract_mesh(Mesh(np.array([device]), ("chip",)).abstract_mesh):
            call, args = make(place, **case.arguments)
            program = jax.jit(call).lower(*args).compile()
        seconds = time.perf_counter() - start
        stats: Any = program.memory_analysis()  # None for some backends, not for this one
        memory = Memory(
            stats.argument_size_in_bytes,
            stats.output_size_in_bytes,
            stats.temp_size_in_bytes,
            stats.peak_memory_in_bytes,
        )
        text = program.as_text() if hlo else None
        return Compiled(None, seconds, memory, text or "", dumps.read_cycles(folder), dumps.read_bundles(folder))
    except Exception as error:  # whatever a kernel or the compiler raises is the result
        return Compiled(f"{type(error).__name__}: {error}", time.perf_counter() - start)


def results(job: Job, device: Any) -> Iterator[Compiled]:
    """Each case in turn. One that takes longer than the limit ends the process."""
    for case in job.cases:
        for file in job.dumps.iterdir():
            file.unlink()
        faulthandler.dump_traceback_later(job.limit, exit=True)
        yield compiled(case, device, job.hlo, job.dumps)
        faulthandler.cancel_dump_traceback_later()


def main(folder: Path) -> None:
    """Compile the job that lies in `folder`; each result is there as soon as it is known."""
    job: Job = pickle.loads((folder / "job").read_bytes())
    device = topologies.get_topology_desc(platform="tpu", topology_name=job.topology).devices[0]
    (folder / READY).touch()
    for number, result in enumerate(results(job, device)):
        part = folder / "part"
        part.write_bytes(pickle.dumps(result))
        part.rename(folder / f"{number}.result")


if __name__ == "__main__":
    main(Path(sys.argv[1]))

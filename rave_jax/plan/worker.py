"""The process in which a step is compiled: `python -m rave_jax.plan.worker FOLDER`.

The compiler of TPUs ends its process where it meets what it does not expect, so that it never runs in ours.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import os
import pickle
import re
import sys
import threading
import time
from pathlib import Path
from typing import Any

import jax
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding

from rave_jax import config as configs
from rave_jax.config import ConfigError
from rave_jax.families.config import VlmConfig
from rave_jax.parallel.mesh import make_mesh, mesh_line
from rave_jax.plan import chips, hbm, hlo
from rave_jax.plan.assigned import dump_flags, until_assigned
from rave_jax.plan.chips import Topology
from rave_jax.plan.collectives import Collective, collectives_of, traffic
from rave_jax.plan.depth import shortened
from rave_jax.plan.flops import step_flops
from rave_jax.plan.plain import without_mechanisms
from rave_jax.plan.program import Program, train_program
from rave_jax.plan.result import Hbm, Moved, Placed, Step
from rave_jax.training.config import TrainConfig
from rave_jax.training.state import HOST

READY, JOB, RESULT, DUMPS = "ready", "job", "result", "dumps"
_WANTED = re.compile(r"HBM.*?\(?([\d.]+)([KMGT]?)\)? exceeds|Used ([\d.]+)([KMGT]?) of [\d.]+[KMGT]? hbm", re.DOTALL)
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclasses.dataclass(frozen=True)
class Job:
    """What to compile.

    Args:
        config: of the run, as JSON.
        vlm: its model.
        topology: the devices.
        parent: process that waits for the step.
        hlo: file to write the compiled module's text to, or None.
        layers: compile so many of the decoder's, the first; None: all. Parameters and FLOPs are of all anyway.
        plain: without the mechanisms.
        to_the_end: make code of the step too, after which the size of the code is known.
    """

    config: str
    vlm: VlmConfig
    topology: Topology
    parent: int
    hlo: Path | None = None
    layers: int | None = None
    plain: bool = False
    to_the_end: bool = False


def compiled(job: Job, devices: list[jax.Device], dumps: Path) -> Step:
    """Compile a step and read what it needs and moves.

    Args:
        job: what to compile.
        devices: of its topology.
        dumps: folder to which the compiler writes, by the flags of this process.

    Raises:
        ConfigError: config, mesh and devices do not go together.
        RuntimeError: the compiler refuses the step for another reason than its size.
    """
    start = time.perf_counter()
    said = _Lines()
    logging.getLogger("rave_jax.kernels").addHandler(said)
    logging.getLogger("rave_jax.kernels").setLevel(logging.INFO)
    config = configs.loads(TrainConfig, job.config, where="config")
    if job.plain:
        config = without_mechanisms(config, job.vlm)
    mesh = make_mesh(config.mesh, devices)
    program = train_program(config, job.vlm, mesh)
    session = program.session
    trained = {name: not group.frozen for name, group in session.groups.items()}
    parameters = _local(session.state.trained) + _local(session.state.frozen)
    batch = _local(program.batch)
    optimizer = _local(session.state) - parameters
    step = Step(
        fits=False,
        hbm=Hbm(parameters, optimizer, batch, 0, 0, 0, host=_local(session.state, HOST)),
        seconds=0.0,
        mesh=mesh_line(config.mesh, devices),
        placed=tuple(_placed(program)),
        flops=step_flops(config, job.vlm, session.graph, trained),
        devices=len(devices),
        backends=(),
    )
    if job.layers is not None:
        program = train_program(config, shortened(job.vlm, job.layers), mesh)
    arguments = _local(program.session.state) + _local(program.batch)
    lowered = program.lowered
    step = dataclasses.replace(step, backends=tuple(dict.fromkeys(said.lines)))

    def ended(temporaries: int, code: int, **more: Any) -> Step:
        hbm = dataclasses.replace(step.hbm, temporaries=max(0, temporaries), code=code)
        peak = parameters + optimizer + batch + hbm.temporaries + code
        seconds = time.perf_counter() - start
        return dataclasses.replace(step, hbm=dataclasses.replace(hbm, peak=peak), seconds=seconds, **more)

    try:
        executable = lowered.compile() if job.to_the_end else None
        assigned = until_assigned(lowered.compile if executable is None else lambda: None, dumps)
    except jax.errors.JaxRuntimeError as error:
        peak = wanted_bytes(str(error))
        if peak is None:
            raise
        return ended(peak - arguments, 0)
    if job.hlo is not None:
        job.hlo.write_text(assigned.text)
    module = hlo.read(assigned.text)
    done = ended(
        assigned.hbm - arguments,
        0 if executable is None else executable.memory_analysis().generated_code_size_in_bytes,
        moved=tuple(_moved(collectives_of(module, dict(mesh.shape), _slices(mesh)), mesh, job.topology)),
        hbm_traffic=float(hbm.hbm_bytes(module)),
        host_traffic=float(hbm.host_bytes(module)),
        uncounted=tuple(module.uncounted),
    )
    waiting = dataclasses.replace(done.hbm, host=max(done.hbm.host, assigned.host))
    return dataclasses.replace(done, hbm=waiting, fits=waiting.peak <= job.topology.chip.usable)


def wanted_bytes(said: str) -> int | None:
    """Bytes of HBM that a step wants which the compiler refuses for its size; None where it refuses for another reason.

    Args:
        said: by the compiler.
    """
    found = _WANTED.search(said) if "RESOURCE_EXHAUSTED" in said else None
    if found is None:
        return None
    number, unit = (found[1], found[2]) if found[1] else (found[3], found[4])
    return int(float(number) * _UNITS[unit])


class _Lines(logging.Handler):
    """Keeps what is logged."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def _local(tree: Any, memory: str | None = None) -> int:
    """Bytes of the arrays of a tree on one device, or of its share of another memory."""
    arrays = [x for x in jax.tree.leaves(tree) if (x.sharding.memory_kind == HOST) == (memory == HOST)]
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in arrays)


def _placed(program: Program) -> list[Placed]:
    session = program.session
    values = session.state.trained | session.state.frozen
    alike: dict[tuple[str, str, str], list[str]] = {}
    for name, value in values.items():
        key = session.groups[name].name, _axes(value), "frozen" if session.groups[name].frozen else "trained"
        alike.setdefault(key, []).append(name)
    rows = []
    for (group, axes, state), names in alike.items():
        count = {name: math.prod(values[name].shape) for name in names}
        held = sum(_local(values[name]) for name in names)
        rows.append(
            Placed(group, axes, state, len(names), sum(count.values()), held, max(count, key=count.__getitem__))
        )
    return sorted(rows, key=lambda row: row.bytes, reverse=True)


def _axes(value: Any) -> str:
    sharding = value.sharding
    assert isinstance(sharding, NamedSharding)
    parts = [" x ".join(part) if isinstance(part, tuple) else part for part in sharding.spec if part]
    return ", ".join(parts) or "whole on each chip"


def _slices(mesh: Mesh) -> list[int]:
    """Of each device, in the order of the mesh."""
    return [getattr(device, "slice_index", 0) or 0 for device in mesh.devices.flat]


def _moved(collectives: list[Collective], mesh: Mesh, topology: Topology) -> list[Moved]:
    devices = list(mesh.devices.flat)
    ways: dict[Any, tuple[int, int]] = {}
    for one in collectives:
        key = one.kind, one.axes, one.members, one.asynchronous
        for group in one.groups[:1]:
            members = [devices[number] for number in group]
            slices = len({getattr(device, "slice_index", 0) or 0 for device in members})
            # Chips of a group that stand in one slice: the links of the others are alike.
            first = [d.coords for d in members if getattr(d, "slice_index", 0) == getattr(members[0], "slice_index", 0)]
            usable = max(1, chips.links(first, topology.shape))
            known = ways.get(key, (0, 0))
            ways[key] = max(known[0], usable), max(known[1], slices)
    return [Moved(row, *ways[row.kind, row.axes, row.members, row.asynchronous]) for row in traffic(collectives)]


def _end_with(parent: int) -> None:
    """End this process when its parent is gone: nobody waits for the step, and a compile may take minutes."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def main(folder: Path) -> None:
    """Compile the job that lies in `folder`, and leave the step, or the error, beside it."""
    job: Job = pickle.loads((folder / JOB).read_bytes())
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {dump_flags(folder / DUMPS, 'step')}"
    threading.Thread(target=_end_with, args=(job.parent,), daemon=True).start()
    several = {"num_slices": job.topology.slices} if job.topology.slices > 1 else {}
    try:
        described = topologies.get_topology_desc(platform="tpu", topology_name=job.topology.name, **several)
    except Exception as error:  # whatever libtpu says of a shape that it does not know
        result: Step | ConfigError = ConfigError(f"--topology is {job.topology.name!r}, which libtpu refuses: {error}")
        (folder / RESULT).write_bytes(pickle.dumps(result))
        return
    (folder / READY).touch()
    try:
        result = compiled(job, list(described.devices), folder / DUMPS)
    except ConfigError as error:
        result = error
    (folder / RESULT).write_bytes(pickle.dumps(result))
    os._exit(0)  # a compile that goes on is not waited for


if __name__ == "__main__":
    main(Path(sys.argv[1]))

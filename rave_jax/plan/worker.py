"""The process in which a step is compiled: `python -m rave_jax.plan.worker FOLDER`.

The compiler of TPUs ends its process where it meets what it does not expect, so that it never runs in ours.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import pickle
import re
import sys
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
from rave_jax.plan.chips import Topology
from rave_jax.plan.collectives import Collective, collectives_of, traffic
from rave_jax.plan.flops import step_flops
from rave_jax.plan.program import Program, train_program
from rave_jax.plan.result import Hbm, Moved, Placed, Step
from rave_jax.training.config import TrainConfig

READY, JOB, RESULT = "ready", "job", "result"
_WANTED = re.compile(r"Used ([\d.]+)([KMGT]?) of ([\d.]+)([KMGT]?) hbm", re.IGNORECASE)
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclasses.dataclass(frozen=True)
class Job:
    """What to compile.

    Args:
        config: of the run, as JSON.
        vlm: its model.
        topology: the devices.
        hlo: file to write the compiled module's text to, or None.
    """

    config: str
    vlm: VlmConfig
    topology: Topology
    hlo: Path | None = None


def compiled(job: Job, devices: list[jax.Device]) -> Step:
    """Compile a step and read what it needs and moves.

    Raises:
        ConfigError: config, mesh and devices do not go together.
        RuntimeError: the compiler refuses the step for another reason than its size.
    """
    start = time.perf_counter()
    said = _Lines()
    logging.getLogger("rave_jax.kernels").addHandler(said)
    logging.getLogger("rave_jax.kernels").setLevel(logging.INFO)
    config = configs.loads(TrainConfig, job.config, where="config")
    mesh = make_mesh(config.mesh, devices)
    program = train_program(config, job.vlm, mesh)
    session = program.session
    trained = {name: not group.frozen for name, group in session.groups.items()}
    parameters = _local(session.state.trained) + _local(session.state.frozen)
    batch = _local(program.batch)
    arguments = _local(session.state) + batch
    step = Step(
        fits=False,
        hbm=Hbm(parameters, arguments - parameters - batch, batch, 0, 0, 0),
        seconds=0.0,
        mesh=mesh_line(config.mesh, devices),
        placed=tuple(_placed(program)),
        flops=step_flops(config, job.vlm, session.graph, trained),
        devices=len(devices),
        backends=tuple(dict.fromkeys(said.lines)),
    )
    try:
        executable = program.lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        wanted = _WANTED.search(str(error))
        if wanted is None:
            raise
        peak = int(float(wanted[1]) * _UNITS[wanted[2].upper()])
        wants = dataclasses.replace(step.hbm, peak=peak, temporaries=max(0, peak - arguments))
        return dataclasses.replace(step, hbm=wants, seconds=time.perf_counter() - start)
    stats = executable.memory_analysis()
    text = executable.as_text()
    if job.hlo is not None:
        job.hlo.write_text(text)
    module = hlo.read(text)
    code, peak = stats.generated_code_size_in_bytes, stats.peak_memory_in_bytes
    return dataclasses.replace(
        step,
        # Donated arguments are outputs too, and the compiler does not count the program's own text into the peak.
        fits=peak + code <= job.topology.chip.hbm,
        hbm=dataclasses.replace(step.hbm, temporaries=max(0, peak - arguments), code=code, peak=peak + code),
        seconds=time.perf_counter() - start,
        moved=tuple(_moved(collectives_of(module, dict(mesh.shape)), mesh, job.topology)),
        hbm_traffic=float(hbm.hbm_bytes(module)),
        uncounted=tuple(module.uncounted),
    )


class _Lines(logging.Handler):
    """Keeps what is logged."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def _local(tree: Any) -> int:
    """Bytes of the arrays of a tree on one device."""
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))


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


def main(folder: Path) -> None:
    """Compile the job that lies in `folder`, and leave the step, or the error, beside it."""
    job: Job = pickle.loads((folder / JOB).read_bytes())
    several = {"num_slices": job.topology.slices} if job.topology.slices > 1 else {}
    try:
        described = topologies.get_topology_desc(platform="tpu", topology_name=job.topology.name, **several)
    except Exception as error:  # whatever libtpu says of a shape that it does not know
        result: Step | ConfigError = ConfigError(f"--topology is {job.topology.name!r}, which libtpu refuses: {error}")
        (folder / RESULT).write_bytes(pickle.dumps(result))
        return
    (folder / READY).touch()
    try:
        result = compiled(job, list(described.devices))
    except ConfigError as error:
        result = error
    (folder / RESULT).write_bytes(pickle.dumps(result))


if __name__ == "__main__":
    main(Path(sys.argv[1]))

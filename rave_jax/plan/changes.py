"""Changes of a config that make its step fit: each is compiled before it is named."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from rave_jax.config import ConfigError
from rave_jax.parallel.mesh import MeshConfig, abstract_mesh
from rave_jax.parallel.rows import row_ways
from rave_jax.plan.chips import Topology
from rave_jax.plan.compile import AT_ONCE, Wanted, compile_steps
from rave_jax.plan.result import Hbm, Step
from rave_jax.training.algorithms import AdamW
from rave_jax.training.config import TrainConfig

ENOUGH = 3
MOST_TRIED = 16
OF_A_KIND = 2
"""Sizes of micro-batches, or numbers of rows, that are tried."""


@dataclasses.dataclass(frozen=True)
class Change:
    """A change that fits.

    Args:
        flags: what to add to the command line.
        why: what it gives up.
        step: as it compiled.
    """

    flags: str
    why: str
    step: Step

    def line(self, topology: Topology) -> str:
        """In one line."""
        share = self.step.hbm.peak / topology.chip.hbm
        return f"{self.flags}: {self.step.hbm.peak / 2**30:.2f} GiB of a chip, {share:.0%} ({self.why})"

    def as_json(self) -> dict[str, Any]:
        """As plain values."""
        return {"flags": self.flags, "gives_up": self.why, "hbm_peak_bytes_per_chip": self.step.hbm.peak}


def changes_that_fit(wanted: Wanted, hbm: Hbm) -> list[Change]:
    """The first changes that fit, at most `ENOUGH`, in the order of what they cost a run.

    Args:
        wanted: the step that does not fit.
        hbm: what it wants.
    """
    found: list[Change] = []
    topology = wanted.topology
    room = Room(hbm, topology.chip.usable)
    candidates = list(candidate_changes(wanted.config, topology.devices, topology.slices, room))[:MOST_TRIED]
    for start in range(0, len(candidates), AT_ONCE):
        some = candidates[start : start + AT_ONCE]
        steps = compile_steps([dataclasses.replace(wanted, config=config, hlo=None) for _, _, config in some])
        for (flags, why, _), step in zip(some, steps, strict=True):
            if isinstance(step, Step) and step.fits:
                found.append(Change(flags, why, step))
        if len(found) >= ENOUGH:
            break
    return found[:ENOUGH]


@dataclasses.dataclass(frozen=True)
class Room:
    """What a step that does not fit wants, from which follows what cannot be enough and is not compiled.

    Args:
        hbm: of a chip.
        usable: bytes of it.
    """

    hbm: Hbm
    usable: int

    def may_do(self, parts: int) -> bool:
        """Can it be enough to have so many times fewer rows at one time? Parameters and their state stay."""
        stays = self.hbm.parameters + self.hbm.optimizer
        return stays + (self.hbm.peak - stays) / parts <= self.usable


def candidate_changes(
    config: TrainConfig, devices: int, slices: int = 1, room: Room | None = None
) -> Iterator[tuple[str, str, TrainConfig]]:
    """(flags, what they give up, the changed config), what costs a run least first; then some of them together.

    Args:
        config: that does not fit.
        devices: of the topology.
        slices: of it.
        room: leaves out what cannot be enough; None leaves out nothing.
    """

    def micro_batches(config: TrainConfig, devices: int) -> Iterator[tuple[str, str, TrainConfig]]:
        yield from _accumulation(config, devices, room)

    def smallest_micro_batches(config: TrainConfig, devices: int) -> Iterator[tuple[str, str, TrainConfig]]:
        yield from list(micro_batches(config, devices))[-1:]

    def fewer_rows(config: TrainConfig, devices: int) -> Iterator[tuple[str, str, TrainConfig]]:
        yield from _rows(config, devices, room)

    if slices > 1 and config.mesh.data == 1:
        apart = dataclasses.replace(config.mesh, data=slices, fsdp=-1)
        flags, why = f"--mesh.data {slices} --mesh.fsdp -1", "a copy of parameters and state in every slice"
        yield from _if_it_divides(config, apart, devices, flags, why)
    for make in (_remat, micro_batches, fewer_rows, _mesh, _moments, _offload):
        yield from make(config, devices)
    for together in (
        (_remat, smallest_micro_batches, _smallest_moments),
        (smallest_micro_batches, _smallest_moments, _waiting),
    ):
        changed, flags, whys = config, [], []
        for make in together:
            for one, why, config_with in make(changed, devices):
                changed = config_with
                flags.append(one)
                whys.append(why)
        if len(flags) > 1:
            yield " ".join(flags), "; ".join(whys), changed


def _remat(config: TrainConfig, _: int) -> Iterator[tuple[str, str, TrainConfig]]:
    if config.model.remat not in ("full", "offload"):
        model = dataclasses.replace(config.model, remat="full")
        yield "--model.remat full", "layers are computed again in the backward pass", _with(config, model=model)


def _accumulation(config: TrainConfig, devices: int, room: Room | None) -> Iterator[tuple[str, str, TrainConfig]]:
    for factor in _factors(config, devices, room):
        count = config.optimizer.accumulation * factor
        optimizer = dataclasses.replace(config.optimizer, accumulation=count)
        why = f"{count} micro-batches of {config.data.rows // count} rows, and gradients kept between them"
        yield f"--optimizer.accumulation {count}", why, _with(config, optimizer=optimizer)


def _rows(config: TrainConfig, devices: int, room: Room | None) -> Iterator[tuple[str, str, TrainConfig]]:
    for factor in _factors(config, devices, room):
        fewer = config.data.rows // factor
        data = dataclasses.replace(config.data, rows=fewer)
        why = f"{'half' if factor == 2 else f'1/{factor} of'} the rows in a step"
        yield f"--data.rows {fewer}", why, _with(config, data=data)


def _factors(config: TrainConfig, devices: int, room: Room | None) -> list[int]:
    """By how much the rows of one time may be divided, the smallest that may be enough first."""
    ways = _row_ways(config, devices) * config.optimizer.accumulation
    each = config.data.rows // ways if ways and config.data.rows % ways == 0 else 1
    powers = (2**n for n in range(1, each.bit_length()) if each % 2**n == 0)
    return [factor for factor in powers if room is None or room.may_do(factor)][:OF_A_KIND]


def _moments(config: TrainConfig, _: int) -> Iterator[tuple[str, str, TrainConfig]]:
    algorithm = config.optimizer.algorithm
    if not isinstance(algorithm, AdamW):
        return
    name = "--optimizer.algorithm"
    if algorithm.first_moment == "float32":
        changed = dataclasses.replace(algorithm, first_moment="bfloat16")
        optimizer = dataclasses.replace(config.optimizer, algorithm=changed)
        why = "the mean of gradients has 8 bits of precision"
        yield f"{name}.first-moment bfloat16", why, _with(config, optimizer=optimizer)
    if "8-bit" not in (algorithm.first_moment, algorithm.second_moment):
        changed = dataclasses.replace(algorithm, first_moment="8-bit", second_moment="8-bit")
        optimizer = dataclasses.replace(config.optimizer, algorithm=changed)
        why = "both moments are kept in blocks of 8-bit numbers"
        yield f"{name}.first-moment 8-bit {name}.second-moment 8-bit", why, _with(config, optimizer=optimizer)


def _smallest_moments(config: TrainConfig, devices: int) -> Iterator[tuple[str, str, TrainConfig]]:
    yield from list(_moments(config, devices))[-1:]


def _offload(config: TrainConfig, _: int) -> Iterator[tuple[str, str, TrainConfig]]:
    """What waits in the memory of the host: it comes back through a slow link in every step."""
    if config.model.remat == "full":
        model = dataclasses.replace(config.model, remat="offload")
        why = "inputs of layers go to the host and back in each step"
        yield "--model.remat offload", why, _with(config, model=model)
    if not config.optimizer.offload:
        optimizer = dataclasses.replace(config.optimizer, offload=True)
        why = "optimizer state comes from the host and goes back in each step"
        yield "--optimizer.offload True", why, _with(config, optimizer=optimizer)


def _waiting(config: TrainConfig, _: int) -> Iterator[tuple[str, str, TrainConfig]]:
    """Activations and optimizer state at once."""
    if config.model.remat != "offload" or not config.optimizer.offload:
        model = dataclasses.replace(config.model, remat="offload")
        optimizer = dataclasses.replace(config.optimizer, offload=True)
        why = "inputs of layers and optimizer state wait at the host"
        yield "--model.remat offload --optimizer.offload True", why, _with(config, model=model, optimizer=optimizer)


def _mesh(config: TrainConfig, devices: int) -> Iterator[tuple[str, str, TrainConfig]]:
    """More parameters split, and fewer copies: all devices on fsdp, or twice the tensor ways."""
    mesh = config.mesh
    if mesh.data > 1:
        changed = dataclasses.replace(mesh, data=1, fsdp=-1)
        yield from _if_it_divides(config, changed, devices, "--mesh.data 1 --mesh.fsdp -1", "no copies of parameters")
    tensor = max(mesh.tensor, 1) * 2
    changed = dataclasses.replace(mesh, fsdp=-1, tensor=tensor, data=1)
    flags = f"--mesh.data 1 --mesh.fsdp -1 --mesh.tensor {tensor}"
    yield from _if_it_divides(config, changed, devices, flags, "more sums between chips in every layer")


def _if_it_divides(
    config: TrainConfig, mesh: MeshConfig, devices: int, flags: str, why: str
) -> Iterator[tuple[str, str, TrainConfig]]:
    changed = _with(config, mesh=mesh)
    ways = _row_ways(changed, devices)
    if ways and config.data.rows % (ways * config.optimizer.accumulation) == 0:
        yield flags, why, changed


def _row_ways(config: TrainConfig, devices: int) -> int:
    """Shards of rows, or 0 where the mesh does not fit the devices."""
    try:
        return row_ways(abstract_mesh(config.mesh, devices))
    except ConfigError:
        return 0


def _with(config: TrainConfig, **fields: Any) -> TrainConfig:
    return dataclasses.replace(config, **fields)

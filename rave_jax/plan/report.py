"""What a plan says: as text for a terminal and as JSON, from the same numbers."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from rave_jax.plan.bounds import Bounds, bounds
from rave_jax.plan.chips import Topology
from rave_jax.plan.result import Moved, Step

GIB = 2**30
BOUND = "bounds, not measurements"


@dataclasses.dataclass(frozen=True)
class Plan:
    """A config planned for a topology.

    Args:
        config: its name.
        model: where its shapes are from.
        topology: the devices.
        step: as it was compiled.
        plain: the step without the mechanisms, where it was asked for.
    """

    config: str
    model: str
    topology: Topology
    step: Step
    plain: Step | None = None

    @property
    def bounds(self) -> Bounds | None:
        """None where the step does not fit: nothing was compiled."""
        return bounds(self.step, self.topology) if self.step.moved or self.step.hbm_traffic else None

    @property
    def added(self) -> dict[str, float] | None:
        """What the mechanisms add to the least time of a step, to that without them: overlapped, and with synchronous
        collectives exposed. None where the two were not compiled, or do not fit."""
        found = self.bounds
        if found is None or self.plain is None or not self.plain.hbm_traffic:
            return None
        plain = bounds(self.plain, self.topology)
        return {
            "overlapped": found.overlapped / plain.overlapped - 1,
            "synchronous_exposed": found.exposed / plain.exposed - 1,
        }

    @property
    def share(self) -> float:
        """Of the chip's HBM that the step takes at its fullest."""
        return self.step.hbm.peak / self.topology.chip.hbm


def as_json(plan: Plan) -> dict[str, Any]:
    """The plan as plain values."""
    step, chip, found = plan.step, plan.topology.chip, plan.bounds
    return {
        "config": plan.config,
        "model": plan.model,
        "topology": {"name": plan.topology.name, "slices": plan.topology.slices, "devices": step.devices},
        "mesh": step.mesh,
        "what": BOUND,
        "fits": step.fits,
        "seconds_to_compile": round(step.seconds, 1),
        "hbm_bytes_per_chip": dataclasses.asdict(step.hbm) | {"capacity": chip.hbm, "share": plan.share},
        "flops_per_step": dataclasses.asdict(step.flops),
        "bounds_seconds": None if found is None else _bounds(found),
        "mechanisms_add_to_bounds": plan.added,
        "parameters": [dataclasses.asdict(row) for row in step.placed],
        "collectives": [_moved(row) for row in step.moved],
        "attention": list(step.backends),
        "bytes_to_host_and_back_per_chip": step.host_traffic,
        "layers_compiled": None if step.depths is None else list(step.depths[:2]),
        "loops_counted_once": list(step.uncounted),
    }


def _bounds(found: Bounds) -> dict[str, Any]:
    return dataclasses.asdict(found) | {
        "largest": found.largest,
        "overlapped": found.overlapped,
        "synchronous_exposed": found.exposed,
    }


def _moved(row: Moved) -> dict[str, Any]:
    return {
        "kind": row.traffic.kind,
        "axes": list(row.traffic.axes),
        "members": row.traffic.members,
        "asynchronous": row.traffic.asynchronous,
        "instructions": row.traffic.count,
        "executions": row.traffic.times,
        "bytes_sent_per_chip": row.traffic.sent,
        "bytes_between_slices_per_chip": row.between_slices,
        "links": row.links,
    }


def as_text(plan: Plan) -> str:
    """The plan for a terminal."""
    return "\n".join(_lines(plan))


def _lines(plan: Plan) -> Iterator[str]:
    step, chip = plan.step, plan.topology.chip
    yield f"{plan.config} on {plan.topology}, {step.devices} devices; all that follows are {BOUND}"
    yield f"model: {plan.model}"
    yield step.mesh
    yield ""
    fits = "fits" if step.fits else "DOES NOT FIT"
    yield f"HBM of one chip: {_gib(step.hbm.peak)} at the fullest of {_gib(chip.hbm)}, {plan.share:.0%}: {fits}"
    if step.depths is not None:
        few, more, layers = step.depths
        yield f"  {few} and {more} of {layers} layers were compiled, an estimate of all; --full compiles all"
    elif plan.bounds is None:
        yield "  the compiler refuses the step; what it wanted is the sum"
    for name in ("parameters", "optimizer", "batch", "temporaries", "code"):
        if name == "code" and not step.hbm.code:
            continue
        yield f"  {_WORDS[name]:<44}{_gib(getattr(step.hbm, name)):>12}"
    if step.hbm.host:
        moved = f"{_gib(step.host_traffic)} go there and back in a step" if step.host_traffic else "not compiled"
        yield f"memory of the host, for each chip: {_gib(step.hbm.host)}; {moved}"
    yield ""
    flops = step.flops
    added = flops.mechanisms / flops.model
    yield f"model FLOPs of a step, by formula: {flops.model:.4g}, of which mechanisms {added:.1%}"
    yield f"  recomputed under rematerialisation: {flops.again:.4g}"
    yield ""
    yield from _table(
        ("parameters of group", "split over", "state", "tensors", "parameters", "on one chip", "largest"),
        [
            (p.group, p.axes, p.state, str(p.tensors), f"{p.parameters:,}", _gib(p.bytes), p.largest)
            for p in step.placed
        ],
    )
    yield ""
    yield "attention:"
    yield from (f"  {line}" for line in step.backends or ("no operation with a choice",))
    if (found := plan.bounds) is None:
        return
    yield ""
    yield from _table(
        ("collective", "over", "chips", "overlaps", "instructions", "executions", "sent by a chip", "between slices"),
        [
            (
                row.traffic.kind,
                " x ".join(row.traffic.axes),
                str(row.traffic.members),
                "asynchronous" if row.traffic.asynchronous else "synchronous",
                str(row.traffic.count),
                str(row.traffic.times),
                _gib(row.traffic.sent),
                _gib(row.between_slices) if row.slices > 1 else "-",
            )
            for row in step.moved
        ],
    )
    sent = sum(row.traffic.sent for row in step.moved)
    waited = sum(row.traffic.sent for row in step.moved if not row.traffic.asynchronous)
    yield f"  in all {_gib(sent)}, of which synchronous {_gib(waited)}"
    if step.uncounted:
        yield f"  loops whose trips are not known before the run count once: {', '.join(step.uncounted)}"
    yield ""
    yield "least time of a step, by each bound:"
    for name, seconds in found.parts.items():
        if seconds:
            yield f"  {name:<10}{seconds:>10.4g} s{'   the largest' if name == found.largest else ''}"
    yield f"  if everything overlaps: at least {found.overlapped:.4g} s, MFU at most {found.mfu:.1%}"
    yield (
        f"  if nothing overlaps with synchronous collectives: at least {found.exposed:.4g} s, MFU at most "
        f"{found.mfu_exposed:.1%}"
    )
    if (added := plan.added) is not None:
        yield (
            f"  mechanisms add {added['overlapped']:.1%} to the time without them if everything overlaps, and "
            f"{added['synchronous_exposed']:.1%} if not"
        )


_WORDS = {
    "parameters": "parameters",
    "optimizer": "optimizer state",
    "batch": "batch",
    "temporaries": "activations, gradients, workspace",
    "code": "the program",
}


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> Iterator[str]:
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    for row in (head, *rows):
        yield "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()


def _gib(count: float) -> str:
    if count >= 0.1 * GIB:
        return f"{count / GIB:,.2f} GiB"
    return f"{count / 2**20:,.2f} MiB"

"""How long a step takes at the least, by what bounds it. These are bounds, and no measurement stands behind them.

Compute: what the chips compute, at their peak. HBM: what the module moves, at its bandwidth. Links between chips
(ICI): what collectives send, each over all links that its axes can use, one collective at a time. Network between
slices (DCN): what groups that go over slices must send between them. Host: what goes to the memory of the host and
back, half of it each way. With everything overlapped a step takes at least the longest of the five. What is
synchronous overlaps with nothing, so that it stands beside the computation in the second bound.
"""

from __future__ import annotations

import dataclasses

from rave_jax.plan.chips import Topology
from rave_jax.plan.result import Moved, Step


@dataclasses.dataclass(frozen=True)
class Bounds:
    """Least seconds of a step.

    Args:
        compute, hbm, ici, dcn, host: of each part by itself.
        synchronous: the part of `ici` and `dcn` that is synchronous.
        mfu: largest share of the peak that the model's FLOPs can reach if everything overlaps.
        mfu_exposed: the same if nothing overlaps with what is synchronous.
    """

    compute: float
    hbm: float
    ici: float
    dcn: float
    synchronous: float
    mfu: float
    mfu_exposed: float
    host: float = 0.0

    @property
    def parts(self) -> dict[str, float]:
        """Name -> seconds."""
        return {"compute": self.compute, "HBM": self.hbm, "ICI": self.ici, "DCN": self.dcn, "host": self.host}

    @property
    def largest(self) -> str:
        """What bounds the step if everything overlaps."""
        return max(self.parts, key=self.parts.__getitem__)

    @property
    def overlapped(self) -> float:
        """Seconds, if everything overlaps."""
        return max(self.parts.values())

    @property
    def exposed(self) -> float:
        """Seconds, if nothing overlaps with what is synchronous."""
        return max(max(self.compute, self.hbm) + self.synchronous, self.overlapped)


def bounds(step: Step, topology: Topology) -> Bounds:
    """The bounds of a compiled step."""
    chip = topology.chip
    peak = step.devices * chip.flops
    ici = {kind: sum(_ici(one, topology) for one in step.moved if _is(one, kind)) for kind in (True, False)}
    dcn = {kind: sum(_dcn(one, topology) for one in step.moved if _is(one, kind)) for kind in (True, False)}
    found = Bounds(
        compute=step.flops.executed / peak,
        hbm=step.hbm_traffic / chip.hbm_bandwidth,
        ici=sum(ici.values()),
        dcn=sum(dcn.values()),
        synchronous=ici[False] + dcn[False],
        mfu=0.0,
        mfu_exposed=0.0,
        host=step.host_traffic / 2 / chip.host_bandwidth,
    )
    least = step.flops.model / peak
    return dataclasses.replace(found, mfu=least / found.overlapped, mfu_exposed=least / found.exposed)


def _is(one: Moved, asynchronous: bool) -> bool:
    return one.traffic.asynchronous == asynchronous


def _ici(one: Moved, topology: Topology) -> float:
    return (one.traffic.sent - one.between_slices) / (one.links * topology.chip.link_bandwidth)


def _dcn(one: Moved, topology: Topology) -> float:
    return one.between_slices / topology.chip.dcn_bandwidth

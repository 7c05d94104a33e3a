"""What a step asks of the devices that a run has, for its model FLOPs utilization (MFU)."""

from __future__ import annotations

from rave_jax.families.config import VlmConfig
from rave_jax.plan.chips import CHIPS
from rave_jax.plan.flops import step_flops
from rave_jax.training.config import TrainConfig
from rave_jax.training.meter import Work
from rave_jax.training.session import Session


def work_of(config: TrainConfig, vlm: VlmConfig, session: Session) -> Work | None:
    """FLOPs of a step with full rows, and what the devices of the mesh can do; None for devices that are not in the
    table of chips."""
    devices = session.mesh.devices.flatten()
    chip = next((chip for chip in CHIPS if chip.kind == devices[0].device_kind), None)
    if chip is None:
        return None
    trained = {name: not group.frozen for name, group in session.groups.items()}
    flops = step_flops(config, vlm, session.graph, trained).model
    return Work(flops, chip.flops * len(devices))

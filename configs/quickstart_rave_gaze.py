"""The quickstart with both: Gaze Attention chooses regions, RAVE's learned bias acts on the keys of those chosen."""

import dataclasses

import quickstart
import quickstart_gaze

from rave_jax.training.config import TrainConfig


def get_config() -> TrainConfig:
    """The quickstart of Gaze with the quickstart's mechanism and its parameter group: about four minutes."""
    base, rave = quickstart_gaze.get_config(), quickstart.get_config()
    mechanisms = (*base.model.mechanisms, *rave.model.mechanisms)
    return dataclasses.replace(
        base,
        output_dir="runs/quickstart_rave_gaze",
        model=dataclasses.replace(base.model, mechanisms=mechanisms),
        optimizer=dataclasses.replace(base.optimizer, groups=rave.optimizer.groups),
    )

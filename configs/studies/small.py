"""What the studies of mechanisms share: a model and tasks of which a run takes about a minute of one core."""

from rave_jax.data.config import DataConfig, Stage
from rave_jax.data.synthetic import DigitMosaic, MosaicList, Synthetic
from rave_jax.study.config import Judged, Start
from rave_jax.study.decision import Decision
from rave_jax.training.config import TrainConfig
from rave_jax.training.init import Tiny
from rave_jax.training.optimizers import OptimizerConfig, ParameterGroup

SIZES = Tiny(
    hidden_size=64,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    mlp_size=128,
    vision_hidden_size=64,
    vision_layers=1,
    vision_heads=4,
    vision_mlp_size=128,
    patch_size=14,
    merge_size=1,
    window_size=84,
)
TASK = DigitMosaic(min_grid=3)
LISTED = MosaicList(min_grid=3)
STEPS, LISTS, ADAPTING = 400, 150, 150
"""Steps from scratch; those of them on lists; and steps of an arm that goes on from the learned backbone."""


def mechanisms_group(**more: float | bool | int) -> ParameterGroup:
    """Parameters of mechanisms, which learn faster than the rest and do not decay."""
    return ParameterGroup("gate", r"\.mechanisms\.", **{"learning_rate": 2.0, "weight_decay": 0.0, **more})


def optimizer(*groups: ParameterGroup, rate: float = 2e-3) -> OptimizerConfig:
    """The optimizer of all runs."""
    return OptimizerConfig(
        learning_rate=rate, warmup=20, final_learning_rate=0.05, beta2=0.98, weight_decay=0.05, groups=groups
    )

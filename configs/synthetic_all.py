"""All synthetic tasks, receipts and positions too: a longer run for a machine with an accelerator.

Pictures of 224 pixels; colour mosaics first, listed and asked, then positions and counting, then everything.
"""

from rave_jax.attention import Rave
from rave_jax.data.config import DataConfig, Stage
from rave_jax.data.synthetic import BarChart, Counting, DigitMosaic, MosaicList, PositionMosaic, Receipt, Synthetic
from rave_jax.evaluation.config import Eval, Floor, Grounding, Report
from rave_jax.models.config import ModelOptions
from rave_jax.training.algorithms import AdamW
from rave_jax.training.config import TrainConfig
from rave_jax.training.init import Tiny
from rave_jax.training.optimizers import OptimizerConfig, ParameterGroup

SIZE = 224
EVERYTHING = (
    DigitMosaic(),
    PositionMosaic(),
    BarChart(ask=("colour", "label")),
    Counting(ask=("colour", "kind", "both")),
    Receipt(),
)


def get_config() -> TrainConfig:
    """20,000 steps of 256 rows."""
    return TrainConfig(
        output_dir="runs/synthetic_all",
        init=Tiny(hidden_size=256, num_layers=8, num_heads=8, mlp_size=768, vision_hidden_size=256, vision_layers=4),
        model=ModelOptions(mechanisms=(Rave(),), compute_dtype="bfloat16"),
        data=DataConfig(
            sources=(
                Synthetic(tasks=(MosaicList(), DigitMosaic()), image_size=SIZE),
                Synthetic(tasks=(DigitMosaic(), PositionMosaic(), Counting()), image_size=SIZE),
                Synthetic(tasks=EVERYTHING, image_size=SIZE),
            ),
            stages=(Stage(0, (1, 0, 0)), Stage(1500, (0, 1, 0)), Stage(5000, (0, 0, 1))),
            rows=256,
            tokens=256,
            patches=256,
            cache_mb=0,
            workers=8,
            prefetch=8,
        ),
        optimizer=OptimizerConfig(
            learning_rate=1e-3,
            warmup=500,
            algorithm=AdamW(beta2=0.98),
            weight_decay=0.05,
            groups=(ParameterGroup(name="gate", pattern=r"\.mechanisms\.", learning_rate=5.0, weight_decay=0.0),),
        ),
        steps=20_000,
        final=(
            Eval(
                data=Synthetic(tasks=EVERYTHING, image_size=SIZE, split="heldout"),
                samples=4000,
                tokens=256,
                patches=256,
                floor=Floor(train=Synthetic(tasks=EVERYTHING, image_size=SIZE)),
                grounding=Grounding(),
            ),
            Report(title="All synthetic tasks"),
        ),
    )

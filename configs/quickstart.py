"""The quickstart: a tiny Qwen2.5-VL with RAVE learns to read pictures, on two simulated devices of a CPU.

A curriculum: mosaics of digits on coloured cells to be listed ("red7 blue3"), to learn to read and to find a colour;
the same ones asked ("Which digit is on the red cell?"), to learn to look where the question says; then these questions
mixed with bar charts and counting. docs/results.md says what it scores.
"""

from rave_jax.attention import Rave
from rave_jax.data.config import DataConfig, Stage
from rave_jax.data.synthetic import BarChart, Counting, DigitMosaic, MosaicList, Synthetic
from rave_jax.evaluation.config import Eval, Floor, Grounding, Report
from rave_jax.evaluation.grounding import TaskAim
from rave_jax.models.config import ModelOptions
from rave_jax.training.algorithms import AdamW
from rave_jax.training.config import TrainConfig
from rave_jax.training.init import Tiny
from rave_jax.training.optimizers import OptimizerConfig, ParameterGroup

MIXTURE = (DigitMosaic(), BarChart(), Counting())
GATE_PARAMETERS = r"\.mechanisms\."


def get_config() -> TrainConfig:
    """About four minutes on two cores, evaluation and report included."""
    return TrainConfig(
        output_dir="runs/quickstart",
        init=Tiny(num_heads=8, window_size=84),
        model=ModelOptions(mechanisms=(Rave(rank=8),)),
        data=DataConfig(
            sources=(
                Synthetic(tasks=(MosaicList(min_grid=3),)),
                Synthetic(tasks=(MosaicList(),)),
                Synthetic(tasks=(DigitMosaic(),)),
                Synthetic(tasks=MIXTURE),
            ),
            stages=(Stage(0, (1, 0, 0, 0)), Stage(180, (0, 1, 1, 0)), Stage(360, (0, 0, 0, 1))),
            rows=32,
            tokens=56,
            patches=36,
            cache_mb=0,  # no sample comes twice
        ),
        optimizer=OptimizerConfig(
            learning_rate=1e-3,
            warmup=30,
            final_learning_rate=0.05,
            algorithm=AdamW(beta2=0.98),
            weight_decay=0.05,
            groups=(ParameterGroup(name="gate", pattern=GATE_PARAMETERS, learning_rate=2.0, weight_decay=0.0),),
        ),
        steps=1000,
        simulated_devices=2,
        log_every=20,
        save_every=500,
        final=(
            Eval(
                name="heldout",
                data=Synthetic(tasks=MIXTURE, split="heldout"),
                samples=1200,
                tokens=48,
                patches=36,
                max_new_tokens=4,
                knock_outs=96,
                floor=Floor(train=Synthetic(tasks=MIXTURE)),
                grounding=Grounding(aims=(TaskAim("digit_mosaic", 0.8),)),
            ),
            Report(title="Quickstart"),
        ),
    )

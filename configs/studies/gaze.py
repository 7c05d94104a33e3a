"""Does reading fewer visual tokens cost accuracy? Gaze Attention against dense attention on mosaics of digits.

Every seed trains one dense backbone, the model of `quickstart_gaze.py` without Gaze and without context tokens: a run
on small pictures, whose rate falls before the large ones come, and one on those. Each arm goes on from it for as many
steps at ADAPTING of its rate, since what is trained already is to change its reading, not to start again. The aim is to
lose less than one point.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

from rave_jax.attention import Gaze
from rave_jax.attention.gaze import TopKSchedule
from rave_jax.config import load_file
from rave_jax.data.config import Stage
from rave_jax.evaluation.config import Eval
from rave_jax.models.config import ModelOptions
from rave_jax.study.config import Arm, Judged, Start, Study
from rave_jax.study.decision import Decision
from rave_jax.training.config import TrainConfig

CONFIG = Path(__file__).resolve().parents[1] / "quickstart_gaze.py"
ADAPTING = 0.3
STEPS = 100
DENSE = "dense"


def models(own: ModelOptions) -> dict[str, ModelOptions]:
    """What is compared, by name: the config's own model with what the name says; descriptors are means where it says
    nothing."""
    (gaze,) = (m for m in own.mechanisms if isinstance(m, Gaze))

    def routed(**changes: Any) -> ModelOptions:
        return replace(own, mechanisms=(replace(gaze, **{"descriptor": "mean", **changes}),))

    descriptors = {f"{name}_25": routed(descriptor=name) for name in ("min_max", "spread", "oracle", "random")}
    return {
        DENSE: replace(own, mechanisms=(), context=None),
        "context_only": replace(own, mechanisms=()),
        "gaze_50": routed(top_k=8),
        "gaze_25": routed(),
        "gaze_12": routed(top_k=2),
        "gaze_25_no_context": replace(routed(), context=None),
        "min_max_25_no_context": replace(routed(descriptor="min_max"), context=None),
        **descriptors,
        "gaze_25_at_once": routed(schedule=TopKSchedule(shape="none")),
    }


def phases(config: TrainConfig, dense: ModelOptions) -> tuple[TrainConfig, TrainConfig]:
    """The backbone: the stages on small pictures, then the last one."""
    large = len(config.data.stages) - 1
    steps = config.data.stages[large].step
    small = replace(config.data, stages=config.data.stages[:large])
    questions = replace(config.data, stages=(Stage(0, config.data.stages[large].weights),))
    first = replace(config, model=dense, data=small, steps=steps)
    return first, replace(config, model=dense, data=questions, steps=config.steps - steps)


def get_config() -> Study:
    """Twelve arms at five seeds: about 100 s each on two cores, and two minutes for a backbone."""
    config = load_file(CONFIG)
    compared = models(config.model)
    backbone = phases(config, compared[DENSE])
    rate = ADAPTING * config.optimizer.learning_rate
    optimizer = replace(config.optimizer, learning_rate=rate, warmup=min(config.optimizer.warmup, STEPS // 10))
    recipe = replace(backbone[-1], steps=STEPS, optimizer=optimizer)
    heldout = next(step for step in config.final if isinstance(step, Eval))
    return Study(
        title="Gaze against dense attention",
        about=(
            "Does reading fewer visual tokens cost accuracy? Mosaics of digits of at most 3 x 3 cells on a frame of "
            "8 x 8: a cell is one of 64 visual tokens, which form 16 regions of 2 x 2."
        ),
        output_dir="runs/studies/gaze",
        starts=(Start("backbone", backbone, recipe),),
        arms=tuple(
            Arm(name, "backbone", "" if name == DENSE else DENSE, model=model) for name, model in compared.items()
        ),
        tasks=(Judged("digit_mosaic", heldout.data, 4096, 64, config.data.tokens, config.data.patches, 4, routes=128),),
        decision=Decision(floor=0.6, margin=0.01),
        simulated_devices=config.simulated_devices,
    )

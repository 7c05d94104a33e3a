"""Every mechanism once: trained from a backbone that has learned to read, or put on a model that has learned the tasks.

The first table is of arms that train the whole model with a mechanism, against plain attention trained as long. The
second is of models that have learned the tasks with plain attention and are judged with a mechanism and without. What
a search would find in each model (heads of VHR and of SADS, gammas of ZeroTuning: `rave-jax calibrate`) has one setting
for all seeds here. Left out: VAR, whose sink dimensions are those of one model; DyVTE, whose routers learn from a
procedure of their own; GIFT and PAINT, which are found for a prompt in generation; PINE, which is for several pictures.
"""

from dataclasses import replace

import study_recipe as base

from rave_jax.attention import (
    Arrow,
    Avar,
    BiFormer,
    Cca,
    Croc,
    Decomposed,
    Gaze,
    LogN,
    MechanismConfig,
    Mma,
    Moba,
    Moh,
    Pruning,
    Rave,
    Sads,
    SlidingWindow,
    Sparsifiner,
    Steer,
    Superlinear,
    TextPositions,
    Vhr,
    VisualBias,
    ZeroTuning,
)
from rave_jax.layout import FixedRegions
from rave_jax.study.config import Arm, Start, Study

OFF = "off"
REGIONS = FixedRegions(2, 2)
TRAINED: dict[str, tuple[MechanismConfig, ...]] = {
    "rave": (Rave(rank=8),),
    "rave.tanh": (Rave("tanh", rank=8),),
    "moh.learned": (Moh("learned", balance=0.01),),
    "moh.query_norm": (Moh(),),
    "mma": (Mma(),),
    "croc.visual": (Croc(),),
    "croc.prefix": (Croc("prefix"),),
    "cca": (Cca(),),
    "decomposed": (Decomposed(),),
    "avar": (Avar(),),
    "text_positions": (TextPositions(),),
    "sliding_window": (SlidingWindow(48),),
    "arrow": (Arrow(48),),
    "log_n": (LogN(length=16),),
    "gaze.mean": (Gaze(REGIONS, max_regions=16, top_k=4),),
    "gaze.min_max": (Gaze(REGIONS, max_regions=16, top_k=4, descriptor="min_max"),),
    "biformer": (BiFormer(REGIONS, max_regions=16, top_k=4),),
    "moba": (Moba(block=8, top_k=4),),
    "superlinear": (Superlinear(block=8, spans=3, rank=8),),
    "sparsifiner": (Sparsifiner(block=8, keep=0.25, rank=8, every=2),),
    "pruning": (Pruning(keep=0.5, layers=(0,)),),
}
UNTRAINED: dict[str, tuple[MechanismConfig, ...]] = {
    "visual_bias.up": (VisualBias(0.5),),
    "visual_bias.down": (VisualBias(-0.5),),
    "zero_tuning.up": (ZeroTuning(1.5),),
    "zero_tuning.down": (ZeroTuning(0.6),),
    "vhr": (Vhr(heads=(0, 2, 4, 6)),),
    "sads": (Sads(heads=(7,), layers=(2,)),),
    "log_n": (LogN(length=16),),
    "croc.visual": (Croc(),),
    "gaze.min_max": (Gaze(REGIONS, max_regions=16, top_k=4, descriptor="min_max"),),
    "pruning": (Pruning(keep=0.5, layers=(0,)),),
    "steer.abs": (Steer(image=0.3),),
    "steer.score": (Steer(image=0.3, by="score", rows="all"),),
}


def get_config() -> Study:
    """One training of each at three seeds, and judgements of one trained model for each seed."""
    learned, _ = base.starts()
    trained = Start("tasks", (*learned.phases, learned.recipe), learned.recipe)
    arms = [Arm(f"{OFF}@learned", "learned"), Arm(f"{OFF}@tasks", "tasks", trained=False)]
    groups = (base.group("gate", r"\.mechanisms\."),)
    optimizer = replace(learned.recipe.optimizer, groups=groups)
    for name, mechanisms in TRAINED.items():
        model = replace(base.PLAIN, mechanisms=mechanisms)
        adds = name.startswith(("rave", "moh.learned"))
        arms.append(Arm(f"{name}@learned", "learned", f"{OFF}@learned", model, optimizer if adds else None))
    for name, mechanisms in UNTRAINED.items():
        model = replace(base.PLAIN, mechanisms=mechanisms)
        arms.append(Arm(f"{name}@tasks", "tasks", f"{OFF}@tasks", model, trained=False))
    return Study(
        title="Mechanisms, once each",
        about=(
            "`learned`: the whole model is trained with the mechanism, from a backbone that has learned to read. "
            "`tasks`: a model that has learned the tasks with plain attention is judged with the mechanism."
        ),
        output_dir="runs/studies/mechanisms",
        seeds=(0, 1, 2),
        starts=(learned, trained),
        arms=tuple(arms),
        tasks=base.judged(),
        decision=base.DECISION,
        simulated_devices=1,
    )

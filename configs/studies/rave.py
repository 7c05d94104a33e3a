"""Does a learned query-key bias help, in which form, and more than what it must beat?

Arms are plain attention (`off`), every form of RAVE with every choice of terms, and controls: features after RoPE, text
queries alone, a fixed bias, a random bias that is never trained, a gate that is frozen half-way, and no fewer
parameters than the gate's (1,448 a layer) spent on LoRA (1,664) or on an extra mlp (1,536). Each goes on from one
backbone that has learned to read, and each is trained from scratch.
"""

from dataclasses import replace
from itertools import product
from typing import get_args, get_type_hints

import study_recipe as base

from rave_jax.attention import Rave, VisualBias
from rave_jax.models.config import ExtraMlp, Lora, ModelOptions
from rave_jax.study.config import Arm, Start, Study
from rave_jax.training.optimizers import ParameterGroup

GATE = r"\.mechanisms\."
RANK = 8
BIAS = 0.5
OFF = "off"
Changes = tuple[ModelOptions, tuple[ParameterGroup, ...]]
"""The model, and how what it adds is trained."""


def gated(rave: Rave, frozen: bool = False, freeze_after: int | None = None) -> Changes:
    """A gate, and how it is trained."""
    return replace(base.PLAIN, mechanisms=(rave,)), (base.group("gate", GATE, frozen, freeze_after),)


def arms(steps: int) -> dict[str, Changes]:
    """What is compared, by name, in runs of that many steps."""
    hints = get_type_hints(Rave)
    forms = {
        f"{form}.{terms}": gated(Rave(form, terms, RANK))
        for form, terms in product(get_args(hints["form"]), get_args(hints["terms"]))
    }
    return {
        OFF: (base.PLAIN, ()),
        **forms,
        "post_rope": gated(Rave(rank=RANK, features="post_rope")),
        "text_queries": gated(Rave(rank=RANK, queries="text")),
        "frozen_after": gated(Rave(rank=RANK), freeze_after=steps // 2),
        "random_frozen": gated(Rave(rank=RANK, start="random"), frozen=True),
        "fixed_bias": (replace(base.PLAIN, mechanisms=(VisualBias(BIAS),)), ()),
        "lora": (
            replace(base.PLAIN, lora=Lora(rank=4, alpha=8.0)),
            (base.group("adapter", r"\.adapter\."),),
        ),
        "extra_mlp": (
            replace(base.PLAIN, extra_mlp=ExtraMlp(6)),
            (base.group("extra_mlp", r"\.extra_mlp\."),),
        ),
    }


def of_start(start: Start) -> list[Arm]:
    """The arms of one start, each against `off`."""
    found = []
    for name, (model, groups) in arms(start.recipe.steps).items():
        optimizer = replace(start.recipe.optimizer, groups=groups)
        control = "" if name == OFF else f"{OFF}@{start.name}"
        found.append(Arm(f"{name}@{start.name}", start.name, control, model, optimizer))
    return found


def get_config() -> Study:
    """Two starts with 24 arms each, at five seeds."""
    starts = base.starts()
    return Study(
        title="Does RAVE help?",
        about=(
            "A learned query-key bias on visual keys against plain attention and against what it must beat, in a model "
            "of three layers on pictures made in code."
        ),
        output_dir="runs/studies/rave",
        starts=starts,
        arms=tuple(arm for start in starts for arm in of_start(start)),
        tasks=base.judged(),
        decision=base.DECISION,
        simulated_devices=1,
    )

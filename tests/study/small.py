"""A study of two arms and a control, small enough to run, and rows for it without running anything."""

from __future__ import annotations

import dataclasses
from typing import Any

from rave_jax.attention import VisualBias
from rave_jax.checkpoint.tiny import Tiny
from rave_jax.data.config import DataConfig
from rave_jax.data.synthetic import DigitMosaic, Synthetic
from rave_jax.models.config import ModelOptions
from rave_jax.study.config import Arm, Cell, Judged, Start, Study
from rave_jax.study.decision import Decision
from rave_jax.study.rows import Row, made_with
from rave_jax.training.config import TrainConfig
from rave_jax.training.optimizers import OptimizerConfig

SIZES = Tiny(
    hidden_size=16,
    num_layers=1,
    num_heads=2,
    num_kv_heads=1,
    mlp_size=16,
    vision_hidden_size=16,
    vision_layers=1,
    vision_heads=2,
    vision_mlp_size=16,
)
ONE = Synthetic(tasks=(DigitMosaic(),))
RECIPE = TrainConfig(
    init=SIZES, data=DataConfig(sources=(ONE,), rows=8, tokens=64, patches=36), steps=3, log_every=1, save_every=1
)
BIASED = ModelOptions(mechanisms=(VisualBias(0.5),))


def small(folder: Any = "unused", **changes: Any) -> Study:
    """The study; `arms`, `seeds` and other fields may be given."""
    given = {
        "title": "A small study",
        "about": "Does it run?",
        "output_dir": str(folder),
        "seeds": (0, 1, 2),
        "starts": (
            Start("scratch", (), RECIPE, score_every=2),
            Start("learned", (RECIPE,), dataclasses.replace(RECIPE, steps=2), score_every=2),
        ),
        "arms": (
            Arm("off", "scratch"),
            Arm("biased", "scratch", "off", BIASED),
            Arm("slow", "scratch", "off", optimizer=OptimizerConfig(learning_rate=1e-5)),
            Arm("learned", "learned", trained=False),
            Arm("learned-biased", "learned", "learned", BIASED),
        ),
        "tasks": (
            Judged(
                "mosaic",
                Synthetic(tasks=(DigitMosaic(),), split="heldout"),
                samples=4,
                rows=4,
                tokens=64,
                patches=36,
                routes=2,
            ),
        ),
        "score_samples": 2,
        "decision": Decision(seeds=3),
        "simulated_devices": 0,
    }
    return Study(**given | changes)


def row_of(study: Study, cell: Cell, score: float, **more: Any) -> Row:
    """A row as a run would give it."""
    given = {
        "arm": cell.arm.name,
        "seed": cell.seed,
        "scores": {task.name: score for task in study.tasks},
        "samples": {task.name: task.samples for task in study.tasks},
        "curves": {"loss": [[1.0, 2.0], [3.0, 1.0 + cell.seed]]},
        "parameters": {"all": 1000, "added": 0},
        "seconds": {"training": 1.0},
        "where": "here",
        "made_with": made_with(study, cell),
    }
    return Row(**given | more)

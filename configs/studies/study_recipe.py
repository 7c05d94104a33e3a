"""What the studies of mechanisms share: a small model, a backbone that has learned to read, and tasks.

The model is that of `quickstart_gaze.py`, where a cell of a mosaic is one visual token. It learns to read on mosaics of
three by three cells, first listed and then asked: from questions alone it learns later or never (docs/results.md). That
is the backbone. What is asked of arms is asked on larger pictures.
"""

from dataclasses import replace
from functools import partial
from pathlib import Path

from rave_jax.config import load_file
from rave_jax.data.config import Stage
from rave_jax.data.synthetic import DigitMosaic, Synthetic, SyntheticTask
from rave_jax.models.config import ModelOptions
from rave_jax.study.config import Judged, Start
from rave_jax.study.decision import Decision
from rave_jax.training.config import TrainConfig
from rave_jax.training.optimizers import OptimizerConfig, ParameterGroup

QUICKSTART = load_file(Path(__file__).resolve().parents[1] / "quickstart_gaze.py")
PLAIN = ModelOptions(scan_layers=False)
"""Plain attention; layers apart, which a CPU trains faster."""
LARGE = 128
"""Side of the pictures of tasks in pixels. A visual token is 16 pixels wide."""
TOKENS, PATCHES = 104, 64
LISTS, READING, ADAPTING = 180, 400, 40
"""Steps of the backbone on lists, all of its steps, and those of an arm on the tasks."""
TASKS: tuple[tuple[str, SyntheticTask], ...] = (("mosaic", DigitMosaic(frame=8)),)


def group(name: str, pattern: str, frozen: bool = False, freeze_after: int | None = None) -> ParameterGroup:
    """Parameters beside the backbone's, which learn faster and do not decay."""
    return ParameterGroup(name, pattern, 2.0, 0.0, frozen, freeze_after)


def optimizer(*groups: ParameterGroup, warmup: int = 30) -> OptimizerConfig:
    """The optimizer of all runs."""
    return replace(QUICKSTART.optimizer, warmup=warmup, groups=groups)


def starts() -> tuple[Start, Start]:
    """`learned`: the tasks, from a backbone that has learned to read. `scratch`: both in one run."""
    reading = QUICKSTART.data.sources[:2]
    asked = Synthetic(tasks=tuple(task for _, task in TASKS), image_size=LARGE)
    small = partial(Stage, tokens=50, patches=12)
    data = replace(QUICKSTART.data, sources=reading, stages=(), tokens=50, patches=12)
    backbone = TrainConfig(
        init=QUICKSTART.init,
        model=PLAIN,
        data=replace(data, stages=(Stage(0, (1, 0)), Stage(LISTS, (0, 1)))),
        optimizer=optimizer(),
        steps=READING,
        log_every=20,
    )
    tasks = replace(data, sources=(asked,), tokens=TOKENS, patches=PATCHES)
    both = replace(
        tasks,
        sources=(*reading, asked),
        stages=(small(0, (1, 0, 0)), small(LISTS, (0, 1, 0)), Stage(READING, (0, 0, 1))),
    )
    return (
        Start(
            "learned",
            (backbone,),
            replace(backbone, data=tasks, steps=ADAPTING, optimizer=optimizer(warmup=10)),
            score_every=ADAPTING // 2,
        ),
        Start("scratch", (), replace(backbone, data=both, steps=READING + ADAPTING), score_every=100),
    )


def judged() -> tuple[Judged, ...]:
    """The tasks, held out."""
    return tuple(
        Judged(name, Synthetic(tasks=(task,), image_size=LARGE, split="heldout"), 1024, 64, TOKENS, PATCHES)
        for name, task in TASKS
    )


DECISION = Decision(seeds=3, floor=0.6, ceiling=0.9, margin=0.01)
"""Plain attention has to stand at 60 to 90 %: after 60 steps from the backbone it stood at 88, so arms have 40."""

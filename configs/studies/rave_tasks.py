"""The arms of `rave.py` where one thing among many is asked: scattered shapes, receipts, several pictures, charts.

A backbone that has learned to read mosaics goes on to lists of everything in these pictures, and then to lists and
questions; arms go on from there with questions alone. How hard a task is: the numbers of objects, lines, pictures and
bars below. The steps of the second phase are a guess that no run has confirmed: where plain attention does not stand at
60 to 90 %, the page says that nothing is decided, and they or those numbers have to change.
"""

from dataclasses import replace

import rave
import study_recipe as base

from rave_jax.data.config import Stage
from rave_jax.data.synthetic import Album, BarChart, LongReceipt, Scatter, Synthetic, SyntheticTask
from rave_jax.study.config import Judged, Start, Study

TASKS: dict[str, tuple[SyntheticTask, int]] = {
    "scatter": (Scatter(min_objects=6, max_objects=12, kinds=2, grid=6, size=1.0), 96),
    "receipt": (LongReceipt(min_lines=4, max_lines=8), 128),
    "album": (Album(min_pictures=2, max_pictures=3), 64),
    "chart": (BarChart(), 96),
}
"""What is asked, and the side of its pictures in pixels."""
LISTED = ("scatter", "receipt", "album")
"""Tasks that can also ask for everything there is."""
TOKENS, PATCHES = 112, 48
LISTS, LEARNING, ADAPTING = 300, 900, 100
"""Steps of the second phase on lists, all of its steps, and those of an arm."""


def source(name: str, everything: bool = False) -> Synthetic:
    """The samples of a task, or lists of all that its pictures show."""
    task, size = TASKS[name]
    return Synthetic(tasks=(replace(task, ask="all") if everything else task,), image_size=size)


def judged(name: str) -> Judged:
    """The task, held out."""
    return Judged(name, replace(source(name), split="heldout"), 512, 64, TOKENS, PATCHES)


def learned() -> Start:
    """Reading, then these tasks; arms answer questions."""
    reading, _ = base.starts()
    lists = tuple(source(name, everything=True) for name in LISTED)
    questions = tuple(source(name) for name in TASKS)
    data = replace(reading.recipe.data, sources=(*lists, *questions), tokens=TOKENS, patches=PATCHES)
    listed = Stage(0, (1.0,) * len(lists) + (0.0,) * len(questions))
    stages = (listed, Stage(LISTS, (1.0,) * (len(lists) + len(questions))))
    second = replace(reading.recipe, data=replace(data, stages=stages), steps=LEARNING, optimizer=base.optimizer())
    recipe = replace(reading.recipe, data=replace(data, sources=questions, stages=()), steps=ADAPTING)
    return Start("learned", (*reading.phases, second), recipe, score_every=ADAPTING // 4)


def get_config() -> Study:
    """One start with 24 arms, at five seeds."""
    start = learned()
    return Study(
        title="Does RAVE help to find one thing among many?",
        about="Scattered shapes, receipts, several pictures and charts, from a backbone that has learned these tasks.",
        output_dir="runs/studies/rave_tasks",
        starts=(start,),
        arms=tuple(rave.of_start(start)),
        tasks=tuple(map(judged, TASKS)),
        decision=base.DECISION,
        simulated_devices=1,
    )

"""The study of Gaze: what it compares, and that a cell of its pictures is a token."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from rave_jax.attention import Gaze
from rave_jax.checkpoint.tiny import Tiny, write_tiny
from rave_jax.config import load_file
from rave_jax.data.pipeline import Pipeline
from rave_jax.data.synthetic import DigitMosaic, Synthetic
from rave_jax.evaluation.accounting import account
from rave_jax.evaluation.routing import Cells, cells_of, overlapping
from rave_jax.families.config import TextConfig
from rave_jax.look.maps import relative_box
from rave_jax.study.config import Study
from rave_jax.training.config import TrainConfig

CONFIGS = Path(__file__).resolve().parents[2] / "configs"


@pytest.fixture(scope="module")
def study() -> Study:
    return load_file(CONFIGS / "studies" / "gaze.py")


@pytest.fixture(scope="module")
def config() -> TrainConfig:
    return load_file(CONFIGS / "quickstart_gaze.py")


def test_arms_differ_in_what_their_names_say(study: Study) -> None:
    models = {arm.name: arm.model for arm in study.arms}
    assert all(model is not None for model in models.values())
    routed = {n: next((m for m in o.mechanisms if isinstance(m, Gaze)), None) for n, o in models.items() if o}
    assert [name for name, gaze in routed.items() if gaze is None] == ["dense", "context_only"]
    without = ["dense", "gaze_25_no_context", "min_max_25_no_context"]
    assert [name for name, o in models.items() if o and o.context is None] == without
    shares = {name: gaze.top_k / 16 for name, gaze in routed.items() if gaze is not None}
    assert {name: share for name, share in shares.items() if share != 0.25} == {"gaze_50": 0.5, "gaze_12": 0.125}
    assert {gaze.descriptor for gaze in routed.values() if gaze} == {"mean", "min_max", "spread", "oracle", "random"}
    assert [name for name, gaze in routed.items() if gaze and gaze.schedule.shape == "none"] == ["gaze_25_at_once"]
    runs = {one.arm.name: study.run_of(one, "x") for one in study.cells((), (0,))}
    assert {dataclasses.replace(run, model=runs["dense"].model) for run in runs.values()} == {runs["dense"]}


def test_a_cell_of_the_pictures_is_a_token_and_a_quarter_of_them_is_read(
    study: Study, config: TrainConfig, tmp_path: Path
) -> None:
    assert isinstance(config.init, Tiny)
    processor = config.data.processor(write_tiny(tmp_path / "model", config.init), config.model.layout)
    (task,) = study.tasks
    assert isinstance(task.data, Synthetic) and isinstance(task.data.tasks[0], DigitMosaic)
    source = task.data.build()
    for index in range(20):
        sample = source[index]
        prompt = processor.encode(sample.prompt, add_generation_prompt=True)
        found = cells_of(prompt.info, prompt.shown)
        assert found is not None and sample.evidence is not None
        (cells,) = found
        box = relative_box(sample.evidence, 128, 128)
        apart = Cells(np.arange(64).reshape(8, 8))
        assert overlapping(cells, 16, box).sum() == overlapping(apart, 64, box).sum() == 1
        reading = account(prompt.info, TextConfig(), config.model)
        assert reading is not None and (reading.entries, reading.visual) == (4 * 4 + 4, 64)


def test_the_longest_samples_fit_the_rows(config: TrainConfig, tmp_path: Path) -> None:
    assert isinstance(config.init, Tiny)
    processor = config.data.processor(write_tiny(tmp_path / "model", config.init), config.model.layout)
    pipeline = Pipeline(config.data, processor)
    for stage in config.data.stages:
        (source,) = (s.build() for s, weight in zip(config.data.sources, stage.weights, strict=True) if weight)
        shape = pipeline.shape(stage.step)
        found = [processor.encode(source[i].messages) for i in range(200)]
        assert max(example.patches.length for example in found) <= shape.patches
        assert shape.tokens - 4 <= max(len(example.tokens) for example in found) <= shape.tokens

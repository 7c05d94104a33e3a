"""Every study in configs/studies/: its arms are models that can be built, its controls are fair."""

from __future__ import annotations

import ast
import functools
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import jax
import pytest

from rave_jax.attention import Dyvte, Gift, Paint, Pine, Var
from rave_jax.checkpoint.naming import extra_parameters
from rave_jax.checkpoint.tiny import Tiny, tiny_config, write_tiny_files
from rave_jax.config import load_file
from rave_jax.evaluation.calibration import asked_at
from rave_jax.models.config import ModelOptions
from rave_jax.models.parameters import named_parameters
from rave_jax.models.vlm import Vlm
from rave_jax.parallel.mesh import abstract_mesh
from rave_jax.study.config import Arm, Cell, Study
from rave_jax.training.optimizers import assign_groups
from tests.attention.built_in import BUILT_IN
from tests.contracts.test_configs import lowered_on

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
FILES = sorted(p for p in (CONFIGS / "studies").glob("*.py") if "def get_config(" in p.read_text())


@functools.cache
def study_of(name: str) -> Study:
    return load_file(CONFIGS / "studies" / f"{name}.py")


@functools.cache
def abstract(sizes: Tiny, options: ModelOptions) -> Vlm:
    return jax.eval_shape(lambda key: Vlm(tiny_config(sizes), options, key=key), jax.random.key(0))


def sizes_of(study: Study, arm: Arm) -> Tiny:
    """The model that an arm begins with."""
    start = study.start_of(arm)
    init = (*start.phases, start.recipe)[0].init
    assert isinstance(init, Tiny)
    return init


def added(study: Study, name: str) -> int:
    """Numbers in the parameters that an arm adds."""
    (arm,) = (arm for arm in study.arms if arm.name == name)
    assert arm.model is not None
    model = abstract(sizes_of(study, arm), arm.model)
    return sum(named_parameters(model)[path].size for path in extra_parameters(model))


def test_the_studies_that_the_project_promises_exist() -> None:
    assert {"rave", "rave_tasks", "mechanisms", "gaze"} <= {path.stem for path in FILES}


@pytest.mark.slow
@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_every_arm_is_a_model_whose_groups_match(path: Path) -> None:
    """What a run refuses before its first step: options that do not fit, groups of parameters that match nothing."""
    study = study_of(path.stem)
    for arm in study.arms:
        run = study.run_of(Cell(arm, study.seeds[0]), "before")
        names: Sequence[str] = [*named_parameters(abstract(sizes_of(study, arm), run.model))]
        if arm.trained:
            assign_groups(names, run.optimizer)


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_a_study_says_what_it_asks(path: Path) -> None:
    assert (ast.get_docstring(ast.parse(path.read_text())) or "").strip()
    study = study_of(path.stem)
    assert (
        study.about and len({arm.control for arm in study.arms}) > 1 and study.seeds == tuple(range(len(study.seeds)))
    )


def test_the_study_of_rave_has_every_form_and_its_controls_of_equal_size() -> None:
    study = study_of("rave")
    for start in ("learned", "scratch"):
        names = {arm.name for arm in study.arms if arm.start == start}
        assert len([name for name in names if "." in name]) == 16, "forms x terms"
        controls = ("post_rope", "text_queries", "frozen_after", "random_frozen", "fixed_bias", "lora", "extra_mlp")
        assert {f"{name}@{start}" for name in ("off", *controls)} <= names
        assert {arm.control for arm in study.arms if arm.start == start} == {"", f"off@{start}"}
    gate, lora, mlp = (added(study, f"{name}@learned") for name in ("log_gate.all", "lora", "extra_mlp"))
    assert (gate, lora, mlp) == (3 * 1448, 3 * 1664, 3 * 1536), "never fewer, and as near as whole ranks come"
    assert len(study.seeds) >= 5


def test_the_mechanisms_of_the_study_are_those_of_the_package() -> None:
    study = study_of("mechanisms")
    used = {type(m) for arm in study.arms if arm.model is not None for m in arm.model.mechanisms}
    assert set(BUILT_IN) - used == {Dyvte, Gift, Paint, Pine, Var}, "the study says why these are left out"
    assert {arm.trained for arm in study.arms if arm.start == "tasks"} == {False}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["extra_mlp@scratch", "post_rope@learned"])
def test_a_run_of_a_study_lowers_for_tpus(name: str) -> None:
    study = study_of("rave")
    (cell,) = study.cells((name,), (0,))
    run = replace(study.run_of(cell, "before"), init=sizes_of(study, cell.arm))
    assert lowered_on(run, abstract_mesh(run.mesh, 1, tpu_kind="TPU v5p"))


@pytest.mark.parametrize("name", ["rave", "rave_tasks"])
def test_samples_of_a_study_fit_its_rows(name: str, tmp_path: Path) -> None:
    """Those that arms train on and those that they are asked, of which some nearly fill a row."""
    study = study_of(name)
    (cell,) = study.cells(("off@learned",), (0,))
    write_tiny_files(tmp_path, sizes_of(study, cell.arm))
    runs = [study.phase_of(study.starts[0], len(study.starts[0].phases) - 1, 0, "x"), study.run_of(cell, "x")]
    processor = runs[0].data.processor(tmp_path, runs[0].model.layout)
    for run in runs:
        for source in run.data.sources:
            found = [processor.encode(source.build()[index].messages) for index in range(20)]
            assert max(len(one.tokens) for one in found) <= run.data.tokens, source
            assert max(one.patches.length for one in found) <= run.data.patches, source
    for task in study.tasks:
        asked = study.samples_of(task, 0).build()
        found = [processor.encode(asked[index].messages) for index in range(20)]
        assert max(len(one.tokens) for one in found) <= task.tokens
        assert max(len(asked_at(one, "accuracy")[1]) for one in found) <= task.answer_tokens

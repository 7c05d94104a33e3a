"""A run directory is written when a run can begin, and taken back when it does not."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
from pathlib import Path

import pytest

from rave_jax import config as configs
from rave_jax.checkpoint.hf_import import load_config
from rave_jax.checkpoint.retention import Retention
from rave_jax.config import ConfigError
from rave_jax.data.packing.config import Packing
from rave_jax.evaluation.config import Eval
from rave_jax.training.claim import claimed
from rave_jax.training.config import Extension, KeepBest, TrainConfig
from rave_jax.training.directory import RunDirectory, run_directory
from rave_jax.training.init import FromHF
from rave_jax.training.optimizers import OptimizerConfig

CONFIG = TrainConfig(steps=6)


@pytest.fixture
def config(tmp_path) -> TrainConfig:
    """Of a run that begins from a model directory."""
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "config.json").write_text("{}")
    return dataclasses.replace(CONFIG, init=FromHF(str(tmp_path / "hf")))


@pytest.fixture
def directory(tmp_path) -> RunDirectory:
    return run_directory(tmp_path / "runs" / "one")


def begin(directory: RunDirectory, config: TrainConfig, after_step: int = 0) -> None:
    """Write what a run has before it trains, as if its process were killed then."""
    with claimed(directory, config) as claim:
        claim.write(after_step)


def fail(directory: RunDirectory, config: TrainConfig, after_step: int = 0, leave: str = "") -> None:
    """The same, and an error behind it."""
    with pytest.raises(ZeroDivisionError), claimed(directory, config) as claim:
        claim.write(after_step)
        (directory.checkpoints / leave).mkdir(parents=True, exist_ok=True)
        directory.metrics.touch()
        raise ZeroDivisionError


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_nothing_is_written_before_the_run_can_begin(directory, config):
    with claimed(directory, config) as claim:
        assert not directory.path.parent.exists()
        assert (claim.model / "config.json").is_file()
        claim.write(0)
        assert names(directory.path) == {".lock", "config.json", "model"}
    assert names(directory.path) == {"config.json", "model"}


def test_an_error_about_a_copied_file_names_the_directory_that_was_given(directory, config, tmp_path):
    """The files of a model are copied before they are read; the copy is gone when the message is."""
    says = rf"^{tmp_path / 'hf'}/config\.json: the key 'model_type' is missing"
    with pytest.raises(ConfigError, match=says), claimed(directory, config) as claim:
        load_config(claim.model)


def test_a_start_that_fails_leaves_no_trace(directory, config, tmp_path):
    fail(directory, config)
    assert names(tmp_path) == {"hf"}, "folders above it that it made are gone too"


def test_a_start_that_fails_leaves_what_was_there(directory, config):
    directory.path.mkdir(parents=True)
    (directory.path / "notes.txt").write_text("mine")
    fail(directory, config)
    assert names(directory.path) == {"notes.txt"}


def test_what_a_failed_run_saved_stays(directory, config):
    fail(directory, config, leave="3")
    assert names(directory.path) == {"config.json", "model", "checkpoints", "metrics.jsonl"}
    with pytest.raises(ConfigError, match="holds another run"), claimed(directory, dataclasses.replace(config, seed=1)):
        pass


def test_a_start_that_was_killed_claims_nothing(directory, config):
    begin(directory, config)
    (directory.model / "config.json").write_text('{"of": "another model"}')
    other = dataclasses.replace(config, seed=1, steps=3)
    begin(directory, other)
    assert directory.read_config() == other
    assert json.loads((directory.model / "config.json").read_text()) == {}


def test_a_job_that_comes_too_late_leaves_the_files_of_the_other(directory, config):
    """Both looked before there was a directory; the second is refused, whether the first still runs or not."""
    with contextlib.ExitStack() as running:
        with pytest.raises(ConfigError, match="is in use by another job"), claimed(directory, config) as late:
            running.enter_context(claimed(directory, config)).write(0)
            late.write(0)
        assert names(directory.path) == {".lock", "config.json", "model"}
    shutil.rmtree(directory.path)
    with pytest.raises(ConfigError, match="another job has started in"), claimed(directory, config) as late:
        begin(directory, config)
        late.write(0)
    assert names(directory.path) == {"config.json", "model"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\xff{", "config.json is not UTF-8 text"),
        (b"[" * 100_000, "its brackets are nested too deeply"),
        (None, "config.json cannot be read: it is a named pipe"),
    ],
    ids=["no UTF-8", "brackets", "pipe"],
)
def test_a_damaged_config_is_one_line(directory, config, content, message):
    directory.path.mkdir(parents=True)
    if content is None:
        os.mkfifo(directory.config)
    else:
        directory.config.write_bytes(content)
    with pytest.raises(ConfigError, match=message), claimed(directory, config):
        pass


def test_a_finished_run_is_extended_and_remembers(directory, config):
    begin(directory, config)
    (directory.checkpoints / "6").mkdir(parents=True)
    for steps, after in ((9, 6), (9, 7), (12, 9)):
        begin(directory, dataclasses.replace(config, steps=steps), after)
    assert directory.read_config() == dataclasses.replace(config, steps=12, extended=(Extension(6, 6), Extension(9, 9)))
    with pytest.raises(ConfigError, match="holds a run of 12 steps, and steps is 6"), claimed(directory, config):
        pass


def test_an_extension_that_gets_nowhere_is_taken_back(directory, config):
    begin(directory, config)
    (directory.checkpoints / "6").mkdir(parents=True)
    fail(directory, dataclasses.replace(config, steps=9), 6, leave="6")
    assert directory.read_config() == config
    fail(directory, dataclasses.replace(config, steps=9), 6, leave="7")
    assert directory.read_config().steps == 9


def test_a_config_of_another_program_is_not_overwritten(directory, config):
    directory.path.mkdir(parents=True)
    directory.config.write_text('{"model_type": "qwen2_5_vl"}')
    with pytest.raises(ConfigError, match=r"config\.json"), claimed(directory, config):
        pass
    assert directory.config.read_text() == '{"model_type": "qwen2_5_vl"}'


def test_what_differs_is_named_field_by_field(directory, config):
    begin(directory, config)
    (directory.checkpoints / "6").mkdir(parents=True)
    other = dataclasses.replace(config, optimizer=OptimizerConfig(learning_rate=0.5), seed=3)
    expected = r"holds another run \(optimizer.learning_rate is 0.5, was 0.001; seed is 3, was 0\)"
    with pytest.raises(ConfigError, match=expected), claimed(directory, other):
        pass


def test_another_number_of_processes_or_another_place_is_the_same_run(directory, config):
    begin(directory, config)
    (directory.checkpoints / "6").mkdir(parents=True)
    with claimed(directory, dataclasses.replace(config, keep=7, log_every=3, output_dir="elsewhere")) as claim:
        assert claim.past == config
        assert claim.steps == [6]


def test_how_data_is_loaded_may_change(directory, config):
    """What a warning or an error says to change, when the run goes on."""
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, packing=Packing(workers=1)))
    begin(directory, config)
    (directory.checkpoints / "6").mkdir(parents=True)
    loading = {
        "workers": 3,
        "prefetch": 5,
        "processes": 2,
        "cache_mb": 9,
        "on_change": "continue",
        "packing": Packing(),
    }
    with claimed(directory, dataclasses.replace(config, data=dataclasses.replace(config.data, **loading))) as claim:
        assert claim.past == config
    other = dataclasses.replace(config, data=dataclasses.replace(config.data, seed=config.data.seed + 1, workers=3))
    with pytest.raises(ConfigError, match=r"another run \(data.seed is 1, was 0\)"), claimed(directory, other):
        pass


def test_config_json_reads_back(config):
    assert configs.loads(TrainConfig, configs.dumps(config)) == config


def test_the_best_are_kept_by_a_metric_that_is_measured():
    every = Eval(name="often", every=2)
    kept = TrainConfig(
        steps=6, keep=1, keep_every=3, keep_best=KeepBest("eval/often/score", largest=True), final=(every,)
    )
    assert kept.retention == Retention(1, every=3, best=1, largest=True)
    for final, metric in (((), "eval/often/score"), ((Eval(name="often"),), "eval/often/score"), ((every,), "los")):
        with pytest.raises(ConfigError, match=rf"keep_best\.metric is '{metric}', expected a metric that is measured"):
            TrainConfig(steps=6, keep_best=KeepBest(metric), final=final)

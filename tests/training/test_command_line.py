"""train.py from its command line, in this process: what it writes, repeats and refuses."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

import rave_jax
from rave_jax.checkpoint.store import StoreError
from rave_jax.config import ConfigError
from rave_jax.models.parameters import named_parameters
from rave_jax.observe.metrics import OF_TIME, read_jsonl
from rave_jax.parallel.mesh import MeshConfig, abstract_mesh
from rave_jax.tools import cli, train
from rave_jax.tools import eval as evaluate
from rave_jax.tools.job import EXIT_CONFIG, EXIT_FAILED
from rave_jax.training.lock import only_job
from rave_jax.training.run import load_run

CONFIG = str(Path(__file__).parents[1] / "resume" / "small_run.py")


def curve(folder: Path) -> list[dict]:
    return [
        {name: value for name, value in row.items() if name not in OF_TIME}
        for row in read_jsonl(folder / "metrics.jsonl")
    ]


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A finished run."""
    folder = tmp_path_factory.mktemp("runs") / "first"
    assert train.main([CONFIG, "--output_dir", str(folder), "--steps", "3"]) == 0
    return folder


def test_the_run_directory(run):
    files = {path.name for path in run.iterdir()}
    assert files >= {"config.json", "model", "metrics.jsonl", "tensorboard", "checkpoints", "report.md"}
    assert {path.name for path in (run / "checkpoints").iterdir()} == {"2", "3"}
    assert (run / "model" / "tokenizer.json").exists()
    assert [row["step"] for row in curve(run)] == [1, 2, 3]


@pytest.mark.slow
def test_the_resolved_config_repeats_the_run(run, tmp_path):
    assert train.main([str(run / "config.json"), "--output_dir", str(tmp_path / "again")]) == 0
    assert curve(tmp_path / "again") == curve(run)
    configs = [json.loads((folder / "config.json").read_text()) for folder in (run, tmp_path / "again")]
    assert [config.pop("output_dir") for config in configs] == [str(run), str(tmp_path / "again")]
    assert configs[0] == configs[1]


def test_a_finished_run_is_not_trained_again(run):
    before = (run / "metrics.jsonl").read_bytes()
    assert train.main([str(run / "config.json")]) == 0
    assert (run / "metrics.jsonl").read_bytes() == before


def test_scripts_evaluations_and_plans_read_a_run_by_one_loader(run, tmp_path):
    """A damaged run fails an evaluation, and is input that the command cannot use."""
    numbers = [
        {name: np.asarray(param[...]) for name, param in named_parameters(found.model).items()}
        for found in (load_run(run, step=2), rave_jax.load(run, step=2))
    ]
    jax.tree.map(np.testing.assert_array_equal, *numbers)
    planned = rave_jax.load(run, mesh=abstract_mesh(MeshConfig(), jax.device_count()))
    assert planned.parameter_bytes() == rave_jax.load(run).parameter_bytes()
    assert evaluate.main([str(run), "--step", "7", "--output_dir", str(tmp_path / "out")]) == 1
    broken = shutil.copytree(run, tmp_path / "broken")
    for file in (broken / "checkpoints").rglob("*"):
        if file.is_file():
            file.write_bytes(b"")
    with pytest.raises(StoreError):
        rave_jax.load(broken)
    assert cli.main(["generate", str(broken), "--prompt", "What?"]) == 2


def test_a_run_is_read_back_on_another_mesh(run):
    """Both ways of reading give the numbers that training ended with, and step 2's differ."""
    last = load_run(run)
    other = load_run(run, MeshConfig(fsdp=2, tensor=4))
    earlier = load_run(run, step=2)
    assert (last.step, earlier.step) == (3, 2)
    numbers = [{n: np.asarray(p[...]) for n, p in named_parameters(x.model).items()} for x in (last, other, earlier)]
    jax.tree.map(np.testing.assert_array_equal, numbers[0], numbers[1])
    changed = {name for name in numbers[0] if (numbers[0][name] != numbers[2][name]).any()}
    assert changed
    assert not any(name.startswith("vision.") for name in changed)
    assert other.mesh.shape["tensor"] == 4
    assert last.processor.rules.config.vision.patch_size == 14


def test_another_run_is_not_overwritten(run, capsys):
    assert train.main([CONFIG, "--output_dir", str(run), "--data.rows", "16", "--steps", "3"]) == EXIT_CONFIG
    assert "holds another run (data.rows is 16, was 8); choose another output_dir" in capsys.readouterr().err
    assert train.main([CONFIG, "--output_dir", str(run), "--steps", "2"]) == EXIT_CONFIG
    assert "holds a run of 3 steps, and steps is 2: a run can be continued with as" in capsys.readouterr().err


def test_a_finished_run_is_extended_from_its_newest_sound_checkpoint(run, tmp_path, capsys, caplog):
    """Nothing is lost: not the damaged checkpoint, not a foreign line of the metrics, not the old `steps`."""
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    (folder / "checkpoints" / "3" / "data" / "data.json").write_text("")
    with (folder / "metrics.jsonl").open("a") as file:
        file.write("note to myself\n")
    assert train.main([CONFIG, "--output_dir", str(folder), "--steps", "5"]) == 0
    said = capsys.readouterr().err
    assert "continuing after step 2, with 5 steps where there were 3: the learning rate continues on the cosine" in said
    assert "step 3 (data/data.json is empty); using step 2" in caplog.text
    assert [row["step"] for row in curve(folder)] == [1, 2, 3, 4, 5]
    assert curve(folder)[:2] == curve(run)[:2]
    assert (folder / "metrics.jsonl.rejected").read_text() == "note to myself\n"
    assert {path.name for path in (folder / "checkpoints").iterdir()} == {"3.damaged", "4", "5"}
    config = json.loads((folder / "config.json").read_text())
    assert config["steps"] == 5
    assert config["extended"] == [{"type": "Extension", "after_step": 2, "steps": 3}]


def test_a_second_job_on_the_directory_is_refused(run, capsys):
    before = (run / "metrics.jsonl").read_bytes()
    with only_job(run):
        assert train.main([CONFIG, "--output_dir", str(run), "--steps", "3"]) == EXIT_CONFIG
        (line,) = capsys.readouterr().err.splitlines()
        assert f"{run} is in use by another job (process {os.getpid()} on " in line
        assert load_run(run).step == 3, "what only reads needs no lock"
    assert (run / "metrics.jsonl").read_bytes() == before


def test_a_mechanism_that_config_json_cannot_lead_back_to_is_refused_before_anything_is_written(tmp_path, capsys):
    (tmp_path / "mine.py").write_text(
        "import dataclasses\n"
        "from rave_jax.attention import Rave\n"
        "from tests.resume import small_run\n"
        "def get_config():\n"
        "    class Mine(Rave): pass\n"
        "    config = small_run.get_config()\n"
        "    model = dataclasses.replace(config.model, mechanisms=(Mine(rank=2),))\n"
        "    return dataclasses.replace(config, model=model)\n"
    )
    command = [str(tmp_path / "mine.py"), "--output_dir", str(tmp_path / "run")]
    assert train.main(command) == EXIT_CONFIG
    (line,) = capsys.readouterr().err.splitlines()
    assert "the config cannot be written to config.json and read back: the class Mine could not be found again" in line
    assert "it is defined inside a function: define it at the top of its file" in line
    assert not (tmp_path / "run").exists()


def test_a_misspelt_option_exits_2_with_a_suggestion(capsys):
    with pytest.raises(SystemExit) as stopped:
        train.main([CONFIG, "--optimizer.learning_rte", "1"])
    assert stopped.value.code == 2
    assert "--optimizer.learning-rate" in capsys.readouterr().err.replace("_", "-")


def test_a_misspelt_key_of_a_config_file_exits_2_with_a_suggestion(run, tmp_path, capsys):
    config = json.loads((run / "config.json").read_text())
    config["optimizer"]["warmpu"] = config["optimizer"].pop("warmup")
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(SystemExit) as stopped:
        train.main([str(tmp_path / "config.json")])
    assert stopped.value.code == 2
    assert "optimizer.warmpu: OptimizerConfig has no such field; did you mean 'warmup'?" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("overrides", "code", "message"),
    [
        (["--output_dir", "/proc/rave_jax/run"], EXIT_FAILED, "cannot write to /proc/rave_jax/run"),
        (["--simulated_devices", "100000"], EXIT_CONFIG, "simulated_devices is 100000, expected 0 to 1024"),
        (["--hosts.processes", "-1"], EXIT_CONFIG, "hosts.processes is -1, but no TPU pod or SLURM job"),
        (["--mesh.tensor", "3"], EXIT_CONFIG, "mesh is data 1 x fsdp -1 x tensor 3, but"),
        (["--model.mechanisms.0.layers", "99"], EXIT_CONFIG, "Rave.layers names [99], expected numbers from 0"),
        (
            ["--final", "Eval", "--final.0.layers", "9"],
            EXIT_CONFIG,
            "final.0: layers has 9, but the model's layers are 0",
        ),
        (
            ["--final", "Report", "Eval", "--final.1.data", "QaJsonl", "--final.1.data.path", "/no.jsonl"],
            EXIT_CONFIG,
            "final.1: '/no.jsonl' cannot be read",
        ),
        (
            ["--mesh.context", "4", "--data.tokens", "130"],
            EXIT_CONFIG,
            "data.tokens is 130, expected a multiple of 8: two pieces of a row for each of mesh.context 4",
        ),
        (
            ["--model.sequence_parallel", "True", "--mesh.tensor", "4", "--data.tokens", "130"],
            EXIT_CONFIG,
            "data.tokens is 130, expected a multiple of 4: model.sequence_parallel gives a share of a row to each",
        ),
        (["--mesh.expert", "2"], EXIT_CONFIG, "mesh.expert is 2, expected 1: the model has no experts"),
        (["--data.rows", "12"], EXIT_CONFIG, "data rows is 12, expected a multiple of 8"),
        (["--data.tokens", "4"], EXIT_FAILED, "101 consecutive samples cannot be used"),
        (["--optimizer.groups.1.pattern", "mecanisms"], EXIT_CONFIG, "it matches no parameter"),
    ],
)
def test_what_cannot_be_used_is_one_line(tmp_path, capsys, overrides, code, message):
    assert train.main([CONFIG, "--output_dir", str(tmp_path / "run"), *overrides]) == code
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert message in lines[0]
    assert not (tmp_path / "run").exists(), "nothing is written before the config is known to fit"


def test_a_directory_that_is_no_run_is_named(tmp_path):
    with pytest.raises(ConfigError, match="is not a run directory: it holds no config"):
        load_run(tmp_path)

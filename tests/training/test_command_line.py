"""train.py from its command line, in this process: what it writes, repeats and refuses."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import numpy as np
import pytest

import train
from rave_jax.config import ConfigError
from rave_jax.models.parameters import named_parameters
from rave_jax.observe.metrics import read_jsonl
from rave_jax.parallel.mesh import MeshConfig
from rave_jax.training.run import load_run

CONFIG = str(Path(__file__).parents[1] / "resume" / "small_run.py")


def curve(folder: Path) -> list[dict]:
    return [
        {name: value for name, value in row.items() if name != "tokens_per_second"}
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
    assert last.processor.settings.patch_size == 14


def test_another_run_is_not_overwritten(run, capsys):
    assert train.main([CONFIG, "--output_dir", str(run), "--steps", "4"]) == train.EXIT_CONFIG
    assert "holds another run (steps is 4, was 3); choose another output_dir" in capsys.readouterr().err


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
        (["--output_dir", "/proc/rave_jax/run"], train.EXIT_FAILED, "cannot write to /proc/rave_jax/run"),
        (["--simulated_devices", "100000"], train.EXIT_CONFIG, "simulated_devices is 100000, expected 0 to 1024"),
        (["--hosts.processes", "-1"], train.EXIT_CONFIG, "hosts.processes is -1, and no cluster says what the"),
        (["--mesh.tensor", "3"], train.EXIT_CONFIG, "mesh is data 1 x fsdp -1 x tensor 3, but"),
        (["--model.mechanisms.0.layers", "99"], train.EXIT_CONFIG, "Rave.layers names [99], expected numbers from 0"),
        (["--data.rows", "12"], train.EXIT_CONFIG, "data rows is 12, expected a multiple of 8"),
        (["--optimizer.groups.1.pattern", "mecanisms"], train.EXIT_CONFIG, "it matches no parameter"),
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

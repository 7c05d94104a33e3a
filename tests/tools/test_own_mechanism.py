"""A mechanism of a user's own file, through the whole program: the file is on no path and in no package."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from rave_jax.command_line import override
from rave_jax.config import dumps, load_file, loads, to_json
from rave_jax.models.parameters import named_parameters
from rave_jax.observe.metrics import read_jsonl
from rave_jax.open_union import OpenUnion
from rave_jax.tools import cli, train
from rave_jax.tools import eval as evaluation
from rave_jax.tools.job import EXIT_CONFIG
from rave_jax.training.config import TrainConfig
from rave_jax.training.run import load_run
from tests import programs

# Three runs of two steps. `tests/test_open_union.py` holds how classes are named, found and refused.
pytestmark = pytest.mark.slow
REPO = Path(__file__).resolve().parents[2]
WRITTEN, USED, _ = re.findall(r"```python\n(.*?)```", (REPO / "docs" / "mechanisms.md").read_text(), re.DOTALL)
"""The page's mechanism, and its config."""
SMALL = """
import dataclasses
from tests.resume import small_run

def get_config():
    config = small_run.get_config()
    model = dataclasses.replace(config.model, mechanisms=(Tilt(start=0.5),))
    optimizer = dataclasses.replace(config.optimizer, groups=config.optimizer.groups[:1])
    return dataclasses.replace(config, model=model, optimizer=optimizer, final=(), tensorboard=False, save_every=1)
"""


def forget(file: Path) -> None:
    """As in a new process: nothing of the file is known."""
    for name in [name for name in OpenUnion.known if name.startswith(f"{file}:")]:
        del OpenUnion.known[name]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two steps, whose config file defines the page's mechanism."""
    folder = tmp_path_factory.mktemp("own")
    (folder / "tilt.py").write_text(WRITTEN + SMALL)
    assert train.main([str(folder / "tilt.py"), "--output_dir", str(folder / "run"), "--steps", "2"]) == 0
    forget(folder / "tilt.py")
    return folder / "run"


def test_the_page_names_it_in_a_config_and_on_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("tilt", "quickstart"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    (tmp_path / "tilt.py").write_text(WRITTEN)
    (tmp_path / "own.py").write_text(USED)
    (tmp_path / "quickstart.py").symlink_to(REPO / "configs" / "quickstart.py")
    config = load_file(tmp_path / "own.py")
    changed = override(config, ["--model.mechanisms", "Rave", "Tilt", "--model.mechanisms.1.start", "0.1"])
    saved = [mechanism["type"] for mechanism in to_json(changed)["model"]["mechanisms"]]
    assert saved == ["Rave", f"{tmp_path / 'tilt.py'}:Tilt"]
    assert loads(TrainConfig, dumps(changed)) == changed
    forget(tmp_path / "tilt.py")
    for name in ("tilt", "quickstart"):
        del sys.modules[name]


def test_the_config_says_where_the_class_is(run: Path) -> None:
    saved = json.loads((run / "config.json").read_text())
    (mechanism,) = saved["model"]["mechanisms"]
    assert mechanism == {"type": f"{run.parent / 'tilt.py'}:Tilt", "start": 0.5, "layers": "all"}


def test_it_is_trained_on(run: Path) -> None:
    """Its parameter is among the model's and learns."""
    values = {name: param[...] for name, param in named_parameters(load_run(run).model).items() if "mechanisms" in name}
    (name,) = values
    assert name.endswith("mechanisms.0.slope") and not np.allclose(values[name], 0.5)


def test_a_run_is_continued_from_its_config_alone(run: Path, tmp_path: Path) -> None:
    forget(run.parent / "tilt.py")
    assert train.main([str(run / "config.json"), "--steps", "3"]) == 0
    assert [row["step"] for row in read_jsonl(run / "metrics.jsonl")] == [1, 2, 3]


@pytest.mark.slow
def test_every_command_reads_it_and_it_goes_out_and_in_again(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, exported = run.parent / "tilt.py", tmp_path / "exported"
    (tmp_path / "ask.json").write_text(json.dumps([{"role": "user", "content": "Hi"}]))
    for words in (
        ["inspect", str(run)],
        ["convert", "to-hf", str(run), str(exported)],
        ["convert", "from-hf", str(exported), str(tmp_path / "native")],
        ["logits", str(tmp_path / "native"), str(tmp_path / "ask.json"), str(tmp_path / "logits.npz")],
        ["generate", str(exported), "--prompt", "Hi", "--max-new-tokens", "2"],
    ):
        forget(file)
        assert cli.main(words) == 0, words
    said = capsys.readouterr().out
    assert f'"type": "{file}:Tilt"' in said and "mechanisms.0.slope" in said
    (mechanism,) = json.loads((exported / "rave_jax.json").read_text())["options"]["mechanisms"]
    assert mechanism["type"] == f"{file}:Tilt"


@pytest.mark.slow
def test_a_run_is_examined(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    forget(run.parent / "tilt.py")
    few = (
        "--evals.0.samples",
        "2",
        "--evals.0.rows",
        "2",
        "--evals.0.max_new_tokens",
        "1",
        "--evals.0.looks",
        "0",
        "--evals.0.pictures",
        "0",
    )
    assert evaluation.main([str(run), *few]) == 0
    assert "Evaluation: heldout" in capsys.readouterr().out


def test_a_file_that_is_gone_is_one_line_that_says_what_to_do(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = run.parent / "tilt.py"
    moved = file.rename(tmp_path / "tilt.py")
    try:
        forget(file)
        for main in (lambda: cli.main(["inspect", str(run)]), lambda: evaluation.main([str(run)])):
            assert main() == EXIT_CONFIG
            (line,) = capsys.readouterr().err.splitlines()
            assert f"there is no file {file}, which defined the class Tilt: put it back, put a folder with til" in line
            assert f"{run / 'config.json'}.model.mechanisms.0.type is" in line
        # The same run, continued by the config file where it is.
        assert train.main([str(moved), "--output_dir", str(run), "--steps", "4"]) == 0
        assert json.loads((run / "config.json").read_text())["model"]["mechanisms"][0]["type"] == f"{moved}:Tilt"
    finally:
        moved.rename(file)
        forget(moved)


@pytest.mark.slow
def test_another_process_needs_the_folder_of_a_package_on_its_path(tmp_path: Path) -> None:
    (tmp_path / "lib" / "my_lab").mkdir(parents=True)
    (tmp_path / "lib" / "my_lab" / "__init__.py").write_text("")
    (tmp_path / "lib" / "my_lab" / "mechanisms.py").write_text(WRITTEN)
    (tmp_path / "small.py").write_text("from my_lab.mechanisms import Tilt\n" + SMALL)

    def command(*words: str, path: str) -> subprocess.CompletedProcess[str]:
        environment = programs.environment(PYTHONPATH=os.pathsep.join([str(REPO), path]))
        return subprocess.run(
            [sys.executable, "-m", "rave_jax.tools.cli", *words], env=environment, capture_output=True, text=True
        )

    run, lib = str(tmp_path / "run"), str(tmp_path / "lib")
    done = command("train", str(tmp_path / "small.py"), "--output_dir", run, "--steps", "2", path=lib)
    assert done.returncode == 0, done.stderr
    assert json.loads(Path(run, "config.json").read_text())["model"]["mechanisms"][0]["type"] == (
        "my_lab.mechanisms:Tilt"
    )
    done = command("inspect", run, path="")
    assert done.returncode == EXIT_CONFIG and "put the folder that holds my_lab on PYTHONPATH" in done.stderr
    assert command("inspect", run, path=lib).returncode == 0

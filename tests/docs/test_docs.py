"""The pages say what is so: commands run or parse, links lead somewhere, named files, fields and messages exist."""

from __future__ import annotations

import dataclasses
import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import NamedTuple, get_args, get_type_hints

import pytest

from rave_jax import command_line
from rave_jax import config as machinery
from rave_jax.command_line import override
from rave_jax.evaluation.config import Eval, Examination, Grounding
from rave_jax.tools import study
from rave_jax.tools.cli import _parser
from rave_jax.training.config import TrainConfig
from tests import programs

REPO = Path(__file__).resolve().parents[2]
PAGES = [REPO / "README.md", REPO / "BENCHMARKS.md", *sorted((REPO / "docs").glob("*.md"))]
CI = (REPO / ".ci" / "run").read_text()
BLOCK = re.compile(r"(?P<run><!-- test: run -->\n)?```bash\n(?P<body>.*?)```", re.DOTALL)
SOURCES = [*REPO.glob("*.py"), *(REPO / "rave_jax").rglob("*.py")]


class Block(NamedTuple):
    page: str
    body: str
    run: bool

    @property
    def commands(self) -> list[str]:
        return [line for line in self.body.replace("\\\n", " ").splitlines() if line and not line.startswith("#")]


BLOCKS = [
    Block(page.name, match["body"], bool(match["run"])) for page in PAGES for match in BLOCK.finditer(page.read_text())
]
CHECKED = [(block.page, command) for block in BLOCKS if not block.run for command in block.commands]


def runs_of_configs() -> set[str]:
    return {machinery.load_file(path).output_dir for path in (REPO / "configs").glob("*.py")}


def check_train(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The config exists and takes these overrides; a resolved one is that of a run some config makes."""
    if words[0].endswith(".json"):
        assert str(Path(words[0]).parent) in runs_of_configs()
        return
    monkeypatch.chdir(REPO)
    try:
        command_line.load_command_line(TrainConfig, words, "train.py")
    except SystemExit as stop:
        assert stop.code == 0 and words[-1] == "--help"


@pytest.mark.parametrize(("page", "command"), CHECKED, ids=[f"{page}-{command}" for page, command in CHECKED])
def test_a_command_is_run_by_ci_or_would_be_understood(
    page: str, command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    match shlex.split(command):
        case ["python3", "bootstrap.py", *_]:
            assert command in CI
        case [*settings, "python", script, "--json", _] if script.startswith("benchmarks/"):
            text = (REPO / script).read_text()
            assert "--json" in text and all(setting.split("=")[0] in text for setting in settings)
        case ["python", script, *words] if script.startswith("benchmarks/"):
            text = (REPO / script).read_text()
            assert [word for word in words if word.startswith("--") and f'"{word}"' not in text] == []
        case [setting, "python", *words] if setting.startswith("RAVE_JAX_TORCH_PYTHON="):
            assert shlex.join(words) in CI
        case ["python", "train.py", *words]:
            check_train(words, monkeypatch)
        case ["python", "eval.py", path, *words] | ["rave-jax", "eval", path, *words]:
            assert path in runs_of_configs() or path.startswith("checkpoints/")
            override(Examination(evals=(Eval(grounding=Grounding()),)), words)
        case ["rave-jax", "train", *words]:
            check_train(words, monkeypatch)
        case ["python", "-m", "pip", "install", "-c", "constraints.txt", "-e", target]:
            extras = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]["optional-dependencies"]
            assert target.removeprefix(".[").removesuffix("]") in extras
        case ["rave-jax", "study", config, *words]:
            given = _parser().parse_args(["study", config, *words])
            study.load(str(REPO / config), None).cells(given.arm, given.seed)
        case ["rave-jax", *words]:
            _parser().parse_args(words)
        case _:
            pytest.fail(f"nothing here knows how to check {command!r}")


RUN = {page: "".join(b.body for b in BLOCKS if b.run and b.page == page) for page in {b.page for b in BLOCKS if b.run}}


@pytest.mark.slow
@pytest.mark.parametrize("page", sorted(RUN))
def test_commands_of_a_page_run_as_they_stand(page: str, tmp_path: Path) -> None:
    for name in ("train.py", "eval.py", "configs"):
        (tmp_path / name).symlink_to(REPO / name)
    environment = programs.environment()
    environment.pop("JAX_PLATFORMS", None)  # a newcomer has not set it
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    done = subprocess.run(
        ["bash", "-euxc", RUN[page]], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=570
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


def test_commands_that_run_and_both_of_the_readme_are_there() -> None:
    assert sorted(RUN) == ["checkpoints.md", "tutorial.md", "your_attention.md"], "pages have commands that a test runs"
    first, second = (command for page, command in CHECKED if page == "README.md" and "bootstrap.py" in command)
    assert first.endswith("train.py configs/quickstart.py") and "pytest" in second


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_and_files_exist(page: Path) -> None:
    text = page.read_text()
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", text) if "://" not in link]
    assert [link for link in links if not (page.parent / link).exists()] == []
    named = re.findall(r"`((?:rave_jax|configs|tests|docs|benchmarks)/[\w/.]*)`", text)
    assert [name for name in named if not (REPO / name).exists()] == []


def field_exists(dotted: str) -> bool:
    cls: type = TrainConfig
    for part in dotted.split("."):
        fields = {f.name: f for f in dataclasses.fields(cls)} if dataclasses.is_dataclass(cls) else {}
        if part not in fields:
            return False
        default = fields[part].default_factory
        # A part that may be absent has the fields of its class.
        named = [kind for kind in get_args(get_type_hints(cls)[part]) if dataclasses.is_dataclass(kind)]
        cls = default if isinstance(default, type) else next(iter(named), type(None))
    return True


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_fields_exist(page: Path) -> None:
    first = "|".join(f.name for f in dataclasses.fields(TrainConfig))
    found = re.findall(rf"`(?:--)?((?:{first})(?:\.[a-z_]+)+)(?: [\w.]+)?`", page.read_text())
    assert [name for name in found if not name.endswith((".py", ".json", ".jsonl")) and not field_exists(name)] == []


def test_messages_of_troubleshooting_are_said_somewhere() -> None:
    """Words in bold code are what a program says; tyro says the one about unrecognized options."""
    said = re.findall(r"\*\*`([^`]+)`", (REPO / "docs" / "troubleshooting.md").read_text())
    code = "\n".join(path.read_text() for path in SOURCES)
    fragments = [part.strip() for message in said for part in message.split("...") if part.strip()]
    assert [f for f in fragments if f not in code and f != "Unrecognized options"] == []
    assert len(fragments) >= 5

"""bootstrap.py, which makes the environment: every state it can meet, without installing anything."""

from __future__ import annotations

import ast
import importlib.util
import sys
import threading
import time
from pathlib import Path
from types import ModuleType

import pytest

FILE = Path(__file__).resolve().parents[2] / "bootstrap.py"


@pytest.fixture
def bootstrap() -> ModuleType:
    spec = importlib.util.spec_from_file_location("bootstrap_under_test", FILE)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Clone:
    """A clone whose `install` only notes that it ran and lays an empty interpreter down."""

    def __init__(self, root: Path, bootstrap: ModuleType, monkeypatch: pytest.MonkeyPatch):
        self.root, self.installs, self.fails = root, 0, False
        (root / "pyproject.toml").write_text("[project]")
        (root / "constraints.txt").write_text("jax==0")
        monkeypatch.setattr(bootstrap, "install", self.install)

    def install(self, root: Path, lock: int) -> None:
        assert [p.name for p in (root / ".venv").iterdir()] == ["bootstrap.stamp"], "starts from nothing"
        self.installs += 1
        time.sleep(0.2)
        if self.fails:
            raise KeyboardInterrupt
        (root / ".venv" / "bin").mkdir()
        (root / ".venv" / "bin" / "python").touch()


@pytest.fixture
def clone(tmp_path: Path, bootstrap: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Clone:
    return Clone(tmp_path, bootstrap, monkeypatch)


def test_it_installs_once_and_again_when_the_pins_change(bootstrap: ModuleType, clone: Clone) -> None:
    assert bootstrap.state(clone.root) == "absent"
    for _ in range(2):
        bootstrap.prepare(clone.root)
    assert bootstrap.state(clone.root) == "ready" and clone.installs == 1
    (clone.root / "constraints.txt").write_text("jax==1")
    assert bootstrap.state(clone.root) == "stale"
    bootstrap.prepare(clone.root)
    assert bootstrap.state(clone.root) == "ready" and clone.installs == 2


def test_a_set_up_that_was_interrupted_starts_afresh(bootstrap: ModuleType, clone: Clone) -> None:
    clone.fails = True
    with pytest.raises(KeyboardInterrupt):
        bootstrap.prepare(clone.root)
    assert bootstrap.state(clone.root) == "stale"
    (clone.root / ".venv" / "lib").mkdir()
    (clone.root / ".venv" / "lib" / "half.py").touch()
    (clone.root / ".venv" / "lib64").symlink_to("lib")
    clone.fails = False
    bootstrap.prepare(clone.root)
    assert bootstrap.state(clone.root) == "ready" and clone.installs == 2


def test_an_environment_without_its_python_is_made_anew(bootstrap: ModuleType, clone: Clone) -> None:
    bootstrap.prepare(clone.root)
    python = clone.root / ".venv" / "bin" / "python"
    python.unlink()
    python.symlink_to(clone.root / "python-that-was-uninstalled")
    assert bootstrap.state(clone.root) == "stale"


def test_a_moved_clone_is_stale(bootstrap: ModuleType, clone: Clone, tmp_path: Path) -> None:
    bootstrap.prepare(clone.root)
    moved = tmp_path.parent / (tmp_path.name + "-moved")
    clone.root.rename(moved)
    assert bootstrap.state(moved) == "stale"


def test_an_environment_made_by_hand_is_left_alone(bootstrap: ModuleType, clone: Clone) -> None:
    (clone.root / ".venv").mkdir()
    (clone.root / ".venv" / "pyvenv.cfg").touch()
    with pytest.raises(SystemExit, match="made by hand"):
        bootstrap.prepare(clone.root)
    assert (clone.root / ".venv" / "pyvenv.cfg").exists() and clone.installs == 0


def test_two_at_once_install_once(bootstrap: ModuleType, clone: Clone) -> None:
    threads = [threading.Thread(target=bootstrap.prepare, args=[clone.root]) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert clone.installs == 1 and bootstrap.state(clone.root) == "ready"


def test_an_old_python_is_told_in_one_line(bootstrap: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    ast.parse(FILE.read_text(), feature_version=(3, 7))
    monkeypatch.setattr(sys, "version_info", (3, 11, 7, "final", 0))
    with pytest.raises(SystemExit) as stop:
        bootstrap.main(["train.py"])
    said = str(stop.value.code)
    assert "needs Python 3.12" in said and "3.11.7" in said and "install Python 3.12" in said and "\n" not in said


def test_the_words_go_to_the_python_of_the_environment(
    bootstrap: ModuleType, clone: Clone, monkeypatch: pytest.MonkeyPatch
) -> None:
    called: list[list[str]] = []
    monkeypatch.setattr(bootstrap, "ROOT", clone.root)
    monkeypatch.setattr(bootstrap.os, "execv", lambda path, argv: called.append([path, *argv]))
    bootstrap.main(["-m", "pytest"])
    python = str(clone.root / ".venv" / "bin" / "python")
    assert called == [[python, python, "-m", "pytest"]]
    bootstrap.main([])
    assert len(called) == 1, "without words it only prepares"

"""A directory is there whole or not at all, and what a killed process left goes with the next."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rave_jax.checkpoint.safetensors_file import CheckpointError
from rave_jax.checkpoint.written_whole import BEGINNING, GRACE, LOCK, written_whole


def aged(folder: Path, seconds: float) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "model.safetensors").write_text("half")
    os.utime(folder, (time.time() - seconds,) * 2)
    return folder


def test_unfinished_folders_of_dead_processes_are_swept(tmp_path: Path) -> None:
    dead = tmp_path / ".other.unfinished-dead"
    dead.mkdir()
    (dead / LOCK).touch()
    aged(dead, 2 * BEGINNING)
    unlocked, young = aged(tmp_path / ".out.unfinished-old", 2 * GRACE), aged(tmp_path / ".out.unfinished-new", 0)
    mine = aged(tmp_path / "unfinished-thoughts", 2 * GRACE)
    with written_whole(tmp_path / "out", 1) as folder:
        assert folder is not None
        (folder / "file").write_text("whole")
    assert [f.name for f in (tmp_path / "out").iterdir()] == ["file"]
    assert not dead.exists() and not unlocked.exists() and young.exists() and mine.exists()


def test_the_folder_of_a_live_process_stays(tmp_path: Path) -> None:
    script = "import fcntl, sys; f = open(sys.argv[1], 'w'); fcntl.flock(f, fcntl.LOCK_EX); print(flush=True); input()"
    alive = tmp_path / ".out.unfinished-alive"
    alive.mkdir()
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(alive / LOCK)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        assert process.stdout is not None
        process.stdout.readline()
        aged(alive, 2 * GRACE)
        with written_whole(tmp_path / "one", 1):
            assert alive.exists()
    finally:
        process.kill()
        process.wait()
    with written_whole(tmp_path / "two", 1):
        assert not alive.exists()


def test_an_error_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="half way"), written_whole(tmp_path / "out", 1):
        raise ValueError("half way")
    with pytest.raises(CheckpointError, match="cannot write"), written_whole(tmp_path / "out", 1):
        raise OSError(5, "Input/output error")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").touch()
    with (
        pytest.raises(CheckpointError, match="file is not a directory"),
        written_whole(tmp_path / "file" / "a" / "b", 1),
    ):
        pass

"""train.py with two processes, of which one fails or never comes: who says what, and how soon."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time

import pytest

from rave_jax.tools.job import EXIT_CONFIG, EXIT_FAILED

# Each is a job of whole programs.
pytestmark = pytest.mark.slow


def job(repo, folder, *each: tuple[str, ...]) -> list[tuple[int, str]]:
    """Exit code and standard error of each process; the words of each follow what they share."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "train.py", "tests/resume/small_run.py", "--output_dir", str(folder / "run")]
    command += ["--simulated_devices", "2", "--hosts.processes", "2", "--hosts.coordinator", f"localhost:{port}"]
    running = [
        subprocess.Popen(
            [*command, "--hosts.process", str(number), *words],
            cwd=repo,
            env=os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(repo)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number, words in enumerate(each)
    ]
    try:
        return [(process.wait(), errors) for process, errors in [(p, p.communicate(timeout=120)[1]) for p in running]]
    finally:
        for process in running:
            process.kill()


@pytest.mark.parametrize("failing", [0, 1])
def test_the_others_say_which_process_failed_and_why(repo, tmp_path, failing):
    began = time.monotonic()
    each = [(), ()]
    each[failing] = ("--mesh.tensor", "3")
    ends = job(repo, tmp_path, *each)
    why = "mesh is data 1 x fsdp -1 x tensor 3, but devices are 4; what fits: tensor 1 or 2 or 4"
    assert ends[failing] == (EXIT_CONFIG, f"train.py: process {failing} of 2: {why}\n")
    code, errors = ends[1 - failing]
    assert code == EXIT_CONFIG
    assert f"process {1 - failing} of 2: process {failing} ended with an error: {why}\n" in errors
    assert "Traceback" not in errors and "stack trace" not in errors
    assert time.monotonic() - began < 60
    assert not (tmp_path / "run" / "config.json").exists()


def test_a_process_that_never_comes_is_missed_in_time(repo, tmp_path):
    [(code, errors)] = job(repo, tmp_path, ("--hosts.start_timeout", "2"))
    assert code == EXIT_FAILED
    (line,) = errors.splitlines()
    assert line.startswith("process 0 of 2: not all processes connected to localhost:")
    assert "within 2 s (hosts.start_timeout); is each of them running" in line

"""A run of two processes that is told to end continues on one host with fewer devices, with the same rows in order."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys

import numpy as np
import pytest

from tests import programs
from tests.resume.test_kill import CONFIG, curve, finish, signal_at, start

# Four whole programs.
pytestmark = pytest.mark.slow

STEPS = ("--steps", "100", "--save_every", "25")


def test_the_numbers_are_those_of_one_host(repo, tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "train.py", CONFIG, "--output_dir", str(tmp_path / "run"), "--simulated_devices", "2"]
    command += [*STEPS, "--hosts.processes", "2", "--hosts.coordinator", f"localhost:{port}", "--hosts.process"]
    there = programs.environment()
    pair = [
        subprocess.Popen(
            [*command, str(number)], cwd=repo, env=there, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        for number in range(2)
    ]
    try:
        signal_at(pair[0], tmp_path / "run", 3, 0.0, signal.SIGTERM)
        outputs = [process.communicate(timeout=300)[0] for process in pair]
    finally:
        for process in pair:
            process.kill()
    assert [process.returncode for process in pair] == [143, 143], outputs
    assert all("which is saved; the same command continues" in output for output in outputs)
    stopped = len(curve(tmp_path / "run"))
    assert 3 <= stopped < 100
    assert f"continuing after step {stopped} of 100" in finish(start(repo, tmp_path / "run", *STEPS))
    finish(start(repo, tmp_path / "alone", *STEPS))
    continued, alone = curve(tmp_path / "run"), curve(tmp_path / "alone")
    for exact in ("step", "tokens", "target_tokens", "fill"):
        assert [row[exact] for row in continued] == [row[exact] for row in alone]
    np.testing.assert_allclose([row["loss"] for row in continued], [row["loss"] for row in alone], rtol=1e-6)

"""A process that is killed or stopped ends all others, each of which names it."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time

import pytest

from tests.distributed.dying import TIMEOUT

# Jobs of several processes.
pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    ("name", "who", "processes", "why"),
    [
        ("SIGKILL", 1, 2, "died: killed (kill -9, out of memory)"),
        ("SIGKILL", 0, 2, "died: killed (kill -9, out of memory)"),
        ("SIGKILL", 2, 4, "died: killed (kill -9, out of memory)"),
        ("SIGSTOP", 1, 2, "s (hosts.heartbeat_timeout): it is stopped, or its machine or network is gone"),
        ("SIGSTOP", 0, 2, "s (hosts.heartbeat_timeout): it is stopped, or its machine or network is gone"),
    ],
)
def test_the_others_end_and_name_it(repo, name, who, processes, why):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    running = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.distributed.dying", str(number), str(processes), str(port)],
            cwd=repo,
            env=os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(repo)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(processes)
    ]
    try:
        for process in running:
            assert process.stdout.readline() == "ready\n"
        time.sleep(0.5)
        running[who].send_signal(getattr(signal, name))
        began = time.monotonic()
        for number, process in enumerate(running):
            if number != who:
                errors = process.communicate(timeout=60)[1]
                # Where the coordinator has died, jax may end the process a moment later.
                assert process.returncode == 1 or (who == 0 and process.returncode == -signal.SIGABRT), errors
                (line,) = [line for line in errors.splitlines() if line.startswith(f"process {number} of {processes}")]
                assert f": process {who} (pid {running[who].pid} on " in line and why in line
                assert "the same command continues after the newest checkpoint" in line
        assert time.monotonic() - began < TIMEOUT + 20
    finally:
        for process in running:
            process.kill()
            process.wait()

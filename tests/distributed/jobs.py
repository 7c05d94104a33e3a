"""Jobs of two processes, each an interpreter of its own."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path

from tests import programs

PROCESSES = 2


def run_job(repo: Path, module: str, folder: Path) -> list[str]:
    """Run a job to its end and return what each process printed; each has the arguments PROCESS PROCESSES PORT FOLDER.

    Raises:
        AssertionError: a process failed; with the end of what it printed.
    """
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    jobs = [
        subprocess.Popen(
            [sys.executable, "-m", module, str(n), str(PROCESSES), str(port), str(folder)],
            cwd=repo,
            env=programs.environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for n in range(PROCESSES)
    ]
    try:
        outputs = [job.communicate(timeout=500)[0] for job in jobs]
    finally:
        for job in jobs:
            job.kill()
    for job, output in zip(jobs, outputs, strict=True):
        assert job.returncode == 0, output[-3000:]
    return outputs

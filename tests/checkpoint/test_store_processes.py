"""Two processes save one checkpoint: each digests what it wrote, and both agree on what is sound."""

from __future__ import annotations

import os
import socket
import subprocess
import sys

import pytest


@pytest.mark.slow  # two interpreters that import jax
def test_two_processes_pass_over_what_either_finds_damaged(tmp_path, repo):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(repo)}
    command = [sys.executable, "-m", "tests.checkpoint.processes"]
    jobs = [
        subprocess.Popen(
            [*command, str(process), port, str(tmp_path)],
            cwd=repo,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for process in range(2)
    ]
    try:
        outputs = [job.communicate(timeout=100)[0] for job in jobs]
    finally:
        for job in jobs:
            job.kill()
    for job, output in zip(jobs, outputs, strict=True):
        assert job.returncode == 0, output[-3000:]
    said = [line for line in outputs[0].splitlines() if "damaged" in line]
    assert len(said) == 1
    assert "step 3 (parameters/ocdbt.process_1/d/" in said[0]
    assert "step 2 (optimizer/ocdbt.process_1/d/" in said[0]
    assert "using step 1, the newest sound checkpoint" in said[0]
    assert "damaged" not in outputs[1], "one process says it for all"
    assert {path.name for path in tmp_path.iterdir()} == {"1", "2", "2.damaged", "3.damaged"}
    assert {path.name for path in (tmp_path / "2").glob("digests*")} == {"digests.0.sha256", "digests.1.sha256"}
    for process in range(2):
        lines = (tmp_path / "1" / f"digests.{process}.sha256").read_text().splitlines()
        assert any(f"parameters/ocdbt.process_{process}/" in line for line in lines)
        assert not any(f"process_{1 - process}" in line for line in lines)
        assert "2 processes" in lines[-1]

"""Two processes that share no disk train into a bucket, are killed, and continue there."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time

import pytest

from rave_jax.observe.metrics import read_jsonl
from tests import programs

# Whole programs.
pytestmark = pytest.mark.slow

URL = "gs://bucket/runs/one"


def start(repo, folder, steps):
    """The processes of a job; each has a home and temporary files of its own."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "tests.distributed.in_bucket", str(folder), "tests/resume/small_run.py"]
    command += ["--output_dir", URL, "--simulated_devices", "2", "--steps", str(steps), "--hosts.processes", "2"]
    command += ["--hosts.coordinator", f"localhost:{port}"]
    running = []
    for number in range(2):
        own = folder / f"host{number}"
        own.mkdir(exist_ok=True)
        there = programs.environment(TMPDIR=str(own), HOME=str(own))
        words = [*command, "--hosts.process", str(number)]
        job = subprocess.Popen(words, cwd=repo, env=there, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        running.append(job)
    return running


def finish(running):
    outputs = [job.communicate(timeout=300)[0] for job in running]
    for job, output in zip(running, outputs, strict=True):
        assert job.returncode == 0, output[-3000:]
    return outputs


def test_a_run_without_a_common_disk_is_killed_and_continues(repo, tmp_path):
    run = tmp_path / "bucket" / "runs" / "one"
    running = start(repo, tmp_path, 14)
    try:
        while not (run / "checkpoints" / "4" / "commit_success.txt").exists():
            assert running[0].poll() is None, running[0].communicate()[0][-3000:]
            time.sleep(0.05)
        for job in running:
            job.kill()
        for job in running:
            job.wait()
        assert (run / ".lock").exists()
        outputs = finish(again := start(repo, tmp_path, 14))
        running += again
    finally:
        for job in running:
            job.kill()
    assert "continuing after step" in outputs[0]
    assert f"report: {URL}/report.md" in outputs[0]
    steps = [row["step"] for row in read_jsonl(run / "metrics.jsonl")]
    assert steps == list(range(1, 15))
    assert json.loads((run / "config.json").read_text())["output_dir"] == URL
    assert (run / "model" / "tokenizer.json").exists() and (run / "report.md").exists()
    assert not (run / ".lock").exists()

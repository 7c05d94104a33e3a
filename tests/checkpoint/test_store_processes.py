"""Two processes save one checkpoint: each digests what it wrote, and both agree on what is sound."""

from __future__ import annotations

import pytest

from tests.distributed.jobs import run_job


@pytest.mark.slow  # two interpreters that import jax
def test_two_processes_pass_over_what_either_finds_damaged(tmp_path, repo):
    outputs = run_job(repo, "tests.checkpoint.processes", tmp_path)
    said = [line for line in outputs[0].splitlines() if "damaged" in line]
    assert len(said) == 1
    assert "step 4 (it cannot be read: " in said[0]
    assert "step 3 (parameters/ocdbt.process_1/d/" in said[0]
    assert "step 2 (optimizer/ocdbt.process_1/d/" in said[0]
    assert "using step 1, the newest sound checkpoint" in said[0]
    assert "damaged" not in outputs[1], "one process says it for all"
    assert {path.name for path in tmp_path.iterdir()} == {"1", "2", "2.damaged", "3.damaged", "4.damaged"}
    assert {path.name for path in (tmp_path / "2").glob("digests*")} == {"digests.0.sha256", "digests.1.sha256"}
    for process in range(2):
        lines = (tmp_path / "1" / f"digests.{process}.sha256").read_text().splitlines()
        assert any(f"parameters/ocdbt.process_{process}/" in line for line in lines)
        assert not any(f"process_{1 - process}" in line for line in lines)
        assert "2 processes" in lines[-1]

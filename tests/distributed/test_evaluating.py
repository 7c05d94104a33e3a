"""Two processes evaluate between steps alike, leave an evaluation together, and continue as if nothing had been."""

from __future__ import annotations

import json

import pytest

from tests.distributed.jobs import run_job
from tests.training.test_evaluations import assert_same_weights, results, rows

# Two processes that compile training and generation.
pytestmark = pytest.mark.slow


def test_two_processes_leave_an_evaluation_together_and_run_it_when_they_continue(tmp_path, repo) -> None:
    run_job(repo, "tests.distributed.evaluating", tmp_path)
    first, second = (json.loads((tmp_path / f"{n}.json").read_text()) for n in range(2))
    assert second["message"] == "SIGTERM: stopped after step 2, which is saved; the same command continues"
    assert first["message"] == second["message"].replace("SIGTERM", "SIGTERM at process 1", 1)
    assert first["code"] == second["code"] == 143 and first["saved"] == second["saved"] == ["2"]
    alone, stopped = tmp_path / "alone", tmp_path / "stopped"
    assert results(alone) == results(stopped) == ["2", "4"]
    assert rows(alone) == rows(stopped) and [row["step"] for row in rows(alone)] == [1, 2, 2, 3, 4, 4]
    assert_same_weights(alone, stopped)
    page = (stopped / "report.md").read_text()
    assert "### During training" in page

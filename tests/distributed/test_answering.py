"""Two processes answer the same requests alike, however quickly the source of each is."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rave_jax.checkpoint.tiny import write_tiny
from tests.distributed.test_processes import PROCESSES, run_job
from tests.tools.test_cli import SMALL


@pytest.mark.slow
def test_a_source_and_submitted_requests_are_answered_as_a_list(repo: Path, tmp_path: Path) -> None:
    write_tiny(tmp_path / "model", SMALL)
    run_job(repo, "tests.distributed.answering", tmp_path)
    first, second = (json.loads((tmp_path / f"{n}.json").read_text()) for n in range(PROCESSES))
    assert first == second
    whole = first["list"]
    assert len(whole) == 8 and "nobody" in whole[7] and all(whole[:7])
    assert first["source"] == whole
    # Their errors name their numbers, which go on from those of the streams.
    assert first["submitted"][:6] == [*whole[:2], *whole[3:7]] and "nobody" in first["submitted"][6]

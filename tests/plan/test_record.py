"""What is kept of a plan, and where two differ."""

from __future__ import annotations

import copy
import dataclasses
import json

import pytest

from rave_jax.plan.record import differences, record_of
from tests.plan.test_report import PLAN, STEP

KEPT = json.loads(json.dumps(record_of(PLAN)))
SUM = "all-reduce over tensor (4 chips), synchronous"


def test_a_plan_differs_from_its_own_record_by_nothing() -> None:
    assert differences(KEPT, record_of(PLAN)) == []
    assert KEPT["share_of_hbm"] == 0.5 and KEPT["largest"] == "compute"
    assert KEPT["collectives"][SUM] == [4, 0.4 * 50e9]


@pytest.mark.parametrize(
    ("place", "share", "word"), [(0, 2.0, "executions"), (1, 1.03, "bytes sent"), (1, 0.97, "bytes")]
)
def test_counts_and_bytes_of_each_kind_are_held(place: int, share: float, word: str) -> None:
    found = copy.deepcopy(KEPT)
    found["collectives"][SUM][place] *= share
    (said,) = differences(KEPT, found)
    assert said.startswith(SUM) and word in said


def test_what_is_new_and_what_is_gone_is_said_but_nothing_of_what_is_little() -> None:
    found = copy.deepcopy(KEPT)
    found["collectives"]["all-reduce over fsdp (4 chips), synchronous"] = found["collectives"].pop(SUM)
    assert len(differences(KEPT, found)) == 4
    found = copy.deepcopy(KEPT)
    found["collectives"]["all-reduce over data (4 chips), synchronous"] = [100, 1000]
    assert differences(KEPT, found) == []


def test_memory_is_held() -> None:
    found = KEPT | {"peak_bytes": KEPT["peak_bytes"] * 1.03}
    (said,) = differences(KEPT, found)
    assert "peak of HBM" in said


def test_nothing_is_kept_of_a_step_that_does_not_fit() -> None:
    large = dataclasses.replace(PLAN, step=dataclasses.replace(STEP, fits=False, moved=(), hbm_traffic=0.0))
    with pytest.raises(ValueError, match="does not fit"):
        record_of(large)

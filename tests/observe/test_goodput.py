"""Where the time of a job went."""

from __future__ import annotations

import pytest

from rave_jax.observe.goodput import Goodput


def test_what_no_cause_took_went_into_steps():
    now = [0.0]
    goodput = Goodput(lambda: now[0])
    now[0] = 20.0
    goodput.training_begins()
    with goodput.spent("save"):
        now[0] = 30.0
    goodput.add("data", 5.0)
    now[0] = 100.0
    assert goodput.share == pytest.approx(0.65)
    assert goodput.line() == (
        "goodput: 65.0% of 100 s went into steps; the start 20.0%, waiting for saves 10.0%, waiting for data 5.0%, "
        "compiling 0.0%, evaluations 0.0%"
    )

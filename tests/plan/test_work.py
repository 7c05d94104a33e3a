"""What a run's MFU is reckoned with."""

from __future__ import annotations

import time
from types import SimpleNamespace

import numpy as np
import pytest

from rave_jax.observe.goodput import Goodput
from rave_jax.plan import work
from rave_jax.plan.chips import CHIPS
from rave_jax.training.meter import Meter, Work


def of(kind: str, monkeypatch) -> Work | None:
    """The work of a step of 8 GFLOPs on a mesh of 2 x 2 such devices."""
    asked = {}
    monkeypatch.setattr(work, "step_flops", lambda *given: asked.update(given[3]) or SimpleNamespace(model=8e9))
    devices = np.array([SimpleNamespace(device_kind=kind)] * 4, object).reshape(2, 2)
    groups = {"a": SimpleNamespace(frozen=True), "b": SimpleNamespace(frozen=False)}
    found = work.work_of(None, None, SimpleNamespace(mesh=SimpleNamespace(devices=devices), groups=groups, graph=None))
    assert found is None or asked == {"a": False, "b": True}
    return found


@pytest.mark.parametrize("chip", CHIPS, ids=lambda chip: chip.name)
def test_the_peak_is_that_of_all_chips(chip, monkeypatch):
    assert of(chip.kind, monkeypatch) == Work(8e9, 4 * chip.flops)


def test_of_other_devices_no_peak_is_known(monkeypatch):
    assert of("cpu", monkeypatch) is None


def test_mfu_is_flops_over_peak_and_time():
    meter = Meter(Goodput(), Work(flops=8e9, peak=1e12))
    for _ in range(5):
        meter.finished(10, 1)
    time.sleep(0.1)
    found = meter.take()
    assert found["mfu"] == pytest.approx(8e9 / found["step_time"] / 1e12, rel=1e-2)
    assert "mfu" not in Meter(Goodput()).take()

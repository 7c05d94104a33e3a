"""Schedules and parameter groups."""

from __future__ import annotations

import numpy as np
import pytest

from rave_jax.config import ConfigError
from rave_jax.training.optimizers import OptimizerConfig, ParameterGroup, assign_groups, learning_rate_schedule


def rates(steps: int, **fields) -> list[float]:
    schedule = learning_rate_schedule(OptimizerConfig(learning_rate=2.0, **fields), steps)
    return [float(schedule(step)) for step in range(steps + 1)]


def test_warmup_rises_from_the_first_step():
    assert rates(10, warmup=4, decay="none")[:5] == [0.5, 1.0, 1.5, 2.0, 2.0]


def test_cosine_falls_from_peak_to_its_end():
    got = rates(8, warmup=2, final_learning_rate=0.1)
    np.testing.assert_allclose(got[2], 2.0)
    np.testing.assert_allclose(got[5], 2.0 * (0.1 + 0.9 * 0.5), rtol=1e-6)
    np.testing.assert_allclose(got[8], 0.2, rtol=1e-6)
    assert got[2:] == sorted(got[2:], reverse=True)


def test_linear_falls_in_a_line():
    np.testing.assert_allclose(np.diff(rates(5, decay="linear")), -0.4, rtol=1e-5)


def test_warmup_longer_than_the_run_is_refused():
    with pytest.raises(ConfigError, match="warmup is 10, expected fewer than"):
        learning_rate_schedule(OptimizerConfig(warmup=10), 10)


NAMES = ("embed.weight", "vision.patch.weight", "decoder.layer_runs.0.layers.mechanisms.0.constant")


def test_first_matching_group_owns_a_parameter():
    groups = (ParameterGroup("tower", r"^vision\."), ParameterGroup("weights", r"\.weight$"))
    assigned = assign_groups(NAMES, OptimizerConfig(groups=groups))
    assert [assigned[name].name for name in NAMES] == ["weights", "tower", "rest"]


@pytest.mark.parametrize(
    ("pattern", "message"),
    [("visoin", "it matches no parameter; parameters are .*embed.weight"), (r"^vision\.p", "earlier groups take all")],
)
def test_a_group_without_parameters_is_refused(pattern, message):
    groups = (ParameterGroup("tower", r"^vision\."), ParameterGroup("typo", pattern))
    with pytest.raises(ConfigError, match=rf"optimizer\.groups\.1 \(typo\).*{message}"):
        assign_groups(NAMES, OptimizerConfig(groups=groups))


def test_a_broken_pattern_is_refused():
    with pytest.raises(ConfigError, match="expected a regular expression"):
        ParameterGroup("broken", "(")

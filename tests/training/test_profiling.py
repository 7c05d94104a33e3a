"""Profiles of a few steps: by config, by a signal, and ended with the run."""

from __future__ import annotations

import os
import signal

import jax
import pytest

from rave_jax.config import ConfigError
from rave_jax.training.config import TrainConfig
from rave_jax.training.profiling import SIGNAL, Profile, Profiler, early_signals_ignored, on_signal


@pytest.fixture
def traced(monkeypatch):
    """What jax's profiler was asked for."""
    told: list[str] = []
    monkeypatch.setattr(jax.profiler, "start_trace", lambda folder: told.append(folder))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: told.append("end"))
    return told


def test_the_steps_of_the_config(tmp_path, traced):
    said: list[str] = []
    profiler = Profiler(Profile(first=3, steps=2), tmp_path, said.append)
    at = [(profiler.before(step), len(traced))[1] for step in range(1, 8)]
    assert at == [0, 0, 1, 1, 2, 2, 2]
    assert traced == [str(tmp_path / "3"), "end"]
    assert said == [f"profile: {tmp_path / '3'}"]


def test_a_signal_profiles_the_next_steps_and_the_end_ends_it(tmp_path, traced):
    profiler = Profiler(Profile(first=0), tmp_path, print)
    with on_signal(profiler):
        profiler.before(1)
        os.kill(os.getpid(), SIGNAL)
        profiler.before(2)
        profiler.before(3)
    assert traced == [str(tmp_path / "2"), "end"]


def test_a_run_goes_on_without_a_profile_that_cannot_be_written(tmp_path):
    """By jax's own profiler."""
    (tmp_path / "file").write_text("")
    said: list[str] = []
    profiler = Profiler(Profile(first=1, steps=1), tmp_path / "file", said.append)
    for step in range(1, 4):
        profiler.before(step)
    (line,) = said
    assert line.startswith(f"warning: there is no profile in {tmp_path / 'file' / '1'}: ")


def test_a_step_behind_the_last_cannot_be_profiled():
    with pytest.raises(ConfigError, match=r"profile\.first is 11, expected at most the run's 10 steps, or 0"):
        TrainConfig(steps=10, profile=Profile(first=11))


def test_a_signal_before_the_first_step_ends_nothing(tmp_path, traced):
    before = signal.getsignal(SIGNAL)
    with early_signals_ignored():
        os.kill(os.getpid(), SIGNAL)
        with on_signal(Profiler(Profile(first=0), tmp_path, print)):
            pass
        os.kill(os.getpid(), SIGNAL)
    assert signal.getsignal(SIGNAL) == before and not traced

"""Start of a job from config and environment, and the watchdog. The jobs themselves: test_processes.py."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest

from rave_jax.config import ConfigError
from rave_jax.parallel import hosts
from rave_jax.parallel.hosts import HostsConfig, Watchdog

HANG = """
import time
from rave_jax.parallel.hosts import Watchdog
with Watchdog(0.3, first=60, poll=0.05) as dog:
    dog.beat("step 7")
    time.sleep(60)
"""


def test_a_hung_step_ends_the_process_and_shows_where(repo):
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-c", HANG], cwd=repo, capture_output=True, text=True, timeout=120)
    assert done.returncode == Watchdog.EXIT_CODE
    assert "process 0 of 1: nothing finished for 0 s after step 7; ending it" in done.stderr
    assert 'File "<string>", line 6' in done.stderr
    assert time.monotonic() - began < 55


def test_a_beating_or_paused_watchdog_stays_quiet():
    with Watchdog(0.2, first=0.2, poll=0.02) as dog:
        for step in range(10):
            time.sleep(0.05)
            dog.beat(f"step {step}")
        with dog.paused():
            time.sleep(0.5)
        time.sleep(0.05)
    with Watchdog(0.2, first=60, poll=0.02) as dog:
        dog.beat("step 1")
        dog.expect_compilation()
        time.sleep(0.5)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (HostsConfig(processes=2, process=0), r"hosts\.coordinator is '', expected address:port"),
        (HostsConfig("localhost:1", processes=2), r"hosts\.process is not given and JAX_PROCESS_ID is ''"),
        (HostsConfig("localhost:1", processes=0, process=0), r"hosts\.processes is not given and JAX_NUM_PROCESSES"),
        (HostsConfig("localhost:1", processes=2, process=2), r"hosts\.process is 2, expected 0 to 1"),
    ],
)
def test_what_is_missing_is_named(monkeypatch, config, message):
    for name in ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ConfigError, match=message):
        hosts.start(config)


def test_one_process_needs_no_barrier():
    hosts.barrier("alone", HostsConfig())
    assert hosts.is_first()

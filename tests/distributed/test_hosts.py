"""Start of a job from config and environment. The jobs themselves: test_processes.py, test_stopping.py."""

from __future__ import annotations

import socket

import pytest

from rave_jax.config import ConfigError
from rave_jax.parallel import hosts
from rave_jax.parallel.hosts import MOST_SECONDS, HostsConfig


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (HostsConfig(processes=2, process=0), r"hosts\.coordinator is '', expected address:port"),
        (HostsConfig("localhost:1", processes=2), r"hosts\.process is not given and JAX_PROCESS_ID is ''"),
        (HostsConfig("localhost:1", processes=0, process=0), r"hosts\.processes is not given and JAX_NUM_PROCESSES"),
        (HostsConfig("localhost:1", processes=2, process=2), r"hosts\.process is 2, expected 0 to 1"),
        (HostsConfig("localhost", processes=2, process=0), r"hosts\.coordinator is 'localhost', expected address:port"),
        (HostsConfig("a:b", processes=2, process=0), r"hosts\.coordinator is 'a:b', expected address:port"),
        (HostsConfig("a:99999", processes=2, process=0), r"with a port of 1 to 65535"),
        (HostsConfig(processes=-1), r"hosts\.processes is -1, but no TPU pod or SLURM job was found"),
    ],
)
def test_what_is_missing_is_named(monkeypatch, config, message):
    for name in ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ConfigError, match=message):
        hosts.start(config)


@pytest.mark.parametrize("devices", [-1, 100_000])
def test_more_simulated_devices_than_a_machine_makes_are_refused(devices):
    with pytest.raises(ConfigError, match=f"simulated_devices is {devices}, expected 0 to 1024"):
        hosts.start(HostsConfig(), devices)


@pytest.mark.parametrize("seconds", [-1, 10**12])
@pytest.mark.parametrize(
    "field", ["start_timeout", "heartbeat_timeout", "barrier_timeout", "step_timeout", "stop_timeout"]
)
def test_limits_are_seconds_that_jax_can_count(field, seconds):
    with pytest.raises(ConfigError, match=rf"{field} is {seconds}, expected [01] to {MOST_SECONDS:,} seconds"):
        HostsConfig(**{field: seconds})


@pytest.mark.parametrize("field", ["processes", "process"])
@pytest.mark.parametrize("number", [-2, 10**9])
def test_numbers_of_processes_are_bounded(field, number):
    with pytest.raises(ConfigError, match=f"{field} is {number}, expected -1.* to 6553"):
        HostsConfig(**{field: number})


def test_a_port_that_another_job_has_is_named():
    with socket.create_server(("", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(hosts.HostsError, match=rf"^port {port} of hosts.coordinator cannot be opened here \(Ad"):
            hosts.start(HostsConfig(f"localhost:{port}", 2, 0))


def test_one_process_needs_no_barrier():
    hosts.barrier("alone", HostsConfig())
    assert hosts.is_first()

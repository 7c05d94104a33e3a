"""The processes of a job: start, named barriers with time limits, and a watchdog over steps."""

from __future__ import annotations

import contextlib
import faulthandler
import itertools
import os
import sys
import threading
import time
from collections.abc import Generator
from dataclasses import dataclass
from typing import Any

import jax
from orbax.checkpoint import multihost

from rave_jax.config import ConfigError, require


@dataclass(frozen=True)
class HostsConfig:
    """How the processes of a job find each other, and how long they wait."""

    coordinator: str = ""
    """`address:port` of process 0; empty: the environment variable JAX_COORDINATOR_ADDRESS, or, with
    `processes` -1, whatever the cluster says. On GCP use port 8476: others are not open by default."""
    processes: int = 1
    """Processes of the job; 0 reads JAX_NUM_PROCESSES; -1 asks the cluster (TPU pod, SLURM)."""
    process: int = -1
    """Number of this process; -1 reads JAX_PROCESS_ID."""
    start_timeout: int = 1800
    """Seconds in which all processes must have connected."""
    heartbeat_timeout: int = 100
    """Seconds after which a process that died ends the others."""
    barrier_timeout: int = 1800
    """Seconds that one process waits for the others at a barrier."""
    step_timeout: int = 0
    """Seconds after which a process in which no step finishes ends itself with the stacks of its threads (a hung
    process keeps its heartbeat); 0: never. A step that compiles has ten times as long."""

    def __post_init__(self) -> None:
        require(self.processes >= -1, "processes", self.processes, "at least 1, or 0 or -1")
        require(self.step_timeout >= 0, "step_timeout", self.step_timeout, "at least 0 seconds")
        for name in ("start_timeout", "heartbeat_timeout", "barrier_timeout"):
            require(getattr(self, name) > 0, name, getattr(self, name), "above 0 seconds")


def start(config: HostsConfig, simulated_devices: int = 0) -> None:
    """Connect the processes of the job. Call it before anything uses a device.

    Args:
        config: where the others are.
        simulated_devices: CPU devices of this process; 0 uses the real accelerators.

    Raises:
        ConfigError: the number of the process or the coordinator is missing.
    """
    if simulated_devices:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", simulated_devices)
    if config.processes == 1:
        return
    limits: dict[str, Any] = {
        "initialization_timeout": config.start_timeout,
        "heartbeat_timeout_seconds": config.heartbeat_timeout,
    }
    if config.processes == -1:
        jax.distributed.initialize(config.coordinator or None, **limits)
        return
    count = config.processes or _from_environment("hosts.processes", "JAX_NUM_PROCESSES")
    process = config.process if config.process >= 0 else _from_environment("hosts.process", "JAX_PROCESS_ID")
    coordinator = config.coordinator or os.environ.get("JAX_COORDINATOR_ADDRESS", "")
    require(bool(coordinator), "hosts.coordinator", coordinator, "address:port, or JAX_COORDINATOR_ADDRESS to be set")
    require(0 <= process < count, "hosts.process", process, f"0 to {count - 1}")
    # Read only by CPU backends; the default would connect no two processes.
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(coordinator, count, process, **limits)


def _from_environment(field: str, variable: str) -> int:
    value = os.environ.get(variable, "")
    if not value.isdecimal():
        raise ConfigError(f"{field} is not given and {variable} is {value!r}, expected a number in one of them")
    return int(value)


def is_first() -> bool:
    """Is this the process that writes what the job writes once?"""
    return jax.process_index() == 0


def barrier(name: str, config: HostsConfig) -> None:
    """Wait until every process of the job is here.

    Raises:
        RuntimeError: one was not within `barrier_timeout`; the message names the barrier.
    """
    if jax.process_count() == 1:
        return
    # A barrier's key serves once. Every process comes to its barriers in the same order, so the counts agree.
    key = f"rave_jax {name} {next(_barriers)}"
    try:
        multihost.get_barrier_sync_fn()(key=key, timeout_ms=1000 * config.barrier_timeout)
    except Exception as error:
        limit = config.barrier_timeout
        raise RuntimeError(f"barrier {name!r}: not all {jax.process_count()} processes came in {limit} s") from error


_barriers = itertools.count()


class Watchdog:
    """Ends the process when nothing calls `beat` for too long. Use as a context manager."""

    EXIT_CODE = 75

    def __init__(self, timeout: float, first: float | None = None, poll: float = 1.0):
        """
        Args:
            timeout: seconds allowed between two beats; 0 switches the watchdog off.
            first: seconds allowed before the first beat, and where a step compiles; ten times `timeout` by default.
            poll: seconds between two looks at the clock.
        """
        self._timeout = timeout
        self._first = self._limit = 10 * timeout if first is None else first
        self._poll = poll
        self._what, self._since = "the start", time.monotonic()
        self._stop = threading.Event()

    def beat(self, what: str) -> None:
        """Something finished; `what` names it in the message."""
        self._what, self._since, self._limit = what, time.monotonic(), self._timeout

    def expect_compilation(self) -> None:
        """What finishes next is compiled first, and has the time of the first beat."""
        self._since, self._limit = time.monotonic(), self._first

    @contextlib.contextmanager
    def paused(self) -> Generator[None]:
        """For work that is not a step and has its own time limits."""
        limit, self._limit = self._limit, float("inf")
        try:
            yield
        finally:
            self._since, self._limit = time.monotonic(), limit

    def __enter__(self) -> Watchdog:
        if self._timeout:
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()

    def _watch(self) -> None:
        while not self._stop.wait(self._poll):
            waited = time.monotonic() - self._since
            if waited > self._limit:
                place = f"process {jax.process_index()} of {jax.process_count()}"
                print(f"{place}: nothing finished for {waited:.0f} s after {self._what}; ending it", file=sys.stderr)
                faulthandler.dump_traceback(all_threads=True)
                sys.stderr.flush()
                os._exit(self.EXIT_CODE)

"""The processes of a job: how they start, wait for each other, and end together when one of them fails."""

from __future__ import annotations

import atexit
import contextlib
import itertools
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any, NamedTuple, NoReturn

import jax
from jax._src.distributed import global_state
from orbax.checkpoint import multihost

from rave_jax.config import ConfigError, require
from rave_jax.parallel import notes
from rave_jax.parallel.liveness import Liveness

MOST_PROCESSES, MOST_SIMULATED = 65_536, 1024
MOST_SECONDS = 1_000_000
"""Eleven days. jax counts some limits in 32 bits of milliseconds."""


class HostsError(RuntimeError):
    """Processes that did not find or did not wait for each other. The message says what is lacking."""


@dataclass(frozen=True)
class HostsConfig:
    """How the processes of a job connect, and how long they wait."""

    coordinator: str = ""
    """`address:port` of process 0; empty: the environment variable JAX_COORDINATOR_ADDRESS, or, with
    `processes` -1, whatever the cluster says. On GCP use port 8476: others are not open by default."""
    processes: int = 1
    """Processes of the job; 0 reads JAX_NUM_PROCESSES; -1 asks the cluster (TPU pod, SLURM)."""
    process: int = -1
    """Number of this process; -1 reads JAX_PROCESS_ID."""
    start_timeout: int = 1800
    """Seconds in which all processes must have connected."""
    heartbeat_timeout: int = 60
    """Seconds without a sign of life after which a process ends the others. One that is killed ends them at once."""
    barrier_timeout: int = 1800
    """Seconds that one process waits for the others at a barrier."""
    step_timeout: int = 1800
    """Most seconds that a step may wait for its data; 0 is no limit. A step itself may take twice as long, and
    compiling, saving and restoring four times. After that the watchdog ends the job and says what it waited for,
    because a process that hangs keeps its heartbeat. It saves first where it can."""
    stop_timeout: int = 300
    """Seconds in which a job that gets SIGTERM or Ctrl-C saves and ends, whatever it waits for."""

    def __post_init__(self) -> None:
        require(-1 <= self.processes <= MOST_PROCESSES, "processes", self.processes, f"-1 to {MOST_PROCESSES}")
        require(-1 <= self.process < MOST_PROCESSES, "process", self.process, f"-1, or 0 to {MOST_PROCESSES - 1}")
        for name in ("step_timeout", "stop_timeout", "start_timeout", "heartbeat_timeout", "barrier_timeout"):
            least = 0 if name == "step_timeout" else 1
            given = getattr(self, name)
            require(least <= given <= MOST_SECONDS, name, given, f"{least} to {MOST_SECONDS:,} seconds")


def start(config: HostsConfig, simulated_devices: int = 0) -> None:
    """Connect the processes of the job. Call it before anything uses a device.

    Args:
        config: where the others are.
        simulated_devices: CPU devices of this process; 0 uses the real accelerators.

    Raises:
        ConfigError: the number of the process or the coordinator is missing, or cannot be one.
        HostsError: the coordinator cannot be started here.
    """
    require(0 <= simulated_devices <= MOST_SIMULATED, "simulated_devices", simulated_devices, f"0 to {MOST_SIMULATED}")
    if simulated_devices:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", simulated_devices)
    if config.processes == 1:
        return
    # Its handler takes SIGTERM from ours and hears no Ctrl-C; `stopping.py` does the same work for both.
    jax.config.update("jax_enable_preemption_service", False)
    # Read only by CPU backends; the default would connect no two processes.
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    if config.processes == -1:
        try:
            with _limited(config, config.coordinator or "the coordinator"):
                jax.distributed.initialize(config.coordinator or None, **_limits(config))
        except (ValueError, RuntimeError) as error:
            message = "hosts.processes is -1, but no TPU pod or SLURM job was found"
            raise ConfigError(
                f"{message} ({_first_line(error)}); give hosts.processes and hosts.coordinator"
            ) from error
        _set_place(jax.process_index(), jax.process_count())
        _meet(config, global_state.coordinator_address or "")
        return
    count = config.processes or _from_environment("hosts.processes", "JAX_NUM_PROCESSES")
    require(1 <= count <= MOST_PROCESSES, "hosts.processes", count, f"1 to {MOST_PROCESSES}")
    process = config.process if config.process >= 0 else _from_environment("hosts.process", "JAX_PROCESS_ID")
    coordinator = config.coordinator or os.environ.get("JAX_COORDINATOR_ADDRESS", "")
    require(bool(coordinator), "hosts.coordinator", coordinator, "address:port, or JAX_COORDINATOR_ADDRESS to be set")
    _check_address(coordinator)
    require(0 <= process < count, "hosts.process", process, f"0 to {count - 1}")
    _set_place(process, count)
    try:
        with _limited(config, coordinator):
            jax.distributed.initialize(coordinator, count, process, **_limits(config))
    except (ValueError, RuntimeError) as error:
        raise HostsError(f"cannot connect to {coordinator} (hosts.coordinator): {_first_line(error)}") from error
    _meet(config, coordinator)


def _meet(config: HostsConfig, coordinator: str) -> None:
    """What connected processes have of each other: a board for notes, and a sign of life."""
    notes.open_board()
    here = place()
    if here.processes == 1:
        return
    liveness = Liveness(here.process, here.processes, config.heartbeat_timeout, _a_process_died)
    at_end(liveness.close)
    atexit.register(farewell)
    liveness.start(coordinator.rpartition(":")[0].strip("[]"))


def _a_process_died(words: str) -> None:
    if not failing.is_set():
        end(1, f"{words}; this process ends too, and the same command continues after the newest checkpoint")


def _limits(config: HostsConfig) -> dict[str, Any]:
    # jax ends the process with a stack of C++ when its own limit passes; ours comes first and explains.
    return {
        "initialization_timeout": config.start_timeout + 60,
        "heartbeat_timeout_seconds": config.heartbeat_timeout + 30,
    }


@contextlib.contextmanager
def _limited(config: HostsConfig, coordinator: str) -> Generator[None]:
    """End the process, and say what is lacking, when the others do not connect in time."""
    connected = threading.Event()

    def watch() -> None:
        if not connected.wait(config.start_timeout):
            print(f"{place()}{_why_alone(config, coordinator)}", file=sys.stderr, flush=True)
            os._exit(1)

    threading.Thread(target=watch, name="start", daemon=True).start()
    try:
        yield
    finally:
        connected.set()


def _why_alone(config: HostsConfig, coordinator: str) -> str:
    limit = f"within {config.start_timeout} s (hosts.start_timeout)"
    host, _, port = coordinator.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=3).close()
    except (OSError, ValueError) as error:
        return (
            f"nothing answers at {coordinator} (hosts.coordinator: {error}) {limit}; "
            "is process 0 running there, and is the port open between the hosts?"
        )
    return (
        f"not all processes connected to {coordinator} {limit}; "
        "is each of them running, with the same hosts.coordinator and hosts.processes and a hosts.process of its own?"
    )


def _check_address(coordinator: str) -> None:
    host, colon, port = coordinator.rpartition(":")
    good = bool(colon and host and port.isdecimal() and 0 < int(port[:6]) < 65536)
    require(good, "hosts.coordinator", coordinator, "address:port, with a port of 1 to 65535")


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


class Place(NamedTuple):
    """Which process of how many this is. As text it opens a message; empty for one process."""

    process: int
    processes: int

    def __str__(self) -> str:
        return f"process {self.process} of {self.processes}: " if self.processes > 1 else ""


def place() -> Place:
    """Which process this is. Asks no device, so it can be called by any thread at any time."""
    return _place


def _set_place(process: int, processes: int) -> None:
    global _place
    _place = Place(process, processes)


_place = Place(0, 1)


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
        HostsError: one was not within `barrier_timeout`; the message names the barrier.
    """
    if jax.process_count() == 1:
        return
    # A barrier's key serves once. Every process comes to its barriers in the same order, so the counts agree.
    key = f"rave_jax {name} {next(_barriers)}"
    try:
        multihost.get_barrier_sync_fn()(key=key, timeout_ms=1000 * config.barrier_timeout)
    except Exception as error:
        limit = config.barrier_timeout
        raise HostsError(f"barrier {name!r}: not all {jax.process_count()} processes came in {limit} s") from error


_barriers = itertools.count()


def fail(error: BaseException, code: int, prog: str) -> int:
    """Say why this process fails; in a job of several also to the others, and end it. The exit code for one process.

    Whoever fails leaves a note with the reason and stays until the others have read it: they would wait in a
    collective, or end with a traceback of the network.
    """
    print(f"{prog}: {place()}{error}", file=sys.stderr, flush=True)
    here = place()
    if here.processes == 1:
        return code
    failing.set()
    notes.leave(f"failed/{here.process}", f"{code} {error}")
    notes.gather("failed", here.processes, LAST_WORDS)
    end(code, "")


def tell_the_others(why: str, code: int) -> None:
    """Leave the reason why this process ends, and the exit code. It takes a second at most, whatever hangs."""
    failing.set()
    told = threading.Thread(target=notes.leave, args=(f"failed/{place().process}", f"{code} {why}"), daemon=True)
    told.start()
    told.join(1.0)


def of_devices(error: Exception) -> HostsError:
    """What a computation raised in a job of several processes, as one line. Waits a little: when another process has
    said why it failed, this one ends with that reason."""
    time.sleep(LAST_WORDS)
    return HostsError(
        f"a computation over the devices of all processes failed ({_first_line(error)}); "
        "look at the output of the other processes for one that died"
    )


def end(code: int, message: str) -> NoReturn:
    """Say why, and end this process at once, whatever its threads wait for. Process 0, whose coordinator the others
    read notes from, stays a little longer."""
    failing.set()
    if message:
        sys.stderr.write(f"{place()}{message}\n")  # in one piece: where process 0 has died, jax writes at the same time
    sys.stdout.flush()
    sys.stderr.flush()
    here = place()
    if here.process == 0 and here.processes > 1:
        time.sleep(LAST_WORDS)
    farewell()
    os._exit(code)


def at_end(work: Callable[[], None]) -> None:
    """Have something done when this process ends of its own will."""
    _at_end.append(work)


def farewell() -> None:
    """Do what is to be done when this process ends of its own will; a second call does nothing."""
    while _at_end:
        _at_end.pop()()


LAST_WORDS = 3.0
"""Seconds for the others to read what a process that ends has left."""
_at_end: list[Callable[[], None]] = []
failing = threading.Event()
"""This process is about to end and has said why."""

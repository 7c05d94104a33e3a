"""One process of a job that is stopped again and again, while it waits for this and that.

python -m tests.distributed.stopping PROCESS PROCESSES PORT FOLDER
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import os
import signal
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
from orbax.checkpoint import multihost

from rave_jax.checkpoint.store import Store
from rave_jax.observe.progress import ProgressReport
from rave_jax.parallel import hosts, notes
from rave_jax.parallel.mesh import MeshConfig, make_mesh
from rave_jax.parallel.stopping import Interrupted, StopRequest
from rave_jax.parallel.watchdog import Watchdog
from rave_jax.training import feed
from rave_jax.training.loop import Loop, Schedule
from rave_jax.training.session import Session
from rave_jax.training.state import TrainState, parameters_of
from tests.distributed.worker import digest, session_on
from tests.training.small import TEXT, RandomSource, first_state

ROWS, STEPS, HANG = 8, 1000, 3


@dataclass(frozen=True)
class Case:
    """A signal, who gets it, and whose data hangs at step 3."""

    signal: str
    to: int
    hangs: tuple[int, ...] = ()
    at: int = HANG
    """Steps before the signal comes and the data hangs."""
    watchdog: float = 0
    """Seconds after which the watchdog asks; then there is no signal."""


CASES = {
    "while steps run": Case("SIGTERM", to=1),
    "Ctrl-C while steps run": Case("SIGINT", to=0),
    "while all wait for data": Case("SIGTERM", to=0, hangs=(0, 1)),
    "while one waits for data": Case("SIGTERM", to=0, hangs=(1,)),
    "while the other waits for data": Case("SIGINT", to=0, hangs=(0,)),
    "before the first batch": Case("SIGTERM", to=1, hangs=(0, 1), at=0),
    "by the watchdog": Case("", to=-1, hangs=(1,), watchdog=1.0),
}


class Hanging(RandomSource):
    """Gives `at` batches, and then, on some processes, none."""

    def __init__(self, case: Case, process: int, release: threading.Event):
        super().__init__(ROWS, patches=0)
        self._at, self._hangs, self._release = case.at, process in case.hangs, release

    def load(self, step, start, stop):
        if step >= self._at and self._hangs:
            self._release.wait()
        time.sleep(0.02)
        return super().load(step, start, stop)


def signalled(case: Case, session: Session) -> Session:
    """The session, in which this process gets the signal half a second after `at` steps were begun."""
    begun = itertools.count(1)
    shot = threading.Timer(0.5, lambda: os.kill(os.getpid(), getattr(signal, case.signal)))

    def step(state, batch):
        if next(begun) == case.at:
            shot.start()
        return session.step(state, batch)

    if case.at == 0:
        shot.start()
    return dataclasses.replace(session, step=step)


@contextlib.contextmanager
def quickly():
    """The loop waits for late data, and for a source that hangs, less long."""
    before = feed.GRACE, feed.LEAVE
    feed.GRACE, feed.LEAVE = 0.5, 0.1
    try:
        yield
    finally:
        feed.GRACE, feed.LEAVE = before


def run_case(case: Case, session: Session, folder: Path) -> dict:
    """What became of one case on this process."""
    process, release = jax.process_index(), threading.Event()
    found = {}
    state = jax.tree.map(jnp.copy, _first(session))
    if process == case.to:
        session = signalled(case, session)
    with (
        Store(folder, keep=9) as store,
        ProgressReport(STEPS, 0, enabled=False) as progress,
        StopRequest(timeout=60, poll=0.1) as stop,
        Watchdog(case.watchdog, stop, poll=0.1) as watchdog,
    ):
        loop = Loop(session, Schedule(STEPS, 1000, 1000), store, folder / "bad", [], progress, watchdog, stop)
        try:
            loop.run(state, Hanging(case, process, release), ROWS, str)
        except Interrupted as error:
            found = {"message": str(error), "code": error.exit_code}
        release.set()
        found["saved"] = store.steps
        if store.steps:
            state, _, data = store.restore(store.latest, parameters_of(session.state), session.state.optimizer)
            found |= {"data": data, "step": int(state["step"]), "digest": digest(session.mesh, state["values"])}
            found["sum"] = float(_sum({name: state["values"][name] for name in session.state.trained}))
    return found


_states: dict[int, TrainState] = {}


def _first(session: Session) -> TrainState:
    """Made once: it is compiled."""
    if id(session) not in _states:
        _states[id(session)] = first_state(session, TEXT)
    return _states[id(session)]


@jax.jit
def _sum(tree: dict[str, jax.Array]) -> jax.Array:
    return sum(jnp.abs(x).sum() for x in jax.tree.leaves(tree))


def clear(config: hosts.HostsConfig) -> None:
    """Take the notes of a case away: a real job is stopped once."""
    hosts.barrier("case", config)
    if jax.process_index() == 0:
        multihost.get_jax_distributed_client().key_value_delete(notes.ROOT)
    hosts.barrier("clear", config)


def main(process: int, processes: int, port: str, folder: Path) -> None:
    config = hosts.HostsConfig(f"localhost:{port}", processes, process, start_timeout=60, heartbeat_timeout=30)
    hosts.start(config, simulated_devices=2)
    session = session_on(make_mesh(MeshConfig(fsdp=4)), steps=STEPS)
    found = {}
    for number, (name, case) in enumerate(CASES.items()):
        began = time.monotonic()
        with quickly():
            found[name] = run_case(case, session, folder / str(number))
        found[name]["seconds"] = time.monotonic() - began
        clear(config)
    (folder / f"{process}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], Path(sys.argv[4]))

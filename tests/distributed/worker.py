"""One process of a job: trains the small model on several meshes and writes what it saw.

python worker.py PROCESS PROCESSES PORT FOLDER
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import sys
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh

from rave_jax.checkpoint.store import Store
from rave_jax.observe.progress import ProgressReport
from rave_jax.parallel import hosts
from rave_jax.parallel.mesh import make_mesh
from rave_jax.parallel.sharding import replicated
from rave_jax.parallel.stopping import StopRequest
from rave_jax.parallel.watchdog import Watchdog
from rave_jax.training.loop import Loop, Schedule
from rave_jax.training.optimizers import OptimizerConfig
from rave_jax.training.session import Session
from rave_jax.training.state import parameters_of, state_of
from tests.distributed.meeting import MESHES, ROWS
from tests.training.small import TEXT, RandomSource, first_state, session_of

STEPS, SAVED = 4, 2
OPTIMIZER = OptimizerConfig(learning_rate=1e-2)


def session_on(mesh: Mesh, steps: int = STEPS) -> Session:
    """Text only and one layer: it compiles quickly."""
    return session_of(OPTIMIZER, mesh, steps=steps, rows=ROWS, config=TEXT)


class Losses:
    """A metrics writer that remembers."""

    def __init__(self):
        self.rows = []

    def write(self, step, values):
        self.rows.append([step, values["loss"], values["tokens"]])

    def close(self):
        pass


def digest(mesh, tree) -> str:
    """A hash of the gathered numbers."""
    whole = _gatherer(mesh)(tree)
    return hashlib.sha256(
        b"".join(np.asarray(x.addressable_data(0)).tobytes() for x in jax.tree.leaves(whole))
    ).hexdigest()


@functools.cache
def _gatherer(mesh: Mesh):
    return jax.jit(lambda t: t, out_shardings=replicated(mesh))


def run(session: Session, folder: Path, restore: Path | None) -> dict:
    """Train from the start, or from the checkpoint of another layout."""
    mesh, shapes = session.mesh, []

    def seen(state, batch, step=session.step):
        shapes.append(list(batch.tokens.shape))
        return step(state, batch)

    session = dataclasses.replace(session, step=seen)
    if restore is None:
        state = first_state(session, TEXT)
    else:
        with Store(restore, keep=9) as store:
            found = store.restore(SAVED, parameters_of(session.state), session.state.optimizer)
        state = state_of(found[0], found[1], session.state)
        assert found[2] == {"step": SAVED}
    losses = Losses()
    with Store(folder / "checkpoints", keep=9) as store, ProgressReport(STEPS, 0, enabled=False) as progress:
        schedule = Schedule(STEPS, log_every=1, save_every=SAVED)
        loop = Loop(session, schedule, store, folder / "bad", [losses], progress, Watchdog(0), StopRequest())
        state = loop.run(state, RandomSource(ROWS, patches=0), ROWS, str)
    return {"shapes": shapes, "losses": losses.rows, "digest": digest(mesh, state.trained)}


def main(process: int, processes: int, port: str, folder: Path) -> None:
    config = hosts.HostsConfig(f"localhost:{port}", processes, process, start_timeout=60, heartbeat_timeout=30)
    hosts.start(config, simulated_devices=2)
    results = {}
    sessions = {name: session_on(make_mesh(layout)) for name, layout in MESHES.items()}
    for name, session in sessions.items():
        results[name] = run(session, folder / name, None)
        hosts.barrier("layout", config)
    results["restored"] = run(sessions["tensor"], folder / "restored", folder / "fsdp" / "checkpoints")

    from tests.distributed.stopping import Case, clear, quickly, run_case

    with quickly():
        results["stopped"] = run_case(Case("SIGTERM", to=0, hangs=(1,)), sessions["fsdp"], folder / "stopped")
    clear(config)
    (folder / f"{process}.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], Path(sys.argv[4]))

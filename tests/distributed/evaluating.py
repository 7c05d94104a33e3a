"""One process of a job that evaluates between steps, and is told to end during an evaluation.

python -m tests.distributed.evaluating PROCESS PROCESSES PORT FOLDER
"""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import sys
import time
from pathlib import Path

from rave_jax.evaluation.subject import ModelSubject
from rave_jax.parallel import hosts
from rave_jax.parallel.mesh import MeshConfig
from rave_jax.parallel.stopping import Interrupted, StopRequest
from rave_jax.training.run import train
from tests.distributed.stopping import clear
from tests.training.test_evaluations import config


def main(process: int, processes: int, port: str, folder: Path) -> None:
    connection = hosts.HostsConfig(f"localhost:{port}", processes, process, start_timeout=60, heartbeat_timeout=60)
    hosts.start(connection, simulated_devices=2)
    mesh, found = MeshConfig(fsdp=4), {}

    def job(name: str) -> None:
        train(dataclasses.replace(config(folder / name, steps=4), hosts=connection, mesh=mesh), stop)

    stop = StopRequest(timeout=120, poll=0.1)
    with stop:
        job("alone")
    clear(connection)

    # Process 1 gets the signal, and process 0 may hear of it some pieces of the evaluation later.
    original, told = ModelSubject.answer, process != 1
    stop = StopRequest(timeout=120, poll=0.1)

    def answer(self: ModelSubject, samples: list) -> list:
        nonlocal told
        if not told:
            told = True
            os.kill(os.getpid(), signal.SIGTERM)
        while stop.asked is None and process == 0:
            time.sleep(0.01)
        return original(self, samples)

    ModelSubject.answer = answer
    try:
        with stop:
            job("stopped")
    except Interrupted as error:
        found = {"message": str(error), "code": error.exit_code}
    ModelSubject.answer = original
    clear(connection)
    found["saved"] = sorted(path.name for path in (folder / "stopped" / "checkpoints").iterdir())
    stop = StopRequest(timeout=120, poll=0.1)
    with stop:
        job("stopped")
    (folder / f"{process}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], Path(sys.argv[4]))

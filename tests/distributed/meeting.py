"""One process of a job that trains nothing: which rows it loads, what is made of them, and how processes meet.

python -m tests.distributed.meeting PROCESS PROCESSES PORT FOLDER
"""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp

from rave_jax.batch import Batch
from rave_jax.config import ConfigError
from rave_jax.parallel import agree, hosts, shared_disk
from rave_jax.parallel.mesh import MeshConfig, make_mesh
from rave_jax.parallel.rows import global_batch, owned_rows
from rave_jax.parallel.sharding import use_mesh
from rave_jax.parallel.stopping import leave
from tests.training.small import random_batch, rows_of

ROWS = 8
MESHES = {"fsdp": MeshConfig(fsdp=4), "tensor": MeshConfig(fsdp=1, tensor=4)}


@jax.jit
def weighed(batch: Batch) -> jax.Array:
    """A number to which each row and each place add in their own way."""
    rows, places = jnp.ogrid[: batch.tokens.shape[0], : batch.tokens.shape[1]]
    return jnp.sum((1 + rows) * (3 + places) * batch.tokens)


def seen(layout: MeshConfig) -> dict:
    """The rows of this process, and the number of the whole batch."""
    mesh, whole = make_mesh(layout), random_batch(0, ROWS, patches=0)
    with use_mesh(mesh):
        batch = global_batch(lambda span: rows_of(whole, span.start, span.stop), mesh, ROWS)
        number = int(weighed(batch))
    return {"rows": [[span.start, span.stop] for span in owned_rows(mesh, ROWS)], "number": number}


def shared(directory: Path, config: hosts.HostsConfig) -> str:
    """What the check of a directory says."""
    directory.mkdir(exist_ok=True)
    shared_disk.LATE = 0.5
    try:
        shared_disk.check_shared(directory, "output_dir", config)
    except ConfigError as error:
        return str(error)
    return "; ".join(path.name for path in directory.iterdir() if path.name.startswith(".seen"))


def said_of_configs(config: MeshConfig, *aside: str) -> str:
    """What the check of the processes' configs says."""
    try:
        agree.check_same_config(config, *aside)
    except ConfigError as error:
        return str(error)
    return ""


def main(process: int, processes: int, port: str, folder: Path) -> None:
    config = hosts.HostsConfig(f"localhost:{port}", processes, process, start_timeout=60, heartbeat_timeout=30)
    hosts.start(config, simulated_devices=2)
    results: dict = {name: seen(layout) for name, layout in MESHES.items()}
    results["shared"] = [shared(folder, config), shared(folder / f"of process {process}", config)]
    layout = MeshConfig(fsdp=2 - process, tensor=1 + process)
    results["config"] = [said_of_configs(layout), said_of_configs(layout, "fsdp", "tensor")]
    hosts.barrier("met", config)
    if process == 0:
        began = time.monotonic()
        try:
            hosts.barrier("lonely", dataclasses.replace(config, barrier_timeout=1))
        except RuntimeError as error:
            results["barrier"] = [str(error), time.monotonic() - began]
    else:
        time.sleep(3)  # does not come
    (folder / f"{process}.json").write_text(json.dumps(results))
    leave(0, seconds=0.5)  # process 0, while the other sleeps, which jax would abort then


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], Path(sys.argv[4]))

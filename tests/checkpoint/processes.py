"""One process of a job of two that saves, meets damage, and saves again.

python -m tests.checkpoint.processes PROCESS PROCESSES PORT FOLDER
"""

from __future__ import annotations

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from rave_jax.checkpoint.store import Store, abstract
from rave_jax.parallel import hosts
from rave_jax.parallel.mesh import MeshConfig, make_mesh

SIZE = 256


def numbers(factor: float) -> np.ndarray:
    """What is saved: noise, so that it takes files of its own."""
    return np.random.default_rng(0).normal(size=(8, SIZE)).astype(np.float32) * factor


def main(process: int, port: str, folder: Path) -> None:
    config = hosts.HostsConfig(f"localhost:{port}", 2, process, start_timeout=60, heartbeat_timeout=30)
    hosts.start(config, simulated_devices=2)
    sharding = NamedSharding(make_mesh(MeshConfig()), PartitionSpec("fsdp", None))

    def tree(factor: float) -> dict:
        whole = numbers(factor)
        return {"a": jax.make_array_from_callback(whole.shape, sharding, lambda place: jnp.asarray(whole[place]))}

    target = abstract(tree(1), {"a": sharding})
    with Store(folder, keep=4) as store:
        for step in (1, 2, 3, 4):
            store.save(step, tree(step), tree(-step), {"step": step})
    if process == 0:
        # What the other process wrote: only it looks at this file when both check.
        for step, name in ((3, "parameters"), (2, "optimizer")):
            (file, *_) = sorted((folder / str(step) / name / "ocdbt.process_1" / "d").iterdir())
            data = bytearray(file.read_bytes())
            data[len(data) // 2] ^= 1
            file.write_bytes(data)
        # Without digests, a process finds alone that it cannot read its shard.
        (file, *_) = sorted((folder / "4" / "parameters" / "ocdbt.process_1" / "d").iterdir())
        file.write_bytes(file.read_bytes()[:10])
        for file in (folder / "4").glob("digests.*"):
            file.unlink()
    hosts.barrier("damaged", config)
    with Store(folder, keep=4) as store:
        found = store.restore_newest(target, target)
        assert found is not None
        assert (found.step, found.data) == (1, {"step": 1})
        for shard in found.optimizer["a"].addressable_shards:
            np.testing.assert_array_equal(shard.data, numbers(-1)[shard.index])
        store.save(2, tree(2), tree(-2), {"step": 2})
    with Store(folder, keep=4, reader=True) as store:
        assert store.restore(2, target, target)[2] == {"step": 2}


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[3], Path(sys.argv[4]))

"""Checkpoints of a run: any mesh, only finished ones, and clear errors."""

from __future__ import annotations

import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from rave_jax.checkpoint.store import Store, StoreError, abstract, check_writable
from rave_jax.parallel.mesh import MeshConfig, make_mesh

DATA = {"step": 3, "skipped": {"a/b.json": [1, "broken"]}, "none": {}}


def on(mesh: MeshConfig) -> NamedSharding:
    return NamedSharding(make_mesh(mesh), PartitionSpec("fsdp", "tensor"))


def parameters(sharding: NamedSharding, rows: int = 8) -> dict:
    values = {"a.weight": jnp.arange(8.0 * rows).reshape(rows, 8), "b": jnp.ones((8, 8), jnp.bfloat16)}
    return {"values": jax.device_put(values, sharding)}


def target(tree, sharding):
    return abstract(tree, jax.tree.map(lambda _: sharding, tree))


def save(folder: Path, *steps: int, keep: int = 2) -> dict:
    tree = parameters(on(MeshConfig()))
    with Store(folder, keep) as store:
        for step in steps:
            store.save(step, tree, tree["values"], DATA)
    return tree


@pytest.mark.parametrize(
    "mesh", [MeshConfig(fsdp=1, tensor=8), MeshConfig(fsdp=2, tensor=4), MeshConfig(data=8, fsdp=1)]
)
def test_restores_on_any_mesh(tmp_path, mesh):
    tree = save(tmp_path, 3)
    sharding = on(mesh)
    with Store(tmp_path, 2) as store:
        found, optimizer, data = store.restore(3, target(tree, sharding), target(tree["values"], sharding))
        alone = store.restore_parameters(3, target(tree, sharding))
    assert data == DATA
    jax.tree.map(np.testing.assert_array_equal, (found, optimizer, alone), (tree, tree["values"], tree))
    assert all(x.sharding == sharding for x in jax.tree.leaves((found, optimizer, alone)))


def test_keeps_the_newest(tmp_path):
    save(tmp_path, 1, 2, 3)
    with Store(tmp_path, 2) as store:
        assert store.steps == [2, 3]
        assert store.latest == 3


def test_saving_a_step_again_leaves_it(tmp_path):
    save(tmp_path, 1, 1)
    with Store(tmp_path, 2) as store:
        assert store.steps == [1]


def test_an_unfinished_save_is_no_checkpoint(tmp_path):
    """As a killed process leaves it: in a directory that has not got its name yet."""
    save(tmp_path, 1)
    unfinished = tmp_path / "2.orbax-checkpoint-tmp"
    shutil.copytree(tmp_path / "1" / "parameters", unfinished / "parameters")
    with Store(tmp_path, 2, reader=True) as store:
        assert store.steps == [1]
    assert unfinished.exists(), "a reader cleans up behind a run that is under way"
    save(tmp_path, 2)
    assert {path.name for path in tmp_path.iterdir()} == {"1", "2"}


def test_another_model_is_named(tmp_path):
    tree = save(tmp_path, 1)
    sharding = on(MeshConfig())
    other = {"values": {"a.weight": parameters(sharding, 16)["values"]["a.weight"], "c": tree["values"]["b"]}}
    with (
        Store(tmp_path, 2) as store,
        pytest.raises(
            StoreError, match=r"holds another model: values/c is missing; values/b is not expected; values/a"
        ),
    ):
        store.restore_parameters(1, target(other, sharding))


def test_a_missing_step_is_named(tmp_path):
    save(tmp_path, 1)
    with Store(tmp_path, 2) as store, pytest.raises(StoreError, match=r"no checkpoint of step 5; there are \[1\]"):
        store.restore_parameters(5, {})


def test_a_damaged_checkpoint_is_named(tmp_path):
    tree = save(tmp_path, 1)
    for file in (tmp_path / "1" / "parameters").rglob("d/*"):
        file.write_bytes(file.read_bytes()[:10])
    with Store(tmp_path, 2) as store, pytest.raises(StoreError, match="1 cannot be restored"):
        store.restore_parameters(1, target(tree, on(MeshConfig())))


def test_a_place_that_takes_no_files_is_refused(tmp_path):
    (tmp_path / "file").write_text("not a directory")
    with pytest.raises(StoreError, match=r"cannot write to .*file"):
        check_writable(tmp_path / "file" / "checkpoints", 0)
    # Read-only for everybody, the superuser included.
    with pytest.raises(StoreError, match="cannot write to /proc/rave_jax"):
        check_writable(Path("/proc/rave_jax"), 0)


def test_a_disk_without_room_is_refused(tmp_path):
    with pytest.raises(StoreError, match=r"1e\+12 GB are needed for checkpoints, but .* GB are free"):
        check_writable(tmp_path, 10**21)
    assert not list(tmp_path.iterdir())


def test_a_disk_that_fills_up_is_named(tmp_path, monkeypatch):
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with Store(tmp_path, 2) as store:
        monkeypatch.setattr(type(store._checkpointer), "save_checkpointables_async", full)
        with pytest.raises(StoreError, match=r"checkpoint of step 1 could not be written to .*: no space is left"):
            store.save(1, {}, {}, {})


def test_a_directory_that_vanished_is_named_at_once(tmp_path):
    """Left to orbax, the error would come after minutes."""
    with Store(tmp_path / "checkpoints", 1) as store:
        (tmp_path / "checkpoints").rmdir()
        (tmp_path / "checkpoints").write_text("in the way")
        with pytest.raises(StoreError, match=r"cannot write to .*checkpoints"):
            store.save(1, {}, {}, {})

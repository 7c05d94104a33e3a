"""Checkpoints of a run: any mesh, only finished ones, and clear errors."""

from __future__ import annotations

import hashlib
import random
import resource
import shutil
import threading
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from orbax.checkpoint import v1 as ocp
from orbax.checkpoint._src.futures import synchronization

from rave_jax.checkpoint import saved_step
from rave_jax.checkpoint.digests import DamageError
from rave_jax.checkpoint.retention import Retention
from rave_jax.checkpoint.saved_step import DATA as DATA_ITEM
from rave_jax.checkpoint.saved_step import OPTIMIZER, PARAMETERS, verify
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


@pytest.mark.parametrize(
    ("keep", "steps"),
    [
        (Retention(1), [6]),
        (Retention(1, every=2), [2, 4, 6]),
        (Retention(1, best=1), [2, 6]),
        (Retention(1, best=2, largest=True), [1, 4, 6]),
        (Retention(2, every=3, best=1), [2, 3, 5, 6]),
    ],
)
def test_which_are_kept(tmp_path, keep, steps):
    """Of step 3 no metric is known. What is kept for its metric stays when the run continues."""
    tree = parameters(on(MeshConfig()))
    for part in ((1, 2, 3), (4, 5, 6)):
        with Store(tmp_path, keep) as store:
            for step in part:
                metric = {1: 9.0, 2: 1.0, 4: 8.0, 5: 3.0, 6: 2.0}.get(step) if keep.best else None
                store.save(step, tree, tree["values"], DATA, metric)
    with Store(tmp_path, keep, reader=True) as store:
        assert store.steps == steps
    assert len(steps) < keep.most(6, 1)


def test_saving_a_step_again_leaves_it(tmp_path):
    save(tmp_path, 1, 1)
    with Store(tmp_path, 2) as store:
        assert store.steps == [1]


def test_what_leads_to_a_state_is_written_before_it_and_beside_the_loop(tmp_path):
    """A process may be killed as soon as a checkpoint is there."""
    small, there, go_on = parameters(on(MeshConfig())), [], threading.Event()

    def before():
        assert go_on.wait(60)
        there.append(saved_step.steps_in(tmp_path))

    with Store(tmp_path, 2, before=before) as store:
        store.save(1, small, small["values"], DATA)
        assert there == [], "the save has returned"
        go_on.set()
        store.save(2, small, small["values"], DATA)
    assert there == [[], [1]]


def test_a_save_fails_with_what_is_written_before_it(tmp_path):
    def before():
        raise StoreError("cannot write to gs://bucket/run: it is gone")

    small = parameters(on(MeshConfig()))
    failed = r"step 1 could not be written to .*: cannot write to gs://bucket/run: it is gone; no step before it is"
    with pytest.raises(StoreError, match=failed), Store(tmp_path, 2, before=before) as store:
        store.save(1, small, small["values"], DATA)
    assert saved_step.steps_in(tmp_path) == []


def test_a_part_that_cannot_be_written_is_told_while_orbax_waits_for_other_processes(tmp_path, monkeypatch):
    """orbax raises it behind a barrier of all processes, and where one fails the others do not come to it."""
    come, at_barrier = threading.Event(), synchronization.MultihostSynchronizedValue.set

    def waits(self, value):
        assert value or come.wait(60)
        at_barrier(self, value)

    def before():
        time.sleep(0.2)  # until somebody waits
        (tmp_path / "none" / "file").write_text("")

    monkeypatch.setattr(synchronization.MultihostSynchronizedValue, "set", waits)
    small = parameters(on(MeshConfig()))
    with Store(tmp_path, 2, before=before) as store:
        store.save(1, small, small["values"], DATA)
        with pytest.raises(StoreError, match=r"step 1 could not be written to .*No such file"):
            store.wait()
        assert not come.is_set(), "orbax still waits"
        come.set()


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
    with (
        Store(tmp_path, 2) as store,
        pytest.raises(StoreError, match=r"1 is damaged: parameters/d/.* is not"),
    ):
        store.restore_parameters(1, target(tree, on(MeshConfig())))


def only_file(folder: Path, pattern: str) -> Path:
    (file,) = folder.glob(pattern)
    return file


def truncate(pattern: str, size: int):
    def damage(step: Path) -> None:
        file = only_file(step, pattern)
        file.write_bytes(file.read_bytes()[:size])

    return damage


def empty_the_folder(step: Path) -> None:
    shutil.rmtree(step)
    step.mkdir()


def remove(name: str):
    def damage(step: Path) -> None:
        path = step / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()

    return damage


DAMAGES = [
    (empty_the_folder, "the folder is empty"),
    (remove("optimizer"), "optimizer is missing"),
    (remove("parameters"), "parameters is missing"),
    (remove("data"), "data is missing"),
    (remove("data/data.json"), "data/data.json is missing"),
    (remove("_CHECKPOINT_METADATA"), "_CHECKPOINT_METADATA is missing"),
    (remove("parameters/_METADATA"), "parameters/_METADATA is missing"),
    (remove("parameters/manifest.ocdbt"), "parameters/manifest.ocdbt is missing"),
    (truncate("optimizer/d/*", 100), "is not what was saved"),
    (truncate("parameters/_METADATA", 0), "parameters/_METADATA is empty"),
    (truncate("data/data.json", 10), "data/data.json is not what was saved"),
    (truncate("_CHECKPOINT_METADATA", 5), "_CHECKPOINT_METADATA is not what was saved"),
    (truncate("digests.0.sha256", 0), "digests.0.sha256 is empty"),
    (truncate("digests.0.sha256", 200), "digests.0.sha256 is not what was saved"),
]


@pytest.fixture(scope="module")
def two_steps(tmp_path_factory) -> Path:
    """Checkpoints of steps 1 and 2, for copies."""
    folder = tmp_path_factory.mktemp("saved")
    save(folder, 1, 2)
    return folder


CASES = [(damage, why, True) for damage, why in DAMAGES]
CASES += [(damage, why, False) for damage, why in DAMAGES if "digests" not in why]


@pytest.mark.parametrize(
    ("damage", "why", "digests"), CASES, ids=[f"{why}{'' if digests else ', no digests'}" for _, why, digests in CASES]
)
def test_a_damaged_newest_checkpoint_is_passed_over(two_steps, tmp_path, caplog, damage, why, digests):
    """One warning says what is damaged, what was taken and where the damaged one is; its step can be saved again."""
    folder = tmp_path / "checkpoints"
    shutil.copytree(two_steps, folder)
    damage(folder / "2")
    if not digests:
        for file in folder.glob("*/digests.*"):
            file.unlink()
    sharding = on(MeshConfig())
    tree = parameters(sharding)
    with Store(folder, 2) as store:
        found = store.restore_newest(target(tree, sharding), target(tree["values"], sharding))
        assert found is not None
        assert (found.step, found.data) == (1, DATA)
        jax.tree.map(np.testing.assert_array_equal, found.parameters, tree)
    line = next(record.getMessage() for record in caplog.records if "damaged checkpoints" in record.getMessage())
    assert "using step 1, the newest sound checkpoint" in line
    assert f"moved to {folder / '2.damaged'}, which can be deleted" in line
    if digests:
        assert why in line
    assert {path.name for path in folder.iterdir()} == {"1", "2.damaged"}


def test_a_step_moved_aside_is_saved_again(two_steps, tmp_path, caplog):
    shutil.copytree(two_steps, tmp_path, dirs_exist_ok=True)
    sharding = on(MeshConfig())
    tree = parameters(sharding)
    for _ in range(2):
        empty_the_folder(tmp_path / "2")
        with Store(tmp_path, 2) as store:
            store.restore_newest(target(tree, sharding), target(tree["values"], sharding))
            store.save(2, tree, tree["values"], DATA)
    assert {path.name for path in tmp_path.iterdir()} == {"1", "2", "2.damaged", "2.damaged.2"}
    with Store(tmp_path, 2, reader=True) as store:
        found = store.restore_newest(target(tree, sharding))
    assert found is not None
    assert found.step == 2


def test_a_reader_leaves_a_damaged_checkpoint_where_it_is(two_steps, tmp_path, caplog):
    shutil.copytree(two_steps, tmp_path, dirs_exist_ok=True)
    remove("parameters")(tmp_path / "2")
    tree = target(parameters(on(MeshConfig())), on(MeshConfig()))
    with Store(tmp_path, 2, reader=True) as store:
        found = store.restore_newest(tree)
        assert found is not None
        assert (found.step, found.optimizer, found.data) == (1, None, None)
        with pytest.raises(StoreError, match=r"2 is damaged: parameters is missing; take another step \(1\)"):
            store.restore_parameters(2, tree)
    assert f"delete {tmp_path / '2'}, or train on" in caplog.text
    assert {path.name for path in tmp_path.iterdir()} == {"1", "2"}


def test_a_reader_follows_a_run_that_goes_on_and_removes_what_is_read(two_steps, tmp_path, monkeypatch, caplog):
    shutil.copytree(two_steps / "1", tmp_path / "1")
    tree = target(parameters(on(MeshConfig())), on(MeshConfig()))
    verify = saved_step.verify

    def meanwhile(folder, items):
        if folder.name == "1":
            shutil.copytree(two_steps / "2", tmp_path / "2")
            shutil.rmtree(tmp_path / "1")
        return verify(folder, items)

    monkeypatch.setattr(saved_step, "verify", meanwhile)
    with Store(tmp_path, 1, reader=True) as store:
        found = store.restore_newest(tree)
    assert found is not None and found.step == 2
    assert "damaged" not in caplog.text


def test_only_names_that_are_written_for_steps_are_steps(two_steps, tmp_path):
    for name in ("1", "0002", "٣", "4.damaged"):
        (tmp_path / name).mkdir()
    assert Store(tmp_path, 1, reader=True).steps == [1]


def test_no_sound_checkpoint_is_an_error_that_says_what_to_delete(two_steps, tmp_path):
    shutil.copytree(two_steps, tmp_path, dirs_exist_ok=True)
    for step in ("1", "2"):
        empty_the_folder(tmp_path / step)
    tree = target(parameters(on(MeshConfig())), on(MeshConfig()))
    expected = rf"no sound checkpoint: step 2 \(the folder is empty\), step 1 .* delete {tmp_path}/2 {tmp_path}/1 to"
    with Store(tmp_path, 2) as store, pytest.raises(StoreError, match=expected):
        store.restore_newest(tree)
    assert {path.name for path in tmp_path.iterdir()} == {"1", "2"}, "nothing is moved when nothing is taken"


def test_another_model_is_no_damage(two_steps):
    sharding = on(MeshConfig())
    with Store(two_steps, 2) as store, pytest.raises(StoreError, match="2 holds another model"):
        store.restore_newest(target({"values": {"c": parameters(sharding)["values"]["b"]}}, sharding))
    assert {path.name for path in two_steps.iterdir()} == {"1", "2"}


def test_every_flipped_bit_is_noticed(two_steps, tmp_path):
    """In whichever file it is, the digests themselves included."""
    shutil.copytree(two_steps / "2", tmp_path, dirs_exist_ok=True)
    items = (PARAMETERS, OPTIMIZER, DATA_ITEM)
    chance = random.Random(0)
    assert verify(tmp_path, items)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) > 15
    for file in files:
        saved = file.read_bytes()
        for place in chance.sample(range(8 * len(saved)), 8):
            flipped = bytearray(saved)
            flipped[place // 8] ^= 1 << place % 8
            file.write_bytes(flipped)
            with pytest.raises(DamageError, match=r"is not what was saved|is missing"):
                verify(tmp_path, items)
        file.write_bytes(saved)
    assert verify(tmp_path, items)


def test_digests_are_those_of_sha256sum(two_steps):
    lines = (two_steps / "2" / "digests.0.sha256").read_text().splitlines()
    assert lines[-1].startswith("# ")
    for line in lines[:-1]:
        digest, name = line.split("  ")
        assert hashlib.sha256((two_steps / "2" / name).read_bytes()).hexdigest() == digest


def test_a_checkpoint_from_before_digests_is_read_with_a_warning(two_steps, tmp_path, caplog):
    shutil.copytree(two_steps, tmp_path, dirs_exist_ok=True)
    (tmp_path / "2" / "digests.0.sha256").unlink()
    sharding = on(MeshConfig())
    tree = parameters(sharding)
    with Store(tmp_path, 2, reader=True) as store:
        jax.tree.map(np.testing.assert_array_equal, store.restore_parameters(2, target(tree, sharding)), tree)
    (line,) = [record.getMessage() for record in caplog.records if record.name.startswith("rave_jax")]
    assert f"{tmp_path / '2'} has no digests, so damage in it would not be noticed" in line


def test_what_may_not_be_read_is_no_damage(two_steps, tmp_path, monkeypatch):
    """A folder with other permissions is not moved away."""
    shutil.copytree(two_steps, tmp_path, dirs_exist_ok=True)

    def denied(*_: object) -> None:
        raise PermissionError(13, "Permission denied", str(tmp_path / "2" / "parameters" / "_METADATA"))

    monkeypatch.setattr("rave_jax.checkpoint.digests._digests", denied)
    with (
        Store(tmp_path, 2) as store,
        pytest.raises(StoreError, match="_METADATA cannot be read: Permission"),
    ):
        store.restore_newest({})
    assert {path.name for path in tmp_path.iterdir()} == {"1", "2"}


def test_a_save_that_fails_in_the_background_is_told_of_at_once_by_its_step(tmp_path, caplog):
    """Files that may not grow stand for a disk that fills up while arrays are written."""
    sharding = on(MeshConfig())
    small, noise = parameters(sharding), np.random.default_rng(0).normal(size=(64, 64)).astype(np.float32)
    large = {"values": {"a": jax.device_put(noise, sharding)}}
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    expected = pytest.raises(
        StoreError, match=r"step 2 could not be written to .*: File too large.*last step that is saved is 1, and"
    )
    try:
        with expected, Store(tmp_path, 2) as store:
            store.save(1, small, small["values"], DATA)
            store.wait()
            store.check()
            resource.setrlimit(resource.RLIMIT_FSIZE, (8192, before[1]))
            store.save(2, large, small["values"], DATA)
            for _ in range(500):
                store.check()
                time.sleep(0.01)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "Traceback" not in caplog.text
    with Store(tmp_path, 2) as store:
        assert store.steps == [1]
        store.save(3, small, small["values"], DATA)
    assert {path.name for path in tmp_path.iterdir()} == {"1", "3"}


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
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    with Store(tmp_path, 2) as store:
        monkeypatch.setattr(ocp.training.Checkpointer, "save_checkpointables_async", full)
        with pytest.raises(
            StoreError,
            match=r"step 1 could not be written to .*: no space is left .* free.; no step before it is saved",
        ):
            store.save(1, {}, {}, {})


def test_a_disk_that_is_full_when_orbax_ends_is_named_and_hides_no_other_error(tmp_path, monkeypatch):
    close, small = ocp.training.Checkpointer.close, parameters(on(MeshConfig()))

    def full(checkpointer: ocp.training.Checkpointer) -> None:
        close(checkpointer)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(ocp.training.Checkpointer, "close", full)
    with pytest.raises(KeyError), Store(tmp_path, 2) as store:
        store.save(1, small, small["values"], DATA)
        raise KeyError
    said = r"checkpoints could not be written to .*: .*No space left.*; the last step that is saved is 2, and"
    with pytest.raises(StoreError, match=said), Store(tmp_path, 2) as store:
        store.save(2, small, small["values"], DATA)


def test_a_directory_that_vanished_is_named_at_once(tmp_path):
    """Left to orbax, the error would come after minutes."""
    with Store(tmp_path / "checkpoints", 1) as store:
        (tmp_path / "checkpoints").rmdir()
        (tmp_path / "checkpoints").write_text("in the way")
        with pytest.raises(StoreError, match=r"cannot write to .*checkpoints"):
            store.save(1, {}, {}, {})


def test_a_run_directory_that_vanished_is_not_made_again(tmp_path):
    with Store(tmp_path / "run" / "checkpoints", 1) as store:
        shutil.rmtree(tmp_path / "run")
        with pytest.raises(StoreError, match=r"run is gone, moved or deleted while the run was under way"):
            store.save(1, {}, {}, {})
    assert not list(tmp_path.iterdir())

"""Checkpoints in a gs:// bucket, which a folder stands for: as on a disk, but for what makes one finished."""

from __future__ import annotations

import logging

import jax
import numpy as np
import pytest
import tensorstore as ts
from orbax.checkpoint._src.serialization import tensorstore_utils

from rave_jax.checkpoint import buckets
from rave_jax.checkpoint.buckets import COMMITTED, files_under, folder_at
from rave_jax.checkpoint.store import Store, StoreError
from rave_jax.config import ConfigError
from rave_jax.parallel.mesh import MeshConfig
from tests.buckets import pretend
from tests.checkpoint.test_store import DATA, on, save, target

RUN = "gs://bucket/run/checkpoints"
S3 = "s3://bucket/run/checkpoints"


@pytest.fixture
def bucket(tmp_path, monkeypatch):
    pretend(tmp_path, monkeypatch)
    return tmp_path / "bucket" / "run" / "checkpoints"


def restored(tree, url=RUN):
    sharding = on(MeshConfig(fsdp=2, tensor=4))
    with Store(url, 2) as store:
        return store.restore_newest(target(tree, sharding), target(tree["values"], sharding))


@pytest.mark.parametrize("url", [RUN, S3])
def test_what_was_saved_comes_back_on_another_mesh_and_the_newest_are_kept(bucket, url):
    tree = save(url, 1, 2, 3)
    with Store(url, 2, reader=True) as store:
        assert store.steps == [2, 3]
    found = restored(tree, url)
    assert (found.step, found.data) == (3, DATA)
    jax.tree.map(np.testing.assert_array_equal, (found.parameters, found.optimizer), (tree, tree["values"]))
    assert "digests.0.sha256" in files_under(folder_at(f"{url}/3"))
    assert {path.name for path in bucket.iterdir()} == {"2", "3"}


def test_one_without_its_commit_is_no_checkpoint(bucket):
    tree = save(RUN, 1, 2)
    (bucket / "2" / COMMITTED).unlink()
    assert restored(tree).step == 1


def test_a_damaged_newest_is_passed_over_with_a_line(bucket, caplog):
    tree = save(RUN, 1, 2)
    victim = max((bucket / "2" / "parameters").rglob("d/*"), key=lambda path: path.stat().st_size)
    data = bytearray(victim.read_bytes())
    data[len(data) // 2] ^= 1
    victim.write_bytes(data)
    with caplog.at_level(logging.WARNING):
        assert restored(tree).step == 1
    assert "is not what was saved (its sha256 differs)); using step 1, the newest sound checkpoint" in caplog.text
    assert (bucket / "2.damaged").is_dir() and not (bucket / "2").exists()


def test_a_bucket_that_takes_no_files_is_one_line(bucket, monkeypatch):
    def denied(*_, **__):
        raise PermissionError(13, "403: no storage.objects.create access")

    monkeypatch.setattr(type(buckets.file_system(RUN)), "open", denied)
    with pytest.raises(StoreError, match=r"cannot write to gs://bucket/run/checkpoints: .*403: no storage"):
        Store(RUN, 2)


@pytest.mark.parametrize("url", ["gs://", "gs://bucket", "gs://bucket/"])
def test_a_url_without_a_folder_is_refused(bucket, url):
    with pytest.raises(ConfigError, match="names no folder in a bucket, expected gs://BUCKET/FOLDER"):
        folder_at(url)


@pytest.mark.parametrize(("url", "package", "extra"), [(RUN, "gcsfs", "gcs"), (S3, "s3fs", "s3")])
def test_the_package_that_is_missing_is_named(monkeypatch, url, package, extra):
    monkeypatch.setattr(buckets.importlib.util, "find_spec", lambda _: None)
    needs = rf"{url[:2]}:// buckets need the package {package}: pip install 'rave-jax\[{extra}\]'"
    with pytest.raises(ConfigError, match=needs):
        folder_at(url)


def test_tensorstore_has_the_drivers_that_orbax_is_told_of(bucket, monkeypatch):
    monkeypatch.undo()  # Google's and Amazon's, not the stand-in
    buckets._let_orbax_write_s3()
    for url, driver in ((RUN, "gcs"), (S3, "s3")):
        spec = tensorstore_utils.build_kvstore_tspec(f"{url}/1/parameters", use_ocdbt=True)
        base = ts.KvStore.Spec(spec["base"]).to_json()
        assert (base["driver"], base["bucket"]) == (driver, "bucket")
        assert base["path"].rstrip("/") == "run/checkpoints/1/parameters"

"""A run directory in a bucket: its local copy, and the mark of the job that uses it."""

from __future__ import annotations

import contextlib
import os
import threading
from types import SimpleNamespace

import pytest

from rave_jax.checkpoint.saved_step import StoreError
from rave_jax.config import ConfigError
from rave_jax.training import lease
from rave_jax.training.config import TrainConfig
from rave_jax.training.directory import opened, run_directory
from rave_jax.training.lease import only_job_in_bucket
from rave_jax.training.lock import InUse
from rave_jax.training.mirror import Mirror
from tests.buckets import pretend

URL = "gs://bucket/run"


@pytest.fixture
def bucket(tmp_path, monkeypatch):
    pretend(tmp_path, monkeypatch)
    monkeypatch.setattr(lease, "RENEWED", 0.05)
    monkeypatch.setattr(lease, "ABANDONED", 0.5)
    return tmp_path / "bucket" / "run"


def test_what_changes_here_changes_there(bucket):
    mirror = Mirror(URL)
    (mirror.local / "model").mkdir()
    (mirror.local / "model" / "config.json").write_text("{}")
    (mirror.local / "metrics.jsonl").write_text("1")
    (mirror.local / "config.tmp").write_text("half")
    mirror.push()
    assert sorted(path.name for path in bucket.iterdir()) == ["metrics.jsonl", "model"]
    (mirror.local / "metrics.jsonl").write_text("1\n2")
    (mirror.local / "model" / "config.json").unlink()
    mirror.push()
    assert (bucket / "metrics.jsonl").read_text() == "1\n2"
    assert not (bucket / "model" / "config.json").exists()


def test_a_start_finds_all_but_checkpoints_and_events(bucket):
    for name in ("config.json", "evaluation/a/summary.json", "checkpoints/1/data", "tensorboard/events", ".lock"):
        (bucket / name).parent.mkdir(parents=True, exist_ok=True)
        (bucket / name).write_text("{}")
    directory = run_directory(URL)
    assert {path.name for path in directory.path.iterdir()} == {"config.json", "evaluation"}
    assert str(directory.checkpoint(1)) == "gs://bucket/run/checkpoints/1"
    with opened(URL) as again:
        assert again.config.exists()
    assert not again.path.exists()
    assert directory.shown(directory.path / "report.md") == "gs://bucket/run/report.md"


def test_the_last_push_is_at_the_end_and_only_of_who_pushes(bucket):
    reader, writer = Mirror(URL), Mirror(URL)
    writer.start()
    for mirror in (reader, writer):
        (mirror.local / f"{mirror is writer}").write_text("")
        mirror.close()
    assert [path.name for path in bucket.iterdir()] == ["True"]


def test_a_bucket_that_cannot_be_written_is_one_line(bucket, monkeypatch):
    mirror = Mirror(URL)
    (mirror.local / "config.json").write_text("{}")
    bucket.parent.write_text("in the way")
    with pytest.raises(StoreError, match="cannot write to gs://bucket/run: "):
        mirror.push()


def test_a_second_job_is_refused_by_name(bucket):
    with only_job_in_bucket(URL, print):
        who = rf"process {os.getpid()} on "
        refused = rf"gs://bucket/run is in use by another job \({who}.*\): wait until it ends, end it, or choose"
        with pytest.raises(InUse, match=refused), only_job_in_bucket(URL, print):
            pass
    assert not list(bucket.iterdir()), "nothing is left behind"


def test_what_a_dead_job_left_is_taken_after_a_while(bucket, caplog):
    bucket.mkdir(parents=True)
    (bucket / ".lock").write_text('{"holder": "a", "who": "process 7 on host"}')
    with only_job_in_bucket(URL, print):
        assert "has the mark of another job (process 7 on host); it is watched for up to" in caplog.text
    assert not (bucket / ".lock").exists()


def test_of_two_jobs_that_waited_for_a_dead_one_the_later_leaves_what_the_first_has_put_there(bucket, monkeypatch):
    """Between the last look at the dead job's mark and its removal."""
    bucket.mkdir(parents=True)
    (bucket / ".lock").write_text('{"holder": "dead"}')
    looks = iter((0.0, 0.0))

    def monotonic():
        if (now := next(looks, None)) is None:
            (bucket / ".lock").write_text('{"holder": "b", "who": "process 8 on host"}')
            return 1.0
        return now

    monkeypatch.setattr(lease, "time", SimpleNamespace(sleep=lambda _seconds: None, monotonic=monotonic))
    with pytest.raises(InUse, match=r"in use by another job \(process 8 on host\)"), only_job_in_bucket(URL, print):
        pass
    assert "process 8" in (bucket / ".lock").read_text()


def test_a_job_that_lost_its_directory_is_told(bucket):
    told, heard = [], threading.Event()

    def lost(words):
        told.append(words)
        heard.set()

    with contextlib.suppress(OSError), only_job_in_bucket(URL, lost):
        (bucket / ".lock").write_text('{"holder": "other", "who": "process 8 on host"}')
        assert heard.wait(10)
    assert told == ["gs://bucket/run was taken by another job (process 8 on host) while this one was not heard of"]
    assert (bucket / ".lock").exists(), "it is the other's"


def test_other_kinds_of_buckets_are_refused():
    for url in (URL, "s3://bucket/run"):
        assert TrainConfig(output_dir=url).output_dir == url
    with pytest.raises(ConfigError, match=r"output_dir is 'az://b/run', expected a path of a file system"):
        TrainConfig(output_dir="az://b/run")

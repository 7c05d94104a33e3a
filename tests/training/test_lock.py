"""One job at a time in a directory."""

from __future__ import annotations

import errno
import fcntl
import subprocess
import sys

import pytest

from rave_jax.config import ConfigError
from rave_jax.training.lock import NAME, only_job


def test_a_second_job_is_refused_by_name_and_the_first_leaves_nothing(tmp_path):
    with only_job(tmp_path):
        with (
            pytest.raises(ConfigError, match=r"in use by another job \(process \d+ on .*, started \d{4}-"),
            only_job(tmp_path),
        ):
            pass
        assert [path.name for path in tmp_path.iterdir()] == [NAME]
    assert not list(tmp_path.iterdir())
    with only_job(tmp_path):
        pass


def test_a_dead_job_holds_nothing(tmp_path):
    holder = (
        "import fcntl, os, sys, time; file = open(sys.argv[1], 'w'); file.write('process 1 on there'); file.flush();"
        "fcntl.flock(file, fcntl.LOCK_EX); print(flush=True); time.sleep(60)"
    )
    job = subprocess.Popen([sys.executable, "-S", "-c", holder, str(tmp_path / NAME)], stdout=subprocess.PIPE)
    assert job.stdout is not None
    job.stdout.readline()
    with pytest.raises(ConfigError, match="process 1 on there"), only_job(tmp_path):
        pass
    job.kill()
    job.wait()
    assert (tmp_path / NAME).exists()
    with only_job(tmp_path):
        pass


def test_a_file_system_without_locks_is_said(tmp_path, monkeypatch, caplog):
    def none(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", none)
    with only_job(tmp_path):
        assert "is on a file system without locks (No locks available)" in caplog.text

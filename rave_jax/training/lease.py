"""One job at a time in a run directory in a bucket, where there are no locks.

The job writes an object that only one can make, and renews it. One whose holder died is renewed no more: the next job
watches it for a while before it takes its place. No clocks of two machines are compared.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Generator
from typing import Any

from rave_jax.checkpoint.buckets import file_system
from rave_jax.checkpoint.saved_step import StoreError, first_line
from rave_jax.training.lock import NAME, InUse

log = logging.getLogger(__name__)

RENEWED, ABANDONED = 10.0, 45.0
"""Seconds between two renewals, and after which one that was not renewed is nobody's."""


class _Object:
    """The object in the bucket that the holder writes."""

    def __init__(self, url: str):
        self._fs, self._path = file_system(url), f"{url}/{NAME}"

    def read(self) -> bytes | None:
        """What it says; None where there is none."""
        try:
            return self._fs.cat_file(self._path)
        except FileNotFoundError:
            return None

    def make(self, text: bytes) -> bool:
        """Write it where there is none: only one job can."""
        try:
            self._fs.pipe_file(self._path, text, mode="create")
        except FileExistsError:
            return False
        return True

    def write(self, text: bytes) -> None:
        self._fs.pipe_file(self._path, text)

    def remove(self) -> None:
        with contextlib.suppress(FileNotFoundError):
            self._fs.rm_file(self._path)


@contextlib.contextmanager
def only_job_in_bucket(url: str, lost: Callable[[str], Any]) -> Generator[None]:
    """Hold a run directory in a bucket; for one process of a job.

    Args:
        url: of the run directory.
        lost: told, in a thread, when another job has taken the directory although this one lives.

    Raises:
        InUse: another job holds it.
        StoreError: the bucket cannot be read or written.
    """
    place, holder = _Object(url), secrets.token_hex(8)
    count = 0

    def text() -> bytes:
        began = f"process {os.getpid()} on {socket.gethostname()}"
        return json.dumps({"holder": holder, "who": began, "renewed": count}).encode()

    try:
        while not place.make(text()):
            _wait_until_abandoned(place, url)
    except InUse:
        raise
    except Exception as error:  # fsspec, gcsfs and google's libraries raise kinds of their own
        raise StoreError(f"cannot write to {url}: {first_line(error)}") from error
    ended = threading.Event()

    def renew() -> None:
        nonlocal count
        while not ended.wait(RENEWED):
            count += 1
            # A bucket that does not answer for a while is no reason to end: the run says so where it writes.
            with contextlib.suppress(Exception):
                if (found := place.read()) is not None and _parsed(found).get("holder") != holder:
                    lost(f"{url} was taken by another job ({_who(found)}) while this one was not heard of")
                    return
                place.write(text())

    thread = threading.Thread(target=renew, name="lease", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        with contextlib.suppress(Exception):
            if (found := place.read()) is not None and _parsed(found).get("holder") == holder:
                place.remove()


def _wait_until_abandoned(place: _Object, url: str) -> None:
    """Watch another job's object; remove it when it is nobody's.

    Raises:
        InUse: it is renewed.
    """
    first, until = place.read(), time.monotonic() + ABANDONED
    if first is not None:
        log.warning(
            "warning: %s has the mark of another job (%s); it is watched for up to %.0f s, since a job that was killed "
            "leaves it behind",
            url,
            _who(first),
            ABANDONED,
        )
    while first is not None and time.monotonic() < until:
        time.sleep(min(1.0, RENEWED / 4))
        found = place.read()
        if found is None:
            return
        if found != first:
            raise _in_use(url, found)
    # Others may have watched the same mark: what one of them has put in its place stays.
    found = place.read()
    if found is not None and found != first:
        raise _in_use(url, found)
    place.remove()


def _in_use(url: str, found: bytes) -> InUse:
    return InUse(
        f"{url} is in use by another job ({_who(found)}): wait until it ends, end it, or choose another output_dir"
    )


def _parsed(found: bytes) -> dict[str, Any]:
    try:
        told = json.loads(found)
    except ValueError:
        return {}
    return told if isinstance(told, dict) else {}


def _who(found: bytes) -> str:
    return str(_parsed(found).get("who", "its process is not known"))

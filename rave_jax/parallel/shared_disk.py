"""Do all processes of a job see one file system? Asked before anything is written that the others need."""

from __future__ import annotations

import contextlib
import itertools
import secrets
import socket
import time
from pathlib import Path

from rave_jax.config import ConfigError
from rave_jax.parallel import notes
from rave_jax.parallel.hosts import HostsConfig, HostsError, place

LATE = 20.0
"""Seconds after which a file of another host must be seen: network file systems keep old listings for a while."""


def check_shared(directory: Path, field: str, config: HostsConfig) -> None:
    """Check that every process sees what process 0 writes in a directory. Does nothing in a job of one process.

    Args:
        directory: is there on process 0, which writes and removes a file in it.
        field: names the directory in messages.
        config: of the job.

    Raises:
        ConfigError: some do not see it; the same message on every process.
        HostsError: some did not answer in time.
        OSError: process 0 cannot write there.
    """
    here, count = place()
    if count == 1:
        return
    folder = f"shared/{next(_calls)}"
    if here == 0:
        token = directory / f".seen-by-all-{secrets.token_hex(8)}"
        token.write_text("Process 0 of a job has written this for the others to see.\n")
        notes.leave(f"{folder}/token/0", token.name)
    else:
        token = directory / _notes(f"{folder}/token", 1, config)["0"]
    try:
        until = time.monotonic() + LATE
        while not (there := token.exists()) and time.monotonic() < until:
            time.sleep(0.2)
            with contextlib.suppress(OSError):  # where nothing is shared, the folder itself may be missing
                list(directory.iterdir())  # some file systems look again only when the folder is listed
        answer = f"{'yes' if there else 'no'} {socket.gethostname()}"
        if here > 0:
            notes.leave(f"{folder}/seen/{here}", answer)
        else:
            _notes(f"{folder}/seen", count - 1, config)
    finally:
        if here == 0:
            token.unlink(missing_ok=True)
    if here == 0:
        notes.leave(f"{folder}/seen/0", answer)  # the last answer: none goes on before the file is gone
    answers = _notes(f"{folder}/seen", count, config)
    blind = [
        f"process {process} (on {text.split(' ', 1)[1]})"
        for process, text in sorted(answers.items())
        if text[:2] == "no"
    ]
    if blind:
        host = answers["0"].split(" ", 1)[1]
        raise ConfigError(
            f"{field} is {str(directory)!r}, which {', '.join(blind)} and process 0 (on {host}) do not share: a file "
            f"that process 0 wrote there was not seen within {LATE:.0f} s; "
            "all processes need one file system that every host has mounted, such as NFS"
        )


def _notes(folder: str, count: int, config: HostsConfig) -> dict[str, str]:
    found = notes.gather(folder, count, config.barrier_timeout)
    if len(found) < count:
        limit = config.barrier_timeout
        raise HostsError(f"check of the run directory: {len(found)} of {count} processes answered in {limit} s")
    return found


_calls = itertools.count()

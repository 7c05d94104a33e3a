"""Short texts that the processes of a job leave for each other, in the key-value store of jax's coordinator.

They need no device and no collective, so a process can leave one while its devices wait for something.
"""

from __future__ import annotations

import threading
import time

import jax
from orbax.checkpoint import multihost

ROOT = "rave_jax/"
_open = threading.Event()


def open_board() -> None:
    """Call it once this process is connected: an earlier call of the coordinator would end it."""
    _open.set()


def is_open() -> bool:
    """Can this process leave and read notes?"""
    return _open.is_set() and multihost.is_jax_distributed_client_initialized()


def leave(key: str, text: str) -> None:
    """Leave a note under a key; a note that is there is replaced. In a job of one process nobody would read it."""
    if not is_open():
        return
    try:
        multihost.get_jax_distributed_client().key_value_set(ROOT + key, text, allow_overwrite=True)
    except jax.errors.JaxRuntimeError:
        # The coordinator is gone, and with it whoever could read the note.
        return


def read(folder: str = "") -> dict[str, str]:
    """The notes whose keys start with `folder/` (all notes by default), without that folder; none for one process."""
    if not is_open():
        return {}
    prefix = ROOT + (f"{folder}/" if folder else "")
    try:
        found = multihost.get_jax_distributed_client().key_value_dir_get(prefix)
    except jax.errors.JaxRuntimeError:
        return {}
    return {key.removeprefix(prefix): text for key, text in found}


def gather(folder: str, count: int, seconds: float) -> dict[str, str]:
    """The notes of a folder, once there are `count`, or those that came in time."""
    until = time.monotonic() + seconds
    while len(found := read(folder)) < count and time.monotonic() < until:
        time.sleep(0.1)
    return found

"""One finished checkpoint on disk: is it sound, and what does it hold?"""

from __future__ import annotations

import errno
import json
import logging
import os
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import jax
from orbax.checkpoint import v1 as ocp

from rave_jax.checkpoint import digests, old_names
from rave_jax.checkpoint.buckets import is_committed
from rave_jax.checkpoint.digests import DamageError
from rave_jax.checkpoint.part_handlers import Hooks, hooked
from rave_jax.parallel import agree

PARAMETERS, OPTIMIZER, DATA = "parameters", "optimizer", "data"

_METADATA = "_CHECKPOINT_METADATA"
_LONGEST = 200
_SMALLEST_SHARE = 2**20
"""Bytes. Replicas share the writing of an array where each writes at least these; a share is a program of its own."""
_STEP = re.compile(r"0|[1-9][0-9]{0,17}")
"""How a step is written as the name of a folder; others, such as 0010, are none of ours."""
_OS_ERROR = re.compile(r"os_error_code='(\d+)'")


class StoreError(RuntimeError):
    """A checkpoint that cannot be written or read; the message names the directory and why."""


def _is_ours(record: logging.LogRecord) -> bool:
    return f"{os.sep}orbax{os.sep}" not in record.pathname


# orbax logs what it also raises, with whole tracebacks; a run says it in one line.
logging.getLogger("absl").addFilter(_is_ours)


def context(hooks: Hooks | None = None) -> ocp.Context:
    """How orbax reads and writes the parts of a checkpoint.

    Args:
        hooks: of saves; None to read.
    """
    made = ocp.Context()
    made.array.saving.min_slice_bytes_for_replica_parallel = _SMALLEST_SHARE
    registry = ocp.handlers.local_registry()
    json, tree = ocp.handlers.JsonHandler, ocp.handlers.PyTreeHandler
    if hooks is None:
        registry.add(json, checkpointable_name=DATA)
    else:
        registry.add(hooked(json, hooks, waits=True), checkpointable_name=DATA)
        for name in (PARAMETERS, OPTIMIZER):
            registry.add(hooked(tree, hooks), checkpointable_name=name)
    made.checkpointables.registry = registry
    return made


def steps_in(directory: Path) -> list[int]:
    """Steps of the finished checkpoints in a directory, ascending; an unfinished one has another name."""
    if not directory.is_dir():
        return []
    found = [path for path in directory.iterdir() if _STEP.fullmatch(path.name) and path.is_dir()]
    return sorted(int(path.name) for path in found if is_committed(path))


def verify(folder: Path, items: Collection[str]) -> bool:
    """Compare the files of some items with their digests. Every process of a job calls it and reads a share of them.

    Args:
        folder: the checkpoint.
        items: by name; the others are not checked.

    Returns:
        whether every file has a digest: those of a checkpoint from before there were digests, or whose job was killed
        before it wrote them, have none.

    Raises:
        DamageError: a file is not as it was saved.
        StoreError: a file cannot be read for a reason that is no damage, such as its permissions.
    """
    complete, damage, refusal = False, "", ""
    try:
        complete = _verify(folder, items)
    except DamageError as error:
        damage = str(error)
    except OSError as error:
        refusal = f"{error.filename or folder} cannot be read: {error.strerror or error}"
    found = agree.from_all([complete, damage, refusal])
    if refusals := [refusal for _, _, refusal in found if refusal]:
        raise StoreError(refusals[0])
    if damages := [damage for _, damage, _ in found if damage]:
        raise DamageError(damages[0])
    return all(complete for complete, _, _ in found)


def _verify(folder: Path, items: Collection[str]) -> bool:
    if not any(folder.iterdir()):
        raise DamageError("the folder is empty")
    for name in items:
        if not (folder / name).is_dir():
            raise DamageError(f"{name} is missing")
    saved = digests.read(folder)
    names = sorted(name for name in saved.files if "/" not in name or name.split("/")[0] in items)
    digests.check(folder, saved, names[jax.process_index() :: jax.process_count()])
    if not saved.complete:
        for name in (_METADATA, *(f"{DATA}/data.json" if item == DATA else f"{item}/_METADATA" for item in items)):
            _check_json(folder / name, name)
    return saved.complete


def _check_json(path: Path, name: str) -> None:
    if not path.is_file():
        raise DamageError(f"{name} is missing")
    try:
        found = json.loads(text := path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise DamageError(f"{name} is {'not JSON' if text else 'empty'}") from error
    if not isinstance(found, dict):
        raise DamageError(f"{name} is not what was saved: it is not a JSON object")


def load(folder: Path, targets: Mapping[str, Any], *, verified: bool) -> dict[str, Any]:
    """The items of a checkpoint, on the shardings of the abstract targets.

    Args:
        folder: the checkpoint.
        targets: by item; None for data.
        verified: its files are known to be what was saved, so that what fails is no damage.

    Raises:
        DamageError: not verified, and it cannot be read; the same on all processes.
        StoreError: it holds another model, or cannot be read for another reason than damage.
    """
    if verified:
        return _load(folder, targets, context(), verified=True)
    # Each process by itself: a barrier of orbax would keep those that can read their shards from one that cannot.
    alone = context()
    alone.multiprocessing.primary_host = jax.process_index()
    alone.multiprocessing.active_processes = {jax.process_index()}
    found, damage = {}, ""
    try:
        found = _load(folder, targets, alone, verified=False)
    except DamageError as error:
        damage = str(error)
    if damages := [damage for damage in agree.from_all(damage) if damage]:
        raise DamageError(damages[0])
    return found


def _load(folder: Path, targets: Mapping[str, Any], how: ocp.Context, *, verified: bool) -> dict[str, Any]:
    try:
        with how:
            stored = ocp.checkpointables_metadata(str(folder)).metadata
            for name in targets:
                if stored.get(name) is None and name != DATA:
                    raise ValueError(f"{name} has no description")
            old = old_names.has_old_names(stored[PARAMETERS])
            asked = old_names.renamed(dict(targets), old_names.old_name) if old else dict(targets)
            wrong = _differences(stored[PARAMETERS], asked[PARAMETERS])
            if wrong:
                raise StoreError(f"{folder} holds another model: {'; '.join(wrong)}")
            found = ocp.load_checkpointables(str(folder), asked)
            return old_names.renamed(found, old_names.new_name) if old else found
    except StoreError:
        raise
    except Exception as error:  # orbax and tensorstore raise many kinds for damaged files
        if verified or _is_no_damage(error):
            raise StoreError(f"{folder} cannot be restored: {first_line(error)}") from error
        raise DamageError(f"it cannot be read: {first_line(error)}") from error


def _is_no_damage(error: Exception) -> bool:
    """Did memory run out, or may the files not be read?"""
    denied = isinstance(error, OSError) and error.errno in (errno.EACCES, errno.EPERM)
    return (
        isinstance(error, MemoryError)
        or denied
        or any(code in str(error) for code in ("RESOURCE_EXHAUSTED", "PERMISSION_DENIED"))
    )


def first_line(error: BaseException) -> str:
    """What an error says, short enough for a message."""
    if found := _OS_ERROR.search(str(error)):  # tensorstore puts the reason behind a long path
        return os.strerror(int(found[1]))
    lines = str(error).strip().splitlines()
    return lines[0][:_LONGEST] if lines else type(error).__name__


def _differences(stored: Any, wanted: Any) -> list[str]:
    shapes = [
        {jax.tree_util.keystr(path, simple=True, separator="/"): tuple(leaf.shape) for path, leaf in leaves}
        for leaves in (jax.tree_util.tree_flatten_with_path(tree)[0] for tree in (stored, wanted))
    ]
    there, here = shapes
    return [
        *(f"{name} is missing" for name in here if name not in there),
        *(f"{name} is not expected" for name in there if name not in here),
        *(
            f"{name} is {there[name]}, expected {here[name]}"
            for name in here
            if there.get(name, here[name]) != here[name]
        ),
    ]

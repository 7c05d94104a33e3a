"""Does a tree of arrays fit into memory? Checked before the first byte of it is taken."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import jax

from rave_jax.config import ConfigError

CGROUP_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


def check_memory(tree: Any, what: str) -> None:
    """Refuse arrays that cannot fit into the memory of this process's devices, whatever else lies there.

    Args:
        tree: pytree of `jax.ShapeDtypeStruct` with shardings.
        what: they are, for the message.

    Raises:
        ConfigError: says how much is needed and how much there is.
    """
    needed: dict[jax.Device, int] = {}
    on_host = 0
    for leaf in jax.tree.leaves(tree):
        shard = math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        if leaf.sharding.memory_kind == "pinned_host":
            on_host += shard * len(leaf.sharding.addressable_devices)
            continue
        for device in leaf.sharding.addressable_devices:
            needed[device] = needed.get(device, 0) + shard
    on_host += sum(size for device, size in needed.items() if device.platform == "cpu")
    if on_host > host_memory():
        raise ConfigError(_too_much(what, on_host, "this machine", host_memory()))
    for device, size in needed.items():
        limit = None if device.platform == "cpu" else (device.memory_stats() or {}).get("bytes_limit")
        if limit is not None and size > limit:
            raise ConfigError(_too_much(what, size, f"device {device}", limit))


def host_memory() -> int:
    """Bytes of memory that a process of this machine can have: memory and swap, or less where a container sets it."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") + _swap()
    for path in CGROUP_LIMITS:
        try:
            total = min(total, int(Path(path).read_text()))
        except (OSError, ValueError):  # no such file, or "max"
            continue
    return total


def _swap() -> int:
    try:
        rows = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(row.split()[1]) * 1024 for row in rows if row.startswith("SwapTotal:"))


def _too_much(what: str, needed: int, where: str, there: int) -> str:
    return (
        f"{what} need {_gb(needed)} of memory, but {where} has {_gb(there)}: check the model's sizes, store parameters "
        "in bfloat16, or take more devices"
    )


def _gb(count: int) -> str:
    return f"{count / 1e9:,.0f} GB" if count >= 1e10 else f"{count / 1e9:.3g} GB"

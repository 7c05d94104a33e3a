"""Where a call would run, and why a backend cannot serve it, in plain sentences."""

from __future__ import annotations

import contextlib
from collections.abc import Generator
from contextvars import ContextVar
from typing import Any, NamedTuple

import jax
from jax.sharding import AbstractMesh

from rave_jax.parallel.sharding import current_mesh
from rave_jax.typing import Array

SMALL = 1 << 14
"""Queries times keys of a map that is not worth a kernel's grid: the windows of a vision tower."""

_interpreter: ContextVar[Any] = ContextVar("rave_jax_pallas_interpreter", default=False)


class Target(NamedTuple):
    """The devices that a program is traced for."""

    platform: str
    device_kind: str


def target() -> Target:
    """The devices of the current mesh, or else jax's default ones."""
    mesh = current_mesh() or jax.sharding.get_abstract_mesh()
    if isinstance(mesh, AbstractMesh):
        device = mesh.abstract_device
        if device is not None:
            return Target(device.platform or "tpu", device.device_kind)
        # Only on an abstract mesh is a program lowered for devices that are not here.
        if mesh.size > 1:
            return Target("any", "")
        found = jax.devices()[0]
    else:
        found = mesh.devices.flat[0]
    return Target(found.platform, found.device_kind)


@contextlib.contextmanager
def interpreted(how: Any = True) -> Generator[None]:
    """Run Pallas kernels by an interpreter, on any device. Enter it around tracing.

    Args:
        how: True, or `pltpu.InterpretParams`.
    """
    token = _interpreter.set(how)
    try:
        yield
    finally:
        _interpreter.reset(token)


def interpreter() -> Any:
    """What `pallas_call` is to take as `interpret`."""
    return _interpreter.get()


def against_pallas_tpu(q: Array, k: Array, v: Array) -> str | None:
    """Why the Pallas TPU kernels cannot serve, or None."""
    if len({x.dtype for x in (q, k, v)}) > 1:
        return f"q, k and v must have one dtype, not {q.dtype}, {k.dtype} and {v.dtype}"
    if q.dtype not in ("bfloat16", "float32"):
        return f"q, k and v must be bfloat16 or float32, not {q.dtype}"
    platform = target().platform
    if platform not in ("tpu", "any") and not interpreter():
        return f"its kernels run on TPUs, and the devices are {platform}"
    return None

"""Where a call would run, and why a backend cannot serve it, in plain sentences."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jax.sharding import AbstractDevice, AbstractMesh

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


class _Kernels(NamedTuple):
    """Pallas kernels of one kind, as a small one is lowered for them.

    Fields:
        called: in errors.
        lowering: in errors of jax.
        platform: that jax lowers for.
        device: one of theirs.
        slopes: do kernels trace the slopes of score functions?
        params: of the kernel.
    """

    called: str
    lowering: str
    platform: str
    device: AbstractDevice
    slopes: bool
    params: Any


_KERNELS = {
    "tpu": _Kernels("TPU", "TPU", "tpu", AbstractDevice("TPU v5 lite", num_cores=1, platform="tpu"), True, None),
    "gpu": _Kernels(
        "GPU",
        "Triton",
        "cuda",
        AbstractDevice("NVIDIA H100 80GB HBM3", num_cores=None, platform="gpu"),
        False,
        triton.CompilerParams(),
    ),
}


def against_lowering(
    function: Callable[[Any], Array], tile: Any, platform: Literal["tpu", "gpu"] = "tpu"
) -> str | None:
    """Why a score function cannot be traced into the Pallas kernels of a platform, or None. Found by lowering it in a
    small kernel, which needs no such device: for TPUs its slope too. GPUs have kernels for decoding alone.

    Args:
        function: of a tile; a `ScoreFunction`, whose `log2` and `factored` are tried as well, or a plain one.
        tile: a `Tile` of arrays or of their shapes, such as `Shape.of(term).tile(...)` gives; its fields are taken as
            whole tiles, as the kernels give them.
        platform: whose kernels.
    """
    kernels = _KERNELS[platform]
    bias, factored = (getattr(function, name, None) for name in ("log2", "factored"))

    def everything(given: Any) -> Any:
        if not kernels.slopes:
            return jnp.broadcast_to(function(given), TILE)
        found, pull = jax.vjp(lambda given: jnp.broadcast_to((bias or function)(given), TILE), given)
        return found, pull(found), factored and factored(given, jnp.reciprocal)

    leaves, tree = jax.tree.flatten(tile)
    whole = [jax.ShapeDtypeStruct(TILE, jnp.float32) for _ in leaves]

    def of_leaves(*leaves: Array) -> list[Array]:
        return jax.tree.leaves(everything(tree.unflatten(leaves)))

    why = _against(kernels, of_leaves, whole)
    if why is None:
        return None
    if "captures constants" in why:
        return "it holds arrays of its own, which belong among the features of its term"
    missing = re.search(rf"Unimplemented primitive in Pallas {kernels.lowering} lowering[^:]*: (\w+)", why)
    if missing:
        return f"{kernels.called} kernels have no operation {missing[1]}"
    for step in _steps(jax.make_jaxpr(of_leaves)(*whole).jaxpr):
        if _against(kernels, *_alone(step)) is not None:
            return f"{kernels.called} kernels cannot lower its operation {step.primitive.name} ({why})"
    return f"{kernels.called} kernels cannot lower it ({why})"


TILE = (8, 128)


def _against(kernels: _Kernels, run: Callable[..., Any], inputs: list[jax.ShapeDtypeStruct]) -> str | None:
    """What lowering a kernel of these inputs says, None if it goes well."""

    def kernel(*refs: Any) -> None:
        found = jax.tree.leaves(run(*(ref[...] for ref in refs[:-1])))
        refs[-1][...] = sum(jnp.broadcast_to(x.astype(jnp.float32), TILE) for x in found)

    call = pl.pallas_call(kernel, out_shape=jax.ShapeDtypeStruct(TILE, jnp.float32), compiler_params=kernels.params)

    def lowered() -> str | None:
        with jax.sharding.use_abstract_mesh(AbstractMesh((1,), ("x",), abstract_device=kernels.device)):
            try:
                jax.jit(call).trace(*inputs).lower(lowering_platforms=(kernels.platform,))
            except Exception as error:
                return (str(error).strip() or type(error).__name__).splitlines()[0]
        return None

    # A thread has no mesh of its caller, whose size no other mesh may change.
    with ThreadPoolExecutor(1) as apart:
        return apart.submit(lowered).result()


def _steps(jaxpr: Any) -> Iterator[Any]:
    """A program's operations, those of inner programs in the place of calls."""
    for step in jaxpr.eqns:
        inner = [getattr(x, "jaxpr", x) for x in step.params.values()]
        inner = [x for x in inner if hasattr(x, "eqns")]
        for program in inner:
            yield from _steps(program)
        if not inner:
            yield step


def _alone(step: Any) -> tuple[Callable[..., Any], list[jax.ShapeDtypeStruct]]:
    """An operation as a function, and its inputs that are no numbers of the program."""
    given = [getattr(x, "val", None) for x in step.invars]
    shapes = [
        jax.ShapeDtypeStruct(x.aval.shape, x.aval.dtype) for x, n in zip(step.invars, given, strict=True) if n is None
    ]

    def run(*arrays: Array) -> Any:
        rest = iter(arrays)
        return step.primitive.bind(*(next(rest) if n is None else n for n in given), **step.params)

    return run, shapes

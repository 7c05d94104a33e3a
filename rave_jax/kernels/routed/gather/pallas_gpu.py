"""Chosen regions by a Triton kernel for GPUs: each program reads its share of the listed regions where they lie.

Programs are (row, kv head, split), the splits as many as fill the device (flash decoding). The entries of the listed
regions, end to end, are the keys of a kv head; a turn of a program's loop takes a tile of them, several regions or a
part of one, so regions may have any number of entries. Turns go round the splits: they share evenly what the list
holds, which is known at run time only. Each program gives the sums of its softmax, and those are merged by XLA.

All query heads of a kv head are rows of one matrix, filled up to the 16 that a matrix unit takes; channels are filled
up to a power of two. What is filled up, and what lies behind the list's end, is masked in the loads and not read.
Where heads choose apart, the list is that of the regions that some head of the group chose, and each head has a mask.
Score functions are traced into the kernel. Int8 values are widened there, and their scales multiply scores and weights.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from rave_jax.kernels import support
from rave_jax.kernels.attention import Term, Tile
from rave_jax.kernels.attention.score import ScoreFunction, Shape, function_of, name_of
from rave_jax.kernels.routed.gather.base import Operands, finished, listed, union
from rave_jax.kernels.routed.gather.shards import split
from rave_jax.kernels.routed.host import HostRegions
from rave_jax.typing import Array, Bool, Float, Int

ROWS = 16
"""The least that a side of a product may have."""
MOST_ROWS = 32
"""Query heads of a kv head."""
MOST_CHANNELS = 256
"""Of keys, or of values: a tile of them stays in a processor's own memory."""
TILE_BYTES = 40 << 10
"""Of a turn's keys, values and what pair products read of keys: a processor of compute capability 8.9 has 99 KB for
these and the rest."""
TILE_KEYS = 128
PROGRAMS = 264
"""Programs to aim for: two for each processor of an H100."""
CAPABILITY = 80
"""Of a GPU, at least: Ampere brought bfloat16 and copies that go on beside the arithmetic."""
Functions = tuple[tuple[ScoreFunction, Shape], ...]
"""Of the terms, each with what its tile has."""


def against(operands: Operands, most: int) -> str | None:
    """Why this kernel cannot serve, or None."""
    q, k, v = operands.q, operands.k, operands.v
    if isinstance(k.values, HostRegions) or isinstance(v.values, HostRegions):
        return "the regions lie in host memory"
    if q.dtype not in ("bfloat16", "float32"):
        return f"q must be bfloat16 or float32, not {q.dtype}"
    for name, x in (("k", k), ("v", v)):
        if x.scale is None and x.values.dtype != q.dtype:
            return f"{name} must have q's dtype, {q.dtype}, or be int8 with scales, not {x.values.dtype}"
        # Pallas counts up to 2^32 bytes in 32 bits with a sign, which are too few for as many numbers of one byte.
        if x.values.dtype.itemsize == 1 and 1 << 31 < x.on_device.size <= 1 << 32:
            return f"an int8 stack may not have between 2^31 and 2^32 numbers, and {name} has {x.on_device.size}"
    if q.shape[2] > MOST_ROWS:
        return f"{q.shape[2]} query heads share a kv head, at most {MOST_ROWS} can"
    if max(k.shape[-1], v.shape[-1]) > MOST_CHANNELS:
        return f"keys and values may have {MOST_CHANNELS} channels, not {k.shape[-1]} and {v.shape[-1]}"
    if support.target().platform == "any" or support.interpreter():
        return None
    return _against_device(support.target().platform) or _against_functions(operands.terms)


def _against_functions(terms: tuple[Term, ...]) -> str | None:
    for term in terms:
        why = _against_function(function_of(term.function), Shape.of(term))
        if why is not None:
            return f"score function {name_of(term.function)} does not fit: {why}"
    return None


@functools.cache
def _against_function(function: ScoreFunction, shape: Shape) -> str | None:
    tile = shape.tile(lambda size: jax.ShapeDtypeStruct(size, jnp.float32))
    return support.against_lowering(function, tile, "gpu")


def _against_device(platform: str) -> str | None:
    if platform not in ("gpu", "cuda"):
        return f"its kernel runs on NVIDIA GPUs, and the devices are {platform}"
    try:
        found = triton.get_gpu_info()
    except ValueError as error:
        return f"its kernel runs on NVIDIA GPUs that jax knows: {error}"
    if found.compute_capability < CAPABILITY:
        return f"its kernel runs on NVIDIA GPUs of compute capability 8.0 and more, and this is {found.arch_name}"
    return None


def attention(operands: Operands, most: int, scale: float) -> tuple[Float[Array, "B K G c"], Float[Array, "B K G"]]:
    """Attention over listed regions; see `api.gather_attention`."""

    def on_device(operands: Operands) -> tuple[Array, Array]:
        N, R = operands.chosen.shape[2:]
        index, count = listed(union(operands.chosen), min(R, N * most))
        return over(operands, index, count, scale, interpret=bool(support.interpreter()))

    return split(on_device, operands)


def over(
    operands: Operands,
    index: Int[Array, "B K n"],
    count: Int[Array, "B K"],
    scale: float,
    *,
    interpret: bool = False,
) -> tuple[Float[Array, "B K G c"], Float[Array, "B K G"]]:
    """Attention over the first `count` of the listed regions.

    Args:
        operands: of `gather_attention`.
        index: numbers of regions; what is behind `count` is not read.
        count: how many of them are meant.
        scale: as there.
        interpret: run by Pallas' interpreter, on any device.
    """
    (B, K, G, _), (m, c) = operands.q.shape, operands.v.shape[3:]
    tile = keys_of_turn(operands)
    splits = max(1, min(-(-index.shape[2] * m // tile), -(-PROGRAMS // (B * K))))
    inputs = _inputs(operands, index, count)
    functions = tuple((function_of(term.function), Shape.of(term)) for term in operands.terms)
    run = pl.pallas_call(
        functools.partial(_gather_attention, names=tuple(inputs), tile=tile, functions=functions, scale=scale),
        grid=(B, K, splits),
        out_shape=[jax.ShapeDtypeStruct((B, K, splits, G, *width), jnp.float32) for width in ((c,), (), ())],
        compiler_params=triton.CompilerParams(num_warps=4, num_stages=2),
        interpret=interpret,
        name="gather_attention",
    )
    part, top, total = run(*inputs.values())
    highest = jnp.max(top, axis=2)
    shrink = jnp.exp(top - jnp.where(highest == -jnp.inf, 0.0, highest)[:, :, None])
    return finished(jnp.sum(part * shrink[..., None], axis=2), highest, jnp.sum(total * shrink, axis=2))


def keys_of_turn(operands: Operands) -> int:
    """Keys that a turn of a program's loop takes."""
    key = sum(padded(x.shape[-1]) for x in (operands.k, operands.v)) * operands.q.dtype.itemsize
    key += sum(padded(term.u.shape[-1]) * term.u.dtype.itemsize for term in operands.terms if term.u is not None)
    return max(ROWS, min(TILE_KEYS, 1 << (TILE_BYTES // key).bit_length() - 1))


def padded(size: int) -> int:
    """What Triton takes instead: a power of two, 16 at least."""
    return max(ROWS, 1 << (size - 1).bit_length())


def _inputs(operands: Operands, index: Array, count: Array) -> dict[str, Array]:
    """What the kernel reads, by name, each array whole."""
    q, k, v, real, chosen, terms = operands
    found = {"index": index, "count": count, "layers": jnp.stack([k.layer, v.layer])}
    found |= {"q": q, "k": k.on_device, "v": v.on_device, "real": real}
    found |= {f"{name}_scale": x.scale for name, x in (("k", k), ("v", v)) if x.scale is not None}
    if chosen.shape[2] > 1:
        found["chosen"] = chosen
    for n, term in enumerate(terms):
        found |= {f"{name}.{n}": x for name, x in _of_term(term, q.shape[:3]).items()}
    return found


def _of_term(term: Term, heads: tuple[int, ...]) -> dict[str, Array]:
    found = {f"query {name}": x.reshape(heads) for name, x in term.query.items()}
    found |= {f"key {name}": x for name, x in term.key.items()}
    found |= {f"head {name}": x.reshape(heads[1:]) for name, x in term.head.items()}
    if term.u is not None and term.w is not None:
        found |= {"u": term.u.reshape(*heads, -1), "w": term.w}
    if term.query_on is not None:
        found["query_on"] = term.query_on.reshape(heads)
    if term.key_on is not None:
        found["key_on"] = term.key_on
    return found


def _gather_attention(*refs: Any, names: tuple[str, ...], tile: int, functions: Functions, scale: float) -> None:
    """The kernel. It bears the name that a profile of the device shows."""
    given, (part_ref, top_ref, total_ref) = dict(zip(names, refs, strict=False)), refs[len(names) :]
    b, g, s = (pl.program_id(axis) for axis in range(3))
    splits, G, m = pl.num_programs(2), given["q"].shape[2], given["k"].shape[4]
    heads = jnp.arange(padded(G))
    is_head = heads < G
    lead = {name: (given["layers"][n], b, g) for n, name in enumerate("kv")}
    keys = given["count"][b, g] * m
    q = _rows(given["q"], (b, g, heads), is_head)
    biases = [_bias(given, n, *of, (b, g, heads), is_head) for n, of in enumerate(functions)]

    def turn(i: Array, sums: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        part, top, total = sums
        at = (s + i * splits) * tile + jnp.arange(tile)
        live = at < keys
        region, entry = _numbers(given["index"], (b, g, lax.div(at, m)), live), lax.rem(at, m)
        open_ = _numbers(given["real"], (b, region, entry), live)[None]
        if "chosen" in given:
            open_ = open_ & _numbers(given["chosen"], (b, g, heads[:, None], region[None]), is_head[:, None] & live)
        k = _rows(given["k"], (*lead["k"], region, entry), live)
        scores = _product(q, k.astype(q.dtype), 1) * scale
        if "k_scale" in given:
            scores = scores * _numbers(given["k_scale"], (*lead["k"], region, entry), live)
        dot = scores
        for bias in biases:
            scores = scores + bias(dot, region, entry, live)
        # Chosen, not added: entries without a key may hold anything finite.
        scores = jnp.where(open_, scores, -jnp.inf)
        new_top = jnp.maximum(top, jnp.max(scores, axis=1))
        anchor = jnp.where(new_top == -jnp.inf, 0.0, new_top)
        weights, shrink = jnp.exp(scores - anchor[:, None]), jnp.exp(top - anchor)
        total = shrink * total + jnp.sum(weights, axis=1)
        if "v_scale" in given:
            weights = weights * _numbers(given["v_scale"], (*lead["v"], region, entry), live)
        v = _rows(given["v"], (*lead["v"], region, entry), live)
        part = shrink[:, None] * part + _product(weights.astype(q.dtype), v.astype(q.dtype), 0)
        return part, new_top, total

    c, zero = given["v"].shape[-1], jnp.zeros(len(heads), jnp.float32)
    tiles = lax.div(keys + tile - 1, tile)
    start = jnp.zeros((len(heads), padded(c)), jnp.float32), zero - jnp.inf, zero
    # The rest of the tiles after s, in steps of the splits.
    part, top, total = lax.fori_loop(0, lax.div(tiles - s + splits - 1, splits), turn, start)
    channel = jnp.arange(padded(c))
    mask = is_head[:, None] & (channel < c)
    triton.store(part_ref.at[_same_shape(b, g, s, heads[:, None], channel[None])], part, mask=mask)
    triton.store(top_ref.at[b, g, s, heads], top, mask=is_head)
    triton.store(total_ref.at[b, g, s, heads], total, mask=is_head)


def _bias(
    given: dict[str, Any],
    n: int,
    function: ScoreFunction,
    shape: Shape,
    at: tuple[Array, Array, Int[Array, "G"]],
    is_head: Bool[Array, "G"],
) -> Callable[..., Float[Array, "G S"]]:
    """What the n-th term adds to a tile's scores."""
    b, g, heads = at

    def of_heads(name: str, where: tuple[Array, ...]) -> Array:
        return _numbers(given[f"{name}.{n}"], where, is_head)[:, None]

    query = {name: of_heads(f"query {name}", at) for name in shape.query}
    head = {name: of_heads(f"head {name}", (g, heads)) for name in shape.head}
    u = _rows(given[f"u.{n}"], at, is_head) if shape.pair else None
    query_on = of_heads("query_on", at) if f"query_on.{n}" in given else None

    def of_keys(dot: Array, region: Int[Array, "S"], entry: Int[Array, "S"], live: Bool[Array, "S"]) -> Array:
        where, pair = (b, g, region, entry), None
        key = {name: _numbers(given[f"key {name}.{n}"], where, live)[None] for name in shape.key}
        if u is not None:
            pair = _product(u, _rows(given[f"w.{n}"], where, live), 1) + function.OFFSET
        bias = function(Tile(dot, pair, query, key, head))
        if query_on is not None:
            bias = jnp.where(query_on, bias, 0.0)
        if f"key_on.{n}" in given:
            bias = jnp.where(_numbers(given[f"key_on.{n}"], (b, region, entry), live)[None], bias, 0.0)
        return bias

    return of_keys


def _numbers(ref: Any, at: tuple[Array, ...], mask: Array) -> Array:
    """Numbers at these places, 0 where masked."""
    return triton.load(ref.at[_same_shape(*at)], mask=mask, other=jnp.zeros((), ref.dtype))


def _rows(ref: Any, at: tuple[Array, ...], mask: Bool[Array, "n"]) -> Array:
    """[n, padded width]: rows of the last axis, 0 where masked and behind its end."""
    width = ref.shape[-1]
    channel = jnp.arange(padded(width))[None]
    at = tuple(x[:, None] if x.ndim else x for x in at)
    # A width that needs none is not masked: masks of whole rows keep loads wide.
    return _numbers(ref, (*at, channel), mask[:, None] & (channel < width) if padded(width) > width else mask[:, None])


def _same_shape(*at: Array) -> tuple[Array, ...]:
    """An index's numbers as they are, its arrays broadcast to one shape."""
    shape = jnp.broadcast_shapes(*(x.shape for x in at))
    return tuple(jnp.broadcast_to(x, shape) if x.ndim else x for x in at)


def _product(a: Array, b: Array, axis: int) -> Float[Array, "n m"]:
    """Of a's rows and b's rows (axis 1) or columns (0), summed in float32; float32 is not rounded to fewer bits."""
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return lax.dot_general(a, b, (((1,), (axis,)), ((), ())), precision=precision, preferred_element_type=jnp.float32)

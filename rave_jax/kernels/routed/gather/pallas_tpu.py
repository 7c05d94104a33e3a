"""Chosen regions by a Mosaic kernel for TPUs: the numbers of the regions are read before their blocks are copied.

A grid step takes several regions of one kv head, each a block of its own whose index map looks its number up in the
prefetched list; so copies are double-buffered, go on from one kv head to the next, and a number that repeats is not
copied again. All query heads of the kv head are in one step. Where heads choose apart, the list is that of the regions
that some head of the group chose, and steps behind its end do nothing.

What is added to the scores is made before the kernel and gathered as the regions are: a number for each listed entry
(is it real?), one for each head and listed region (did it choose?), and with score terms one for each head and listed
entry. The one function that may read <q, k> is traced into the kernel, and what it reads beside is gathered.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from rave_jax.kernels import support
from rave_jax.kernels.attention import Term, Tile
from rave_jax.kernels.attention.pallas_tpu.tile import LANES, MASKED, UNSEEN, product
from rave_jax.kernels.attention.score import ScoreFunction, Shape, function_of, reads_dot
from rave_jax.kernels.routed.gather.base import (
    Operands,
    listed,
    pair_product,
    switched_on,
    taken,
    union,
    with_terms,
)
from rave_jax.kernels.routed.gather.shards import split
from rave_jax.kernels.routed.host import HostRegions
from rave_jax.typing import Array, Float, Int

SUBLANES = 8
"""A region has a multiple of so many entries. Otherwise the compiler keeps the cache in an order of axes that wastes no
padding, and copies all of it for every call of a kernel."""
KEYS = 512
"""About how many keys a grid step takes."""
MOST_REGIONS = 16
"""Regions of a grid step, at most: each is an operand with an index of its own."""
MOST_LISTED = 1 << 16
"""Numbers that the list may have, all rows and kv heads (of all devices) together: it lies in scalar memory."""
MOST_BYTES = 8 << 20
"""Of a step's keys and values, both buffers."""


def against(operands: Operands, most: int) -> str | None:
    """Why this kernel cannot serve, or None."""
    q, k, v = operands.q, operands.k, operands.v
    if isinstance(k.values, HostRegions) or isinstance(v.values, HostRegions):
        return "the regions lie in host memory"
    found = support.against_pallas_tpu(q, k.values, v.values)
    if found is not None:
        return found
    found = against_shapes(k.shape[3], (k.shape[-1], v.shape[-1]), k.values.dtype)
    if found is not None:
        return found
    size = math.prod(q.shape[:2]) * length_of_list(operands, most)
    if size > MOST_LISTED:
        return f"its list of regions would have {size} numbers for all rows and kv heads, at most {MOST_LISTED} fit"
    return None


def against_shapes(m: int, widths: tuple[int, int], dtype: jnp.dtype) -> str | None:
    """Why this kernel cannot serve regions of m entries, with keys and values of these widths; or None."""
    if m % SUBLANES or any(width % LANES for width in widths):
        return (
            f"regions must have a multiple of {SUBLANES} entries, and keys and values a multiple of {LANES} channels, "
            f"not {m} and {' and '.join(map(str, widths))}"
        )
    step = 2 * regions_of_step(m) * m * sum(widths) * dtype.itemsize
    if step > MOST_BYTES:
        return f"regions of {m} entries take {step} bytes of the chip's own memory, at most {MOST_BYTES} are for them"
    return None


def attention(operands: Operands, most: int, scale: float) -> tuple[Float[Array, "B K G c"], Float[Array, "B K G"]]:
    """Attention over prefetched regions; see `api.gather_attention`."""

    def on_device(operands: Operands) -> tuple[Array, Array]:
        index, count = listed(union(operands.chosen), length_of_list(operands, most))
        return over(operands, index, count, scale, interpret=support.interpreter())

    return split(on_device, operands)


def over(
    operands: Operands,
    index: Int[Array, "B K n"],
    count: Int[Array, "B K"],
    scale: float,
    *,
    interpret: Any = False,
) -> tuple[Float[Array, "B K G c"], Float[Array, "B K G"]]:
    """Attention over the first `count` of the listed regions.

    Args:
        operands: of `gather_attention`.
        index: a multiple of `regions_of_step` numbers of regions.
        count: how many of them are meant.
        scale: as there.
        interpret: what `pallas_call` takes.
    """
    q, k, v = operands.q, operands.k.on_device, operands.v.on_device
    (B, K, G, h), (m, c) = q.shape, v.shape[4:]
    n = regions_of_step(m)
    steps = index.shape[2] // n
    if not interpret:
        # A cache that fits would else be brought to the chip whole before the kernel starts.
        k, v = (pltpu.with_memory_space_constraint(x, pltpu.HBM) for x in (k, v))
    extras = _extras(operands, index, n)
    reader, columns, read = _reader(operands.terms), {}, None
    if reader is not None:
        read = Reader.of(reader)
        extras |= _of_reader(reader, index, n, m)
        columns = _columns(reader, B, K)
    inputs = (q, *columns.values(), *extras.values(), *[k] * n, *[v] * n)
    outputs = (
        jax.ShapeDtypeStruct((B, K, G, c), jnp.float32),
        jax.ShapeDtypeStruct((B, K, G, LANES), jnp.float32),
    )

    def of_head(*shape: int) -> pl.BlockSpec:
        return pl.BlockSpec((None, None, *shape), lambda b, g, i, *_: (b, g, *[0] * len(shape)))

    in_specs = (
        of_head(G, h),
        *(of_head(*x.shape[2:]) for x in columns.values()),
        *(pl.BlockSpec((None, None, None, *x.shape[3:]), _step(x.ndim, n, K)) for x in extras.values()),
        *(pl.BlockSpec((None, None, None, None, m, h), _region(j, n, K, steps, 0)) for j in range(n)),
        *(pl.BlockSpec((None, None, None, None, m, c), _region(j, n, K, steps, 1)) for j in range(n)),
    )
    pairs = B * K * G * steps * n * m
    copied = [x.size * x.dtype.itemsize for x in (q, *columns.values(), *extras.values(), *outputs)]
    copied += [B * K * steps * n * m * width * x.dtype.itemsize for x, width in ((k, h), (v, c))]
    run = pl.pallas_call(
        functools.partial(_kernel, names=(*columns, *extras), n=n, K=K, scale=scale, reader=read),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(B, K, steps),
            in_specs=in_specs,
            out_specs=(of_head(G, c), of_head(G, LANES)),
            scratch_shapes=(
                pltpu.VMEM((G, LANES), jnp.float32),
                pltpu.VMEM((G, LANES), jnp.float32),
                pltpu.VMEM((G, c), jnp.float32),
            ),
        ),
        out_shape=outputs,
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
        cost_estimate=pl.CostEstimate(flops=2 * pairs * (h + c), transcendentals=pairs, bytes_accessed=sum(copied)),
        interpret=interpret,
        name="gather_attention",
    )
    layers = jnp.stack([operands.k.layer, operands.v.layer])
    out, lse = run(index.reshape(-1), count.reshape(-1), layers, *inputs)
    lse = lse[..., 0]
    return out, jnp.where(lse >= UNSEEN, -jnp.inf, lse)


def regions_of_step(m: int) -> int:
    """Regions of m entries that a grid step takes."""
    return max(1, min(MOST_REGIONS, KEYS // m))


def length_of_list(operands: Operands, most: int) -> int:
    """Of a kv head's list: all that its heads may choose, in whole steps."""
    N, R = operands.chosen.shape[2:]
    n = regions_of_step(operands.k.shape[3])
    return -(-min(R, N * most) // n) * n


def _region(j: int, n: int, K: int, steps: int, operand: int) -> Callable[..., tuple[Any, ...]]:
    """Index map of a step's j-th region, of keys (operand 0) or values (1). Behind the list's end it stays at the one
    before: nothing is copied."""

    def at(b: Any, g: Any, i: Any, index: Any, count: Any, layers: Any) -> tuple[Any, ...]:
        row = b * K + g
        i = jnp.minimum(i, jnp.maximum(count[row] - 1, 0) // n)
        i = jnp.where((i > 0) & (i * n + j >= count[row]), i - 1, i)
        return layers[operand], b, g, index[(row * steps + i) * n + j], 0, 0

    return at


def _step(axes: int, n: int, K: int) -> Callable[..., tuple[Any, ...]]:
    """Index map of what lies step by step: behind the list's end it stays where it is."""

    def at(b: Any, g: Any, i: Any, _index: Any, count: Any, _layers: Any) -> tuple[Any, ...]:
        last = jnp.maximum(count[b * K + g] - 1, 0) // n
        return b, g, jnp.minimum(i, last), *[0] * (axes - 3)

    return at


def _extras(operands: Operands, index: Int[Array, "B K n"], n: int) -> dict[str, Array]:
    """What the kernel needs beside q, k and v, step by step: float32 masks, 1 where open, and the
    biases that can be made before."""
    (B, K, length), m = index.shape, operands.k.shape[3]
    entries = jax.vmap(lambda rows, at: rows[at])(operands.real, index)
    found = {"entries": entries.reshape(B, K, length // n, n, m).astype(jnp.float32)}
    if operands.chosen.shape[2] > 1:
        heads = jnp.take_along_axis(jnp.swapaxes(operands.chosen, 2, 3), index[..., None], axis=2)
        heads = heads.reshape(B, K, length // n, n, -1).astype(jnp.float32)
        found["heads"] = jnp.swapaxes(heads, 3, 4)
    reader = _reader(operands.terms)
    before = tuple(term for term in operands.terms if term is not reader)
    if before:
        unread = jnp.zeros((*operands.q.shape[:3], length * m), jnp.float32)
        found["bias"] = _by_step(with_terms(unread, before, index), n, m)
    return found


def _by_step(x: Float[Array, "B K G nm"], n: int, m: int) -> Float[Array, "B K steps n G m"]:
    B, K, G, _ = x.shape
    return jnp.moveaxis(x.reshape(B, K, G, -1, n, m), 2, 4)


def _reader(terms: tuple[Term, ...]) -> Term | None:
    """The term whose function reads <q, k>."""
    return next((x for x in terms if reads_dot(function_of(x.function), Shape.of(x))), None)


def _of_reader(term: Term, index: Int[Array, "B K n"], n: int, m: int) -> dict[str, Array]:
    """What a function reads of listed entries, and where its bias is not 0."""
    found, pair, on = {}, pair_product(term, index), switched_on(term, index)
    if pair is not None:
        found["pair"] = _by_step(pair, n, m)
    if term.key:
        found["keys"] = _by_step(jnp.stack([taken(term.key[name], index) for name in sorted(term.key)], axis=2), n, m)
    if on is not None:
        found["keys_on"] = _by_step(on.astype(jnp.float32), n, m)
    return found


def _columns(term: Term, B: int, K: int) -> dict[str, Array]:
    """What a function reads of query heads, of queries and then of heads, and its switch of them, in every lane."""
    found = [term.query[name] for name in sorted(term.query)]
    found += [jnp.broadcast_to(term.head[name], (B, term.head[name].shape[0])) for name in sorted(term.head)]
    if term.query_on is not None:
        found.append(term.query_on.astype(jnp.float32))
    if not found:
        return {}
    columns = jnp.stack([x.reshape(B, K, -1) for x in found], axis=2)
    return {"columns": jnp.broadcast_to(columns[..., None], (*columns.shape, LANES))}


def _kernel(_index, count, _layers, q, *refs, names: tuple[str, ...], n: int, K: int, scale: float, reader: Any):
    extras, refs = dict(zip(names, refs, strict=False)), refs[len(names) :]
    k, v = refs[:n], refs[n : 2 * n]
    out_ref, lse_ref, top_ref, total_ref, sum_ref = refs[2 * n :]
    i = pl.program_id(2)

    @pl.when(i == 0)
    def _start():
        top_ref[...] = jnp.full(top_ref.shape, MASKED, jnp.float32)
        total_ref[...] = jnp.zeros(total_ref.shape, jnp.float32)
        sum_ref[...] = jnp.zeros(sum_ref.shape, jnp.float32)

    listed_here = count[pl.program_id(0) * K + pl.program_id(1)] - i * n

    @pl.when(listed_here > 0)
    def _visit():
        scores = []
        for j in range(n):
            dot = product(q[...], k[j][...], (1, 1)) * scale
            x = dot + extras["bias"][j] if "bias" in extras else dot
            if reader is not None:
                x = x + _bias_of_reader(reader, dot, extras, j)
            open_ = jnp.where(j < listed_here, extras["entries"][j : j + 1, :], 0.0)
            if "heads" in extras:
                open_ = open_ * extras["heads"][:, j : j + 1]
            # Chosen, not added: entries without a key may hold anything finite.
            scores.append(jnp.where(open_ > 0, x, MASKED))
        top = top_ref[...]
        highest = functools.reduce(jnp.maximum, scores)
        new_top = jnp.maximum(top, jnp.max(highest, axis=1, keepdims=True))
        weights = [jnp.exp(x - new_top[:, :1]) for x in scores]
        shrink = jnp.exp(top - new_top)
        total_ref[...] = shrink * total_ref[...] + jnp.sum(sum(weights), axis=1, keepdims=True)
        part = sum(product(x.astype(y.dtype), y[...], (1, 0)) for x, y in zip(weights, v, strict=True))
        sum_ref[...] = shrink[:, :1] * sum_ref[...] + part
        top_ref[...] = new_top

    @pl.when(i == pl.num_programs(2) - 1)
    def _finish():
        top, total = top_ref[...], total_ref[...]
        # NaN, which a maximum may lose, counts as seen, and stays.
        seen = (top > MASKED / 2) | (total != total)
        safe = jnp.where(seen, total, 1.0)
        lse_ref[...] = jnp.where(seen, top + jnp.log(safe), UNSEEN)
        out_ref[...] = jnp.where((top[:, :1] > MASKED / 2) | (total != total)[:, :1], sum_ref[...] / safe[:, :1], 0.0)


class Reader(NamedTuple):
    """What is static of the term whose function reads <q, k>."""

    function: ScoreFunction
    shape: Shape
    query_on: bool

    @classmethod
    def of(cls, term: Term) -> Reader:
        """Of a term."""
        return cls(function_of(term.function), Shape.of(term), term.query_on is not None)


def _bias_of_reader(reader: Reader, dot: Float[Array, "G m"], extras: dict[str, Any], j: int) -> Float[Array, "G m"]:
    """The bias of the step's j-th region. Its function reads whole tiles [heads, entries]."""
    shape, size = reader.shape, dot.shape

    def column(n: int) -> Array:
        return jnp.broadcast_to(extras["columns"][n][:, :1], size)

    first = len(shape.query)
    query = {name: column(n) for n, name in enumerate(shape.query)}
    head = {name: column(first + n) for n, name in enumerate(shape.head)}
    key = {name: jnp.broadcast_to(extras["keys"][j, n : n + 1], size) for n, name in enumerate(shape.key)}
    pair = extras["pair"][j] if shape.pair else None
    bias = jnp.broadcast_to(reader.function(Tile(dot, pair, query, key, head)), size)
    if reader.query_on:
        bias = jnp.where(column(first + len(head)) > 0, bias, 0.0)
    if "keys_on" in extras:
        bias = jnp.where(jnp.broadcast_to(extras["keys_on"][j], size) > 0, bias, 0.0)
    return bias

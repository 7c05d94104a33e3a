"""Decoding one token over a visual cache of 20,480 tokens: the tenth of its regions that are chosen, against all.

A layer of Qwen2.5-VL 7B (28 query heads, 4 kv heads of 128), one row, numbers of seed 0, on the device that jax finds.
Ours is everything that a step does: scores of the regions from their descriptors, the choice, the attention. The dense
side is the fastest of several forms, each in the regions that suits it. A round runs all of them in turn with the
round's own query, so each finds the processor's caches full of another's numbers; a ratio is the median of the rounds'.

    python benchmarks/gaze_decode.py --json gaze_decode.json
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from estimates import ratio
from gaze_decode_gpu import Forms, Sizes, gpu_rows
from pallas_calls import captured

from rave_jax.kernels import attention as attention_kernels
from rave_jax.kernels.attention import MaskCodes
from rave_jax.kernels.routed import RouteRule, gather_attention
from rave_jax.kernels.routed.base import choose
from rave_jax.kernels.routed.gather import pallas_tpu
from rave_jax.kernels.routed.gather.base import Operands, Stack, listed, union
from rave_jax.tools.tpu import copied_bytes

K, G, HEAD_DIM = 4, 7, 128
TOKENS, SHARE = 20480, 0.1
QUERIES = 8
"""Queries that rounds go through."""
TIME_AIMS = {"group": 0.2, "head": 1.0}
BYTES_AIMS = {"group": 0.14, "head": 1.1}


class Regions(NamedTuple):
    """Regions of the cache: how many, entries in each, and which hold a token."""

    name: str
    regions: int
    entries: int
    real: np.ndarray


def even(entries: int) -> Regions:
    """Regions of 36 tokens, all full but the last, in so many entries."""
    regions = -(-TOKENS // 36)
    held = np.minimum(36, TOKENS - 36 * np.arange(regions))
    name = f"{regions} regions of 36" + (f" in {entries} entries" if entries > 36 else "")
    return Regions(name, regions, entries, np.arange(entries) < held[:, None])


def frames() -> Regions:
    """64 frames of 16 x 20 tokens in regions of 6 x 6, cut off at the frame's edge."""
    sides = [[min(6, side - 6 * n) for n in range(-(-side // 6))] for side in (16, 20)]
    held = np.tile(np.outer(*map(np.array, sides)).reshape(-1), 64)
    return Regions(
        f"64 frames of 16 x 20 in {len(held)} regions of 6 x 6", len(held), 36, np.arange(36) < held[:, None]
    )


class Cache(NamedTuple):
    """A row's visual cache, and queries."""

    q: Any
    k: Any
    v: Any
    real: Any
    descriptor: Any


def make(regions: Regions, dtype: str) -> Cache:
    """Random keys, values and queries, so heads choose independently; descriptors are means of keys."""
    random = np.random.default_rng(0)
    shape = (1, K, regions.regions, regions.entries, HEAD_DIM)
    k, v = (random.normal(size=shape).astype(np.float32) * regions.real[..., None] for _ in range(2))
    mean = k.sum(3) / regions.real.sum(1)[:, None]
    q = random.normal(size=(QUERIES, 1, K, G, HEAD_DIM)).astype(np.float32)
    real, descriptor = jnp.asarray(regions.real[None]), jnp.asarray(mean)
    return Cache(*(jnp.asarray(x, dtype) for x in (q, k, v)), real, descriptor)


def chosen_of(q: Any, descriptor: Any, share: str) -> Any:
    """[B,K,N,R]."""
    scores = jnp.einsum("BKRh,BKGh->BKRG", descriptor, q.astype(jnp.float32), precision="highest")
    scores = jnp.swapaxes(scores, 2, 3)[:, :, :, None]
    candidate = jnp.ones((1, 1, 1, 1, scores.shape[-1]), bool)
    rule = RouteRule(SHARE, share="group" if share == "group" else "head")
    return choose(scores, candidate, None, rule).chosen[:, :, :, 0]


def attended(q: Any, k: Any, v: Any, real: Any, chosen: Any) -> Any:
    """The chosen regions' part of a step."""
    how: Any = {"scale": HEAD_DIM**-0.5, "implementation": "xla"}
    most = math.ceil(SHARE * k.shape[2])
    return gather_attention(q.reshape(1, K * G, HEAD_DIM), k, v, real, chosen, most, (), **how)


def keys_on_the_left(q: Any, k: Any, v: Any) -> Any:
    """Of [B,K,S,h]."""
    scores = jnp.einsum("BKSh,BKGh->BKSG", k, q, preferred_element_type=jnp.float32) * HEAD_DIM**-0.5
    return jnp.einsum("BKSG,BKSh->BKGh", jax.nn.softmax(scores, axis=2).astype(v.dtype), v)


def turned_scores(q: Any, k: Any, v: Any) -> Any:
    """Of [B,K,S,h], the softmax along the last axis."""
    scores = jnp.einsum("BKSh,BKGh->BKSG", k, q, preferred_element_type=jnp.float32) * HEAD_DIM**-0.5
    weights = jax.nn.softmax(jnp.swapaxes(scores, 2, 3), axis=-1)
    return jnp.einsum("BKGS,BKSh->BKGh", weights.astype(v.dtype), v)


def queries_on_the_left(q: Any, k: Any, v: Any) -> Any:
    """Of [B,K,S,h]."""
    scores = jnp.einsum("BKGh,BKSh->BKGS", q, k, preferred_element_type=jnp.float32) * HEAD_DIM**-0.5
    return jnp.einsum("BKGS,BKSh->BKGh", jax.nn.softmax(scores, axis=-1).astype(v.dtype), v)


def in_float32(q: Any, k: Any, v: Any) -> Any:
    """Of [B,K,S,h]."""
    return keys_on_the_left(*(x.astype(jnp.float32) for x in (q, k, v)))


def jax_own(q: Any, k: Any, v: Any) -> Any:
    """Of [B,S,K,h]."""
    return jax.nn.dot_product_attention(q.reshape(len(q), 1, K * G, HEAD_DIM), k, v)


def our_dense(q: Any, k: Any, v: Any) -> Any:
    """Of [B,S,K,h]."""
    B, S = k.shape[:2]
    one, all_ = jnp.zeros((B, 1), jnp.int32), jnp.broadcast_to(jnp.arange(S, dtype=jnp.int32), (B, S))
    codes = MaskCodes(one, one + S, all_, one - 1, jnp.full_like(all_, -2))
    return attention_kernels.attention(q.reshape(B, 1, K * G, HEAD_DIM), k, v, codes, scale=HEAD_DIM**-0.5)[0]


HEADS_FIRST = (keys_on_the_left, turned_scores, queries_on_the_left, in_float32)
TOKENS_FIRST = (jax_own, our_dense)


def time_rows(rounds: int, dtype: str, share: str) -> Iterator[dict[str, Any]]:
    """Seconds of a step of ours to those of the fastest dense form; beside them those of the attention alone."""
    regions = even(36)
    cache = make(regions, dtype)
    dense = [x.reshape(1, K, -1, HEAD_DIM)[:, :, :TOKENS] for x in cache[1:3]]
    turned = [jnp.swapaxes(x, 1, 2) for x in dense]
    forms = {x.__name__: (jax.jit(x), dense) for x in HEADS_FIRST}
    forms |= {x.__name__: (jax.jit(x), turned) for x in TOKENS_FIRST}
    given = [chosen_of(q, cache.descriptor, share) for q in cache.q]

    @jax.jit
    def ours(q: Any, k: Any, v: Any, real: Any, descriptor: Any) -> Any:
        return attended(q, k, v, real, chosen_of(q, descriptor, share))

    runs: dict[str, tuple[Callable[..., Any], list[Any]]] = {"ours": (ours, list(cache[1:])), **forms}
    runs["alone"] = (jax.jit(attended), list(cache[1:4]))
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for n in range(rounds + 1):
        for name, (run, operands) in runs.items():
            more = [given[n % QUERIES]] if name == "alone" else []
            start = time.perf_counter()
            jax.block_until_ready(run(cache.q[n % QUERIES], *operands, *more))
            seconds[name].append(time.perf_counter() - start)
    seconds = {name: times[1:] for name, times in seconds.items()}  # the first compiles
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    fastest = min(forms, key=medians.__getitem__)
    ratios = [a / b for a, b in zip(seconds["ours"], seconds[fastest], strict=True)]
    found: dict[str, Any] = {
        "fastest_dense": fastest,
        "milliseconds": {name: round(1e3 * x, 2) for name, x in medians.items()},
    }
    found |= {"least": round(min(ratios), 3), "most": round(max(ratios), 3), "rounds": rounds}
    name = f"time of a step to dense, {SHARE:.0%} of {regions.name}, a choice per {share}, {dtype}"
    yield ratio(name, jax.devices()[0].device_kind, statistics.median(ratios), TIME_AIMS[share], found)


def bytes_rows(regions: Regions, dtype: str, share: str) -> Iterator[dict[str, Any]]:
    """Bytes of keys, values and descriptors that a step reads, by the lists that the choices give; mean of the queries.

    Per group to all keys and values of the tokens (dense); per head to those of the regions that the group chose. Empty
    entries are read, and count; they are no part of what is compared with.
    """
    cache = make(regions, dtype)
    entry = 2 * HEAD_DIM * cache.k.dtype.itemsize
    taken, filled = 0.0, 0.0
    for q in cache.q:
        read = np.asarray(union(chosen_of(q, cache.descriptor, share)))[0]
        taken += read.sum() * regions.entries * entry / QUERIES
        filled += (read @ regions.real.sum(1)).sum() * entry / QUERIES
    read_bytes, all_bytes = taken + cache.descriptor.nbytes, K * TOKENS * entry
    against = all_bytes if share == "group" else filled
    share_read = filled / all_bytes
    more = {
        "of_tokens": round(share_read, 4),
        "padding": round(taken / filled, 4),
        "to_dense": round(read_bytes / all_bytes, 3),
    }
    what = "dense" if share == "group" else "those of the regions that its group chose"
    name = f"bytes of a step to {what}, {SHARE:.0%} of {regions.name}, a choice per {share}, {dtype}"
    yield ratio(name, "any", read_bytes / against, BYTES_AIMS[share], more)


def grid_rows(share: str) -> Iterator[dict[str, Any]]:
    """The same of the TPU kernel, all that its grid copies, by its index maps on concrete lists."""
    regions = even(40)
    cache = make(regions, "bfloat16")
    chosen = chosen_of(cache.q[0], cache.descriptor, share)
    k, v = (Stack(x[None], None, jnp.int32(0)) for x in (cache.k, cache.v))
    operands = Operands(cache.q[0], k, v, cache.real, chosen, ())
    index, count = listed(union(chosen), pallas_tpu.length_of_list(operands, math.ceil(SHARE * regions.regions)))
    call = captured(lambda: pallas_tpu.over(operands, index, count, 1.0, interpret=True))
    copied = copied_bytes(
        call.grid_spec.grid, call.operands, (index.reshape(-1), count.reshape(-1), jnp.zeros(2, jnp.int32))
    )
    entry = 2 * HEAD_DIM * 2
    read_bytes = sum(copied.values()) + cache.descriptor.nbytes
    filled = float((np.asarray(union(chosen))[0] @ regions.real.sum(1)).sum()) * entry
    against, what = (K * TOKENS * entry, "dense") if share == "group" else (filled, "those of the group's regions")
    name = f"bytes that the TPU kernel's grid copies, and descriptors, to {what}, {regions.name}, a choice per {share}"
    more = {"steps": math.prod(call.grid_spec.grid), "to_dense": round(read_bytes / (K * TOKENS * entry), 3)}
    yield ratio(name, "any", read_bytes / against, BYTES_AIMS[share], more)


def cudnn(q: Any, k: Any, v: Any) -> Any:
    """Of [B,S,K,h], on GPUs."""
    return jax.nn.dot_product_attention(q.reshape(len(q), 1, K * G, HEAD_DIM), k, v, implementation="cudnn")


def on_gpus(rounds: int, share: str) -> Iterator[dict[str, Any]]:
    """The rows of a GPU."""
    firsts = [{x.__name__: x for x in forms} for forms in (HEADS_FIRST, (*TOKENS_FIRST, cudnn))]
    forms = Forms(lambda q, descriptor: chosen_of(q, descriptor, share), *firsts)
    yield from gpu_rows(forms, Sizes(TOKENS, 36, K, G, HEAD_DIM), share, SHARE, rounds)


def rows(rounds: int) -> Iterator[dict[str, Any]]:
    """All of them."""
    for share in ("group", "head"):
        for dtype in ("float32", "bfloat16"):
            yield from time_rows(rounds, dtype, share)
            yield from bytes_rows(even(36), dtype, share)
            yield from bytes_rows(frames(), dtype, share)
        yield from grid_rows(share)
        yield from on_gpus(rounds, share)


def main() -> None:
    """Time, count and print; with --json also write the rows."""
    parser = argparse.ArgumentParser(description="Decoding over chosen regions of a visual cache.")
    parser.add_argument("--json", type=Path, help="write the rows there")
    parser.add_argument("--rounds", type=int, default=24, help="of the timing")
    args = parser.parse_args()
    found = list(rows(args.rounds))
    if args.json:
        args.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()

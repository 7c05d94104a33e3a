"""The rows of `gaze_decode.py` that only a GPU can give; where there is none they say unmeasured.

A step is one token through several layers, each with a cache of its own and in one program: so what starts a program is
no part of the ratio, and no layer's keys are still in the device's cache when they are read again.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from estimates import ratio, unmeasured

from rave_jax.kernels.routed import Stack, gather_attention

AIMS = {"group": 0.25, "head": None}
ROWS = (1, 16)
LAYERS = 16
"""Of one row; of more rows fewer, four at least: gigabytes in all."""


class Forms(NamedTuple):
    """What is timed."""

    choose: Callable[[Any, Any], Any]
    """Of one layer's q [B,K,G,h] and descriptors: the chosen regions [B,K,N,R]."""
    heads_first: Mapping[str, Callable[[Any, Any, Any], Any]]
    """Dense forms, of keys [B,K,S,h]."""
    tokens_first: Mapping[str, Callable[[Any, Any, Any], Any]]
    """Dense forms, of keys [B,S,K,h]."""


class Sizes(NamedTuple):
    """Of a layer: regions are full but the last, whose end is no token."""

    tokens: int
    slots: int
    kv_heads: int
    group: int
    head_dim: int


def gpu_rows(forms: Forms, sizes: Sizes, share: str, most_share: float, rounds: int) -> Iterator[dict[str, Any]]:
    """Seconds of a step through `pallas_gpu`, choice and all, to those of the fastest dense form, in bfloat16."""
    for rows in ROWS:
        layers = max(4, LAYERS // rows)
        name = f"time of a step of {rows} rows and {layers} layers through pallas_gpu to dense, a choice per {share}"
        if jax.devices()[0].platform != "gpu":
            yield unmeasured(name, AIMS[share], "no GPU here")
            continue
        seconds, refused = timed(forms, sizes, most_share, rows, layers, rounds, ("pallas_gpu", "xla"))
        medians = {name: statistics.median(times) for name, times in seconds.items()}
        fastest = min((x for x in medians if x not in ("pallas_gpu", "xla")), key=medians.__getitem__)
        ratios = [a / b for a, b in zip(seconds["pallas_gpu"], seconds[fastest], strict=True)]
        found: dict[str, Any] = {
            "fastest_dense": fastest,
            "microseconds_of_a_layer": {name: round(1e6 * x / layers, 1) for name, x in medians.items()},
            "refused": refused,
        }
        found |= {"least": round(min(ratios), 3), "most": round(max(ratios), 3), "rounds": rounds}
        yield ratio(name, jax.devices()[0].device_kind, statistics.median(ratios), AIMS[share], found)


def timed(
    forms: Forms,
    sizes: Sizes,
    most_share: float,
    rows: int,
    layers: int,
    rounds: int,
    backends: tuple[Any, ...],
) -> tuple[dict[str, list[float]], dict[str, str]]:
    """(seconds of every round by what ran, why a dense form did not run here)."""
    tokens, slots, K, G, h = sizes
    R = -(-tokens // slots)
    keys = jax.random.split(jax.random.key(0), 3)
    q = jax.random.normal(keys[0], (layers, rows, K, G, h), jnp.bfloat16)
    k, v = (jax.random.normal(key, (layers, rows, K, R, slots, h), jnp.bfloat16) for key in keys[1:])
    real = jnp.broadcast_to((jnp.arange(R * slots) < tokens).reshape(R, slots), (rows, R, slots))
    descriptor = jnp.mean(k, axis=4, dtype=jnp.float32)
    flat = [[x[n].reshape(rows, K, -1, h)[:, :, :tokens] for n in range(layers)] for x in (k, v)]
    turned = [[jnp.swapaxes(x, 1, 2) for x in side] for side in flat]

    def gazed(backend: Any) -> Callable[..., Any]:
        def step(q: Any, k: Any, v: Any, real: Any, descriptor: Any) -> Any:
            out, how = [], {"scale": h**-0.5, "implementation": backend}
            for n in range(layers):
                stacks = (Stack(x, None, jnp.int32(n)) for x in (k, v))
                chosen, most = forms.choose(q[n], descriptor[n]), math.ceil(most_share * R)
                heads = q[n].reshape(rows, K * G, h)
                out.append(gather_attention(heads, *stacks, real, chosen, most, (), **how)[0])
            return out

        return step

    def dense(form: Callable[..., Any]) -> Callable[..., Any]:
        return lambda q, k, v: [form(*of_layer) for of_layer in zip(q, k, v, strict=True)]

    runs: dict[str, tuple[Any, Any]] = {name: (jax.jit(gazed(name)), (q, k, v, real, descriptor)) for name in backends}
    runs |= {name: (jax.jit(dense(form)), (q, *flat)) for name, form in forms.heads_first.items()}
    runs |= {name: (jax.jit(dense(form)), (q, *turned)) for name, form in forms.tokens_first.items()}
    refused = {}
    for name, (run, operands) in list(runs.items()):
        try:
            jax.block_until_ready(run(*operands))
        except Exception as error:
            # A dense form that a device does not have is no rival there; ours has to run.
            if name in backends:
                raise
            refused[name] = str(error).splitlines()[0]
            del runs[name]
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, (run, operands) in runs.items():
            start = time.perf_counter()
            jax.block_until_ready(run(*operands))
            seconds[name].append(time.perf_counter() - start)
    return seconds, refused

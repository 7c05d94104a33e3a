"""Time of the `xla` backend on the device that jax finds: a training step of attention with a gate against without."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from attention_programs import HEAD_DIM, Gate, terms_of
from estimates import ratio
from kernel_bytes import causal

from rave_jax.kernels.attention import attention

LENGTH, HEADS = 2048, 2
AIM = 1.4
GATES: tuple[Gate, ...] = ("log_gate", "tanh", "linear")


def wall_rows(rounds: int) -> Iterator[dict[str, Any]]:
    """Median of the rounds' ratios; a round runs both sides in turn, so a busy machine slows both."""
    device = jax.devices()[0]
    aim = AIM if device.platform == "cpu" else None
    plain = _step("none")
    for gate in GATES:
        gated = _step(gate)
        ratios = [_seconds(gated) / _seconds(plain) for _ in range(rounds + 1)][1:]
        name = f"xla with {gate}, time of forward and backward to the same without, {HEADS} heads, T {LENGTH}"
        spread = {"least": round(min(ratios), 3), "most": round(max(ratios), 3)}
        yield ratio(name, device.device_kind, statistics.median(ratios), aim, spread)


def _seconds(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    jax.block_until_ready(run())
    return time.perf_counter() - start


def _step(gate: Gate) -> Callable[[], Any]:
    """A step, compiled, with numbers as its operands: every query and key is switched on."""
    random = np.random.default_rng(0)

    def place(shape: tuple[int, ...], dtype: Any) -> Any:
        x = np.ones(shape, bool) if dtype == jnp.bool_ else random.normal(size=shape) / 4
        return jnp.asarray(x, jnp.bool_ if dtype == jnp.bool_ else jnp.float32)

    q = place((1, LENGTH, HEADS, HEAD_DIM), jnp.float32)
    k, v = (place((1, LENGTH, 1, HEAD_DIM), jnp.float32) for _ in range(2))
    terms, codes = terms_of(place, HEADS, LENGTH, gate), causal(LENGTH)
    # Switches are not differentiated.
    switches = [(term.query_on, term.key_on) for term in terms.parts]
    floats = tuple(term.replace(query_on=None, key_on=None) for term in terms.parts)

    @jax.jit
    def step(q: Any, k: Any, v: Any, floats: Any) -> Any:
        def loss(q: Any, k: Any, v: Any, floats: Any) -> Any:
            parts = [x.replace(query_on=on[0], key_on=on[1]) for x, on in zip(floats, switches, strict=True)]
            out, _ = attention(q, k, v, codes, parts, scale=HEAD_DIM**-0.5, implementation="xla")
            return out.sum()

        return jax.grad(loss, (0, 1, 2, 3))(q, k, v, floats)

    return lambda: step(q, k, v, floats)

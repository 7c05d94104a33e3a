"""Attention to chosen regions against its stated rule, written out head by head in numpy."""

from __future__ import annotations

import contextlib
import functools
import itertools
import re
from collections.abc import Callable, Iterable
from typing import Any

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from jax.sharding import NamedSharding, PartitionSpec

from rave_jax.kernels.routed import Stack, gather_attention
from rave_jax.kernels.routed.gather.api import OPERATION
from rave_jax.kernels.support import interpreted
from rave_jax.parallel.mesh import MeshConfig, make_mesh
from rave_jax.parallel.sharding import current_mesh, partition_spec, use_mesh
from tests.kernels.drawn import PairBias, term_of

B, K, G, R, m, h, c, r = 2, 2, 3, 9, 8, 128, 256, 4
MOST = 3
BIASES = ["none", "log_gate", "tanh", "linear", "centered_sigmoid"]
BACKENDS = list(OPERATION.backends)
"""Every test of a result runs for each of them."""


def slow_where(of: Callable[..., bool], *axes: Iterable[Any]) -> list[Any]:
    """All combinations; those of which `of` holds are slow tests. An interpreted kernel takes 2 to 3 s to compile."""
    return [pytest.param(*each, marks=[pytest.mark.slow] * of(*each)) for each in itertools.product(*axes)]


APART = {"per group": False, "per head": True}


def in_groups(implementation: str, *which: Any) -> bool:
    """Heads that choose together are the simpler case of a kernel."""
    return implementation.startswith("pallas") and not APART[which[-1]]


def second(implementation: str, kind: str, apart: str) -> bool:
    """The TPU kernel is handed its bias, whatever made it; the GPU's makes it, for heads apart and together alike."""
    if not implementation.startswith("pallas"):
        # Written in operations that serve every form.
        return kind in ("tanh", "linear") and APART[apart]
    if kind == "none" or not APART[apart]:
        return (kind == "none") == APART[apart]
    return kind in ("tanh", "linear") or (implementation == "pallas_tpu" and kind != "log_gate")


def apart_in_kernels(implementation: str, apart: str) -> bool:
    """`test_a_list_without_room_for_all_heads_is_nan_for_each` has heads apart."""
    return implementation.startswith("pallas") and APART[apart]


def promised(implementation: str, most: int, apart: str) -> bool:
    """A kernel walks a list of any length; `test_it_is_the_stated_rule` has lists of few and of many."""
    return implementation.startswith("pallas")


def wide_mesh(implementation: str, mesh: str, apart: str) -> bool:
    """What the mesh splits is decided before a kernel is called, and the GPU's is quicker to compile."""
    return (
        in_groups(implementation, apart)
        or implementation == "pallas_tpu"
        or (implementation == "pallas_gpu" and mesh == "rows and kv heads")
    )


def operands(seed: int, apart: bool, kind: str) -> dict[str, Any]:
    """Everything but the settings. Some heads choose fewer than `most` or nothing, some regions are ragged, some have
    no key at all; entries without one hold large numbers."""
    rng = np.random.default_rng(seed)

    def normal(*shape: int) -> np.ndarray:
        return np.float32(rng.normal(size=shape))

    real = rng.random((B, R, m)) < rng.choice([0.0, 0.5, 1.0], (B, R, 1))
    chosen = np.zeros((B, K, G if apart else 1, R), bool)
    for at in np.ndindex(chosen.shape[:-1]):
        chosen[at][rng.choice(R, rng.integers(0, MOST + 1), replace=False)] = True
    k, v = normal(B, K, R, m, h), normal(B, K, R, m, c)
    for x in (k, v):
        x[np.broadcast_to(~real[:, None], x.shape[:-1])] = 1e15
    bias = None
    if kind != "none":
        parts = normal(B, K * G, r), normal(B, K, R, m, r), normal(B, K * G), normal(B, K, R, m), normal(K * G)
        on = (rng.random(shape) < 0.7 for shape in ((B, K * G), (B, R, m)))
        bias = PairBias(*map(jnp.asarray, (*parts, *on)))
    return {
        **{"q": jnp.asarray(normal(B, K * G, h)), "k": jnp.asarray(k), "v": jnp.asarray(v)},
        **{"real": jnp.asarray(real), "chosen": jnp.asarray(chosen), "most": MOST, "bias": bias, "form": kind},
    }


def by_rule(q, k, v, real, chosen, most, bias, form) -> tuple[np.ndarray, np.ndarray]:
    """Head by head in float64, over a list of the keys that it may see."""
    out, lse = np.zeros((B, K * G, c)), np.full((B, K * G), -np.inf)
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    real, chosen, bias = jax.tree.map(np.asarray, (real, chosen, bias))
    for b, head in np.ndindex(B, K * G):
        group = head // G
        mine = chosen[b, group, head % G if chosen.shape[2] > 1 else 0]
        at = [(n, s) for n, s in np.ndindex(R, m) if mine[n] and real[b, n, s]]
        if not at:
            continue
        scores = np.array([q[b, head] @ k[b, group, n, s] * h**-0.5 for n, s in at])
        if bias is not None and bias.query_on[b, head]:
            z = np.array([float(bias.u[b, head] @ bias.w[b, group, n, s] + bias.key[b, group, n, s]) for n, s in at])
            z = z + float(bias.row[b, head])
            f = {
                "log_gate": lambda z: np.log(2 / (1 + np.exp(-z))),
                "tanh": lambda z: 3.0 * np.tanh(z / 3.0),
                "linear": lambda z: z,
                "centered_sigmoid": lambda z, gain=float(bias.gain[head]): gain * (2 / (1 + np.exp(-z)) - 1),
            }[form]
            scores = scores + np.where([bias.key_on[b, n, s] for n, s in at], f(z), 0.0)
        weights = np.exp(scores)
        out[b, head] = weights @ np.array([v[b, group, n, s] for n, s in at]) / weights.sum()
        lse[b, head] = np.log(weights.sum())
    return out, lse


@functools.partial(jax.jit, static_argnames=("most", "form", "implementation"))
def run(q, k, v, real, chosen, most, bias, form, implementation="auto"):
    with interpreted() if implementation.startswith("pallas") else contextlib.nullcontext():
        terms = () if bias is None else (term_of(bias, form),)
        return gather_attention(q, k, v, real, chosen, most, terms, scale=h**-0.5, implementation=implementation)


@pytest.mark.parametrize(("implementation", "kind", "apart"), slow_where(second, BACKENDS, BIASES, APART))
@settings(max_examples=5, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_it_is_the_stated_rule(implementation: str, kind: str, apart: str, seed: int) -> None:
    given_ = operands(seed, APART[apart], kind)
    out, lse = run(**given_, implementation=implementation)
    expected, expected_lse = by_rule(**given_)
    np.testing.assert_allclose(out, expected, atol=2e-5)
    np.testing.assert_allclose(lse, expected_lse, atol=2e-5)


@pytest.mark.parametrize(
    ("implementation", "most", "apart"),
    slow_where(promised, BACKENDS, [1, R], APART),
)
def test_any_promise_that_is_kept_will_do(implementation: str, most: int, apart: str) -> None:
    """All regions are attention to all keys; the number that shapes come from is no part of the answer."""
    given_ = operands(1, APART[apart], "log_gate")
    chosen = np.zeros(given_["chosen"].shape, bool)
    chosen[..., 2] = True
    if most == R:
        chosen[0] = True
    given_ |= {"chosen": jnp.asarray(chosen), "most": most}
    out, lse = run(**given_, implementation=implementation)
    expected, expected_lse = by_rule(**given_)
    np.testing.assert_allclose(out, expected, atol=2e-5)
    np.testing.assert_allclose(lse, expected_lse, atol=2e-5)


@pytest.mark.parametrize(("implementation", "apart"), slow_where(apart_in_kernels, BACKENDS, APART))
def test_a_broken_promise_is_nan_and_only_where_it_is_broken(implementation: str, apart: str) -> None:
    given_ = operands(2, APART[apart], "none")
    chosen = np.asarray(given_["chosen"]).copy()
    chosen[1, 0, 0] = True
    out, lse = run(**(given_ | {"chosen": jnp.asarray(chosen)}), implementation=implementation)
    broken = np.zeros((B, K * G), bool)
    broken[1, : 1 if APART[apart] else G] = True
    np.testing.assert_array_equal(np.isnan(lse), broken)
    np.testing.assert_array_equal(np.isnan(out), np.broadcast_to(broken[..., None], out.shape))


@pytest.mark.parametrize(
    "implementation", [pytest.param(name, marks=[pytest.mark.slow] * (name == "pallas_tpu")) for name in BACKENDS]
)
def test_a_list_without_room_for_all_heads_is_nan_for_each(implementation: str) -> None:
    """One head chooses all regions, more than the promises of its kv head's heads together: the others' may be cut."""
    given_ = operands(2, True, "none")
    chosen = np.zeros(given_["chosen"].shape, bool)
    chosen[..., -1], chosen[1, 0, 0] = True, True
    out, lse = run(**(given_ | {"chosen": jnp.asarray(chosen), "most": 1}), implementation=implementation)
    broken = np.zeros((B, K * G), bool)
    broken[1, :G] = True
    np.testing.assert_array_equal(np.isnan(lse), broken)
    np.testing.assert_array_equal(np.isnan(out), np.broadcast_to(broken[..., None], out.shape))


@pytest.mark.parametrize("implementation", BACKENDS)
def test_a_head_whose_scores_are_not_finite_is_nan_and_no_zeros(implementation: str) -> None:
    given_ = operands(2, True, "log_gate")
    bias, real, chosen = given_["bias"], given_["real"], np.asarray(given_["chosen"])
    bias = bias._replace(row=bias.row.at[:, 0].set(jnp.nan), query_on=jnp.ones_like(bias.query_on))
    bias = bias._replace(key_on=jnp.ones_like(bias.key_on))
    out, lse = run(**(given_ | {"bias": bias}), implementation=implementation)
    broken = np.zeros((B, K * G), bool)
    broken[:, 0] = np.any(chosen[:, 0, 0, :, None] & np.asarray(real), axis=(1, 2))
    assert broken.any()
    np.testing.assert_array_equal(np.isnan(lse), broken)
    np.testing.assert_array_equal(np.isnan(out), np.broadcast_to(broken[..., None], out.shape))


def test_a_pair_product_is_not_rounded_to_bfloat16() -> None:
    """A CPU computes float32 whatever is asked for; TPUs and GPUs do not."""
    operands_ = operands(2, True, "log_gate")
    program = jax.make_jaxpr(functools.partial(run, implementation="xla"), static_argnums=(5, 7))(*operands_.values())
    assert "Precision.HIGHEST" in str(program)


@pytest.mark.parametrize(("implementation", "apart"), slow_where(in_groups, BACKENDS[1:], APART))
def test_what_is_not_chosen_touches_nothing(apart: str, implementation: str) -> None:
    """Not one bit of it: regions that nobody chose may hold NaN."""
    given_ = operands(3, APART[apart], "log_gate")
    read = np.asarray(given_["chosen"]).any(2)[..., None, None]
    # Where a group chose nothing its list still names a region, the first.
    read[..., 0, :, :] |= ~read.any(2)[:, :, 0:1]
    poisoned = {name: jnp.where(read, given_[name], jnp.nan) for name in ("k", "v")}
    found = [run(**(given_ | changed), implementation=implementation) for changed in ({}, poisoned)]
    for x, y in zip(*found, strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize(("implementation", "apart"), slow_where(in_groups, BACKENDS[1:], APART))
def test_bfloat16_caches_sum_in_float32(implementation: str, apart: str) -> None:
    given_ = operands(4, APART[apart], "log_gate")
    given_ |= {name: given_[name].astype(jnp.bfloat16) for name in ("q", "k", "v")}
    out, lse = run(**given_, implementation=implementation)
    assert out.dtype == jnp.bfloat16 and lse.dtype == jnp.float32
    expected, expected_lse = by_rule(**given_)
    np.testing.assert_allclose(np.float32(out), expected, atol=0.03)
    np.testing.assert_allclose(lse, expected_lse, atol=1e-4)


@pytest.mark.parametrize(("implementation", "apart"), slow_where(in_groups, BACKENDS, APART))
def test_one_layer_of_a_stack_is_read_where_it_lies(implementation: str, apart: str) -> None:
    given_ = operands(5, APART[apart], "log_gate")
    if implementation == "xla":
        # Fewer regions than there are, so that what is gathered has not the shape of a layer.
        given_ |= {"chosen": given_["chosen"] & (jnp.cumsum(given_["chosen"], axis=-1) == 1), "most": 1}
    how = {name: given_.pop(name) for name in ("most", "form")} | {"implementation": implementation}
    stacks = {n: jnp.stack([jnp.full_like(given_[n], jnp.nan), given_[n], jnp.zeros_like(given_[n])]) for n in "kv"}

    def of_layer(given_: dict[str, Any], stacks: dict[str, Any], layer: Any) -> Any:
        return run.__wrapped__(**given_ | {n: Stack(x, None, layer) for n, x in stacks.items()}, **how)

    found = jax.jit(of_layer)(given_, stacks, jnp.int32(1))
    for x, y in zip(found, run(**given_, **how), strict=True):
        np.testing.assert_array_equal(x, y)
    if implementation != "xla":
        return
    text = jax.jit(of_layer).lower(given_, stacks, jnp.int32(1)).compile().as_text()
    slab = rf"f32\[(1,)?{B},{K},({R},{m}|{R * m}),({h}|{c})\]"
    assert not re.search(slab, text), "a layer is copied out of its stack"


@pytest.mark.parametrize("implementation", ["reference", "xla", "pallas_gpu"])
@pytest.mark.parametrize("apart", [False, True], ids=["per group", "per head"])
def test_int8_regions_are_expanded_after_they_are_taken(implementation: str, apart: bool) -> None:
    given_ = operands(7, apart, "none")
    real = given_["real"][:, None, ..., None]
    rng = np.random.default_rng(7)
    whole, stacks = {}, {}
    for name, width in (("k", h), ("v", c)):
        values = jnp.asarray(rng.integers(-127, 128, (2, B, K, R, m, width)), jnp.int8)
        scale = jnp.asarray(np.float32(rng.random((2, B, K, R, m)) / 64))
        stacks[name] = Stack(values, scale, jnp.int32(1))
        whole[name] = jnp.where(real, values[1] * scale[1][..., None], 0.0)
    out, lse = run(**given_ | stacks, implementation=implementation)
    expected, expected_lse = by_rule(**given_ | whole)
    np.testing.assert_allclose(out, expected, atol=2e-5)
    np.testing.assert_allclose(lse, expected_lse, atol=2e-5)


def test_wrong_operands_and_backends_are_one_clear_error() -> None:
    given_ = operands(0, True, "tanh")

    def bias(**changed: Any) -> dict[str, Any]:
        return {"bias": given_["bias"]._replace(**changed)}

    def stack(scale: Any, dtype: Any) -> dict[str, Any]:
        return {"k": Stack(given_["k"][None].astype(dtype), scale, jnp.int32(0))}

    for changed, message in (
        ({"v": given_["v"][:, :, 1:]}, r"operand v has shape \(2, 2, 8, 8, 256\), expected \(2, 2, 9, 8, 256\)"),
        ({"real": given_["real"][:, 1:]}, "operand real has shape"),
        ({"real": given_["real"].astype(jnp.int32)}, "operand real is int32, expected bool"),
        ({"chosen": given_["chosen"][:, :, :2]}, "2 choices for each kv head, expected 1 or 3"),
        ({"q": given_["q"][:, :5]}, "5 query heads cannot share 2 kv heads"),
        ({"q": given_["q"].astype(jnp.int32)}, "operand q is int32, expected floats"),
        ({"k": Stack(given_["k"][None].astype(jnp.int8), None, jnp.int32(0))}, "operand k is int8, expected floats"),
        (
            {"k": Stack(given_["k"][None], given_["k"][None, ..., 0], jnp.int32(0))},
            "k.values is float32, expected int8",
        ),
        ({"most": 0}, "most = 0, expected a number of regions from 1 to 9"),
        ({"most": R + 1}, "most = 10"),
        (bias(u=given_["bias"].u[:, 1:], row=given_["bias"].row[:, 1:]), r"operand terms\[0\]\.u has shape"),
        (bias(w=given_["bias"].w[:, :, 1:], key=given_["bias"].key[:, :, 1:]), r"operand terms\[0\]\.w has shape"),
        ({"implementation": "cudnn"}, "'cudnn' cannot serve attention to chosen regions; expected auto, reference"),
    ):
        with pytest.raises(ValueError, match=message):
            run.__wrapped__(**(given_ | changed))


MESHES = {"rows and kv heads": (1, 2, 2), "more devices than kv heads": (1, 1, 4)}


@pytest.mark.parametrize(
    ("implementation", "mesh", "apart"),
    slow_where(wide_mesh, BACKENDS[1:], MESHES, APART),
)
def test_a_mesh_changes_nothing_and_moves_no_key(implementation: str, mesh: str, apart: str) -> None:
    given_ = operands(6, APART[apart], "log_gate")
    settings_ = {name: given_.pop(name) for name in ("most", "form")}
    how = {**settings_, "implementation": implementation}
    alone = run(**given_, **how)
    with use_mesh(make_mesh(MeshConfig(*MESHES[mesh]), jax.devices()[: np.prod(MESHES[mesh])])):
        where = current_mesh()
        spec = partition_spec(("batch", "kv_heads"), (B, K), where)
        rows = PartitionSpec(spec[0])
        placed = {
            name: jax.device_put(given_[name], NamedSharding(where, rows if name == "real" else spec))
            for name in ("q", "k", "v", "real", "chosen")
        }
        split = jax.jit(lambda placed: run.__wrapped__(**placed, bias=given_["bias"], **how))
        text = split.lower(placed).compile().as_text()
        found = split(placed)
    for x, y in zip(found, alone, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5)
    assert not re.search(rf"f32\[[0-9,]*{R},{m},({h}|{c})\]\S* (all-gather|all-to-all|collective-permute)", text)

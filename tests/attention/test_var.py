"""VAR: the stated redistribution on the map, in packed rows, through chunks, and where it says nothing."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rave_jax import attention as at
from rave_jax import config as machinery
from rave_jax.attention.base import Parts
from rave_jax.attention.calibrate.sinks import sink_dimensions
from rave_jax.attention.merge import log_sum_exp
from rave_jax.attention.var import Redistribution, sink_score
from rave_jax.batch import Kind, Role, TokenInfo
from rave_jax.config import ConfigError
from rave_jax.families.qwen2_5_vl import presets
from rave_jax.models.config import ModelOptions
from rave_jax.models.forward import Want
from rave_jax.models.parameters import named_parameters, with_values
from tests.attention.packed import DIMS as DIMS_OF_HEADS
from tests.attention.packed import KEY, B, T, attend, dense_map, everything, features, info_of, outputs
from tests.models.layout import batch, document
from tests.models.made import model

D, DIMS = 8, (6, 1)
# With 8 dimensions phi is at most sqrt(8): sinks are where one dimension holds nearly all.
VAR = at.Var(dims=DIMS, tau=2.5, rho=0.5, summ=0.2, move_fraction=0.6)
ROWS = (("ssvvvvqqaqa", "vvq"), ("sqq", "svvqvvqaa"))
# Sinks: system prompt, a visual token, question; then a document of which the first picture has none, but the second.
# Two tokens of answers have the hidden state of one as well.
SINKS = {(0, 0): 6, (0, 3): 1, (0, 6): 6, (0, 8): 1, (1, 3): 1, (1, 8): 6, (1, 10): 6}
BESIDE: dict[str, tuple[at.MechanismConfig, ...]] = {
    "alone": (),
    "with a gate and a window": (at.Rave(rank=4, start="random"), at.SlidingWindow(7)),
}


def with_sinks(x: at.Features, sinks: dict[tuple[int, int], int] = SINKS) -> at.Features:
    """Hidden states that stand out in a sink dimension at these tokens, and in another one elsewhere."""
    hidden = np.random.default_rng(5).normal(size=(B, T, D))
    hidden[0, 4, 3] = 100.0
    for (b, i), dim in sinks.items():
        hidden[b, i, dim] = -50.0
    return x._replace(hidden=jnp.asarray(hidden, jnp.float32))


def stated(
    plain: np.ndarray, info: TokenInfo, config: at.Var = VAR, sinks: dict[tuple[int, int], int] = SINKS
) -> tuple[np.ndarray, int]:
    """The map with what sinks lose given to visual tokens, row by row and head by head; and how many were changed."""
    changed, count, info = plain.copy(), 0, jax.tree.map(np.asarray, info)
    for b, i, h in np.ndindex(plain.shape[:3]):
        row = plain[b, i, h]
        visual = {j for j in np.flatnonzero(row) if info.kind[b, j] == Kind.VISUAL}
        sink = {j for c, j in sinks if c == b and row[j] > 0 and info.role[b, j] != Role.RESPONSE}
        seen, mass = sorted(visual - sink), row[sorted(visual)].sum()
        if info.kind[b, i] != Kind.TEXT or not visual & sink or not seen or mass < config.summ:
            continue
        if row[seen].sum() / mass < config.rho:
            continue
        budget = config.move_fraction * row[sorted(sink)].sum()
        changed[b, i, h, sorted(sink)] *= 1 - config.move_fraction
        changed[b, i, h, seen] += budget * row[seen] / row[seen].sum()
        count += 1
    return changed, count


@pytest.mark.parametrize("beside", ["alone", pytest.param("with a gate and a window", marks=pytest.mark.slow)])
def test_it_is_the_stated_formula_on_the_map(beside: str) -> None:
    x, info, others = with_sinks(features()), info_of(*ROWS), BESIDE[beside]
    plain = dense_map(others, x, info)
    wanted, count = stated(plain, info)
    assert 10 < count < np.sum(np.asarray(info.kind) == Kind.TEXT) * 4, "some rows and heads are changed, some are not"
    np.testing.assert_allclose(wanted.sum(-1), plain.sum(-1), atol=1e-12)
    results = [everything((*others, VAR), x, info, x.q, which) for which in ("reference", "xla")]
    for out, rows, _ in results:
        np.testing.assert_allclose(rows, wanted, atol=1e-5)
        np.testing.assert_allclose(out, outputs(wanted, x), atol=1e-5)
        np.testing.assert_allclose(rows.sum(-1), plain.sum(-1), atol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), results[0][2], results[1][2])


@pytest.mark.parametrize(
    "change",
    [
        pytest.param({"move_fraction": 1.0}, marks=pytest.mark.slow),
        pytest.param({"rho": 0.9}, marks=pytest.mark.slow),
        pytest.param({"summ": 0.6}, marks=pytest.mark.slow),
        {"rho": 0.0, "summ": 0.0},
    ],
    ids=str,
)
def test_every_setting_is_that_of_the_formula(change: dict[str, float]) -> None:
    x, info, config = with_sinks(features()), info_of(*ROWS), dataclasses.replace(VAR, **change)
    plain = dense_map((), x, info)
    (wanted, count), (_, before) = stated(plain, info, config), stated(plain, info)
    assert count > 0 and (count == before) == (config.move_fraction == 1), "another test changes other rows"
    out, rows, gradients = everything((config,), x, info, x.q)
    np.testing.assert_allclose(rows, wanted, atol=1e-5)
    np.testing.assert_allclose(out, outputs(wanted, x), atol=1e-5)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradients))


@pytest.mark.parametrize("move", (0.4, 1.0))
def test_a_picture_that_is_hardly_seen_has_finite_gradients(move: float) -> None:
    """Weights of e^-45 and e^-86 beside those of the rest and of the sinks: squares of them are no float32 numbers."""
    config = dataclasses.replace(VAR, rho=0.0, summ=0.0, move_fraction=move)
    row = TokenInfo(*(jnp.full((1, 1), Kind.TEXT) for _ in TokenInfo._fields))
    heads = jnp.array([[0.0, -3.0, -45.0, 0.0], [0.0, -3.0, -86.0, -90.0], [0.0, -3.0, -1.0, 0.0]])

    def of(groups: jax.Array) -> tuple[jax.Array, jax.Array]:
        parts = Parts(groups, log_sum_exp(groups, (2,)))
        weights = Redistribution(config).merge(features(), parts, row, row)
        return log_sum_exp(groups + weights, (2,)).sum(), weights

    groups = heads.T[None, None]
    (_, weights), gradient = jax.jit(jax.value_and_grad(of, has_aux=True))(groups)
    assert np.isfinite(gradient).all()
    moved = 1 + move * np.exp(heads[:, [1, 3]]).sum(-1) / np.exp(heads[:, 2])
    np.testing.assert_allclose(weights[0, 0, 2], np.log(moved), rtol=1e-5)


def test_nothing_moved_changes_no_bit() -> None:
    x, info = with_sinks(features()), info_of(*ROWS)
    neutral = dataclasses.replace(VAR, move_fraction=0.0)
    jax.tree.map(np.testing.assert_array_equal, everything((neutral,), x, info, x.q), everything((), x, info, x.q))


@pytest.mark.parametrize("letters", ["sq", "a"], ids=["sinks in text alone", "sinks in answers alone"])
def test_without_a_visual_sink_nothing_changes(letters: str) -> None:
    info = info_of(*ROWS)
    sinks = {(b, i): dim for (b, i), dim in SINKS.items() if ("".join(ROWS[b]) + "." * T)[i] in letters}
    x = with_sinks(features(), sinks)
    assert sinks and stated(dense_map((), x, info), info, sinks=sinks)[1] == 0
    out, rows, _ = everything((VAR,), x, info, x.q)
    plain = everything((), x, info, x.q)
    np.testing.assert_allclose(out, plain[0], atol=1e-6)
    np.testing.assert_allclose(rows, plain[1], atol=1e-6)


def test_a_packed_row_equals_its_documents_alone() -> None:
    x = with_sinks(features())
    packed = everything((VAR,), x, info_of(*ROWS), x.q)[0]
    for b, documents in enumerate(ROWS):
        start = 0
        for document_ in documents:
            n = len(document_)
            one = jax.tree.map(lambda a, b=b, s=start: np.roll(a[b : b + 1], -s, axis=1).repeat(B, axis=0), x)
            alone = everything((VAR,), one, info_of((document_,), (document_,)), x.q)[0]
            np.testing.assert_allclose(packed[b, start : start + n], alone[0, :n], atol=1e-6)
            start += n


def test_two_with_other_dimensions_multiply() -> None:
    """Each by the test of the attention before any of them, on keys that both partitions cut."""
    x, info = with_sinks(features()), info_of(*ROWS)
    plain = dense_map((), x, info)
    wanted = plain
    for dim in DIMS:
        own = {where: d for where, d in SINKS.items() if d == dim}
        factor = stated(plain, info, sinks=own)[0] / np.where(plain > 0, plain, 1)
        wanted = wanted * factor
    wanted = wanted / np.maximum(wanted.sum(-1, keepdims=True), 1e-30)
    both = tuple(dataclasses.replace(VAR, dims=(dim,)) for dim in DIMS)
    mechanisms, every = at.build_mechanisms(both, DIMS_OF_HEADS, KEY), jnp.broadcast_to(jnp.arange(T), (B, T))
    found = jax.jit(lambda x: attend(x, info, mechanisms, queries=every).attention)(x)
    np.testing.assert_allclose(found, wanted, atol=1e-5)


def test_phi_is_the_largest_sink_dimension_over_the_root_mean_square() -> None:
    hidden = jnp.array([[3.0, -4.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, -1.0]])
    np.testing.assert_allclose(sink_score(hidden, (1, 2)), [1.6, 0, 1], rtol=1e-6)
    np.testing.assert_allclose(sink_score(hidden.astype(jnp.bfloat16), (0,)), [1.2, 0, 1], rtol=1e-6)
    with pytest.raises(ConfigError, match=r"dims.*0 to 3"):
        sink_score(hidden, (0, 4))


def test_sink_dimensions_of_a_model_are_found_from_its_first_tokens() -> None:
    """Layer 0 writes far more into dimensions 9 and 4 than into others, and layer 3 into dimension 2, too late."""
    config = presets.tiny(vocab_size=64, num_layers=4)
    plain = model(config, ModelOptions(scan_layers=False))
    values: dict[str, Any] = {path: param[...] for path, param in named_parameters(plain).items()}
    for layer, dim, size in ((0, 9, 60.0), (0, 4, 30.0), (3, 2, 200.0)):
        path = f"decoder.layer_runs.{layer}.layers.mlp.down.weight"
        values[path] = values[path].at[0, dim].multiply(size)
    vlm = with_values(plain, values)
    docs = [document([1], config, np.random.default_rng(seed)) for seed in range(6)]
    rows = batch([[doc] for doc in docs], config, tokens=1, patches=0)
    inputs = jax.jit(lambda m, b: m.forward(b, Want(inputs=True)).inputs)(vlm, rows)
    assert inputs.shape == (4, 6, 1, config.text.hidden_size)
    np.testing.assert_allclose(inputs[0], vlm.embedded(rows).x, atol=1e-6)
    assert sink_dimensions(inputs, 2) == (9, 4)
    assert sink_dimensions(inputs, 1) == (9,)
    for count in (0, 33):
        with pytest.raises(ConfigError, match="count"):
            sink_dimensions(inputs, count)


def test_by_default_it_leaves_out_the_first_two_layers_and_the_last() -> None:
    used = [plan[:2] for plan in at.plan_layer_runs((VAR,), 6) if plan.mechanisms]
    assert used == [(2, 5)]
    hybrid = at.plan_layer_runs((VAR,), 12, attending=(1, 3, 5, 7, 9, 11))
    assert [n for plan in hybrid if plan.mechanisms for n in range(plan.start, plan.stop)] == [5, 7, 9]
    assert [plan[:2] for plan in at.plan_layer_runs((dataclasses.replace(VAR, layers="all"),), 3)] == [(0, 3)]
    with pytest.raises(ConfigError, match=r"Var.layers is 'inner', .* only 3 of them; expected numbers of layers"):
        at.plan_layer_runs((VAR,), 3)


def test_a_config_survives_its_json_and_bad_ones_name_the_field() -> None:
    options = ModelOptions(mechanisms=(dataclasses.replace(VAR, layers=(1,)),))
    assert machinery.loads(ModelOptions, machinery.dumps(options)) == options
    for bad in ({"dims": (-1,)}, {"tau": 0.0}, {"rho": 1.1}, {"summ": -0.1}, {"move_fraction": 2.0}):
        with pytest.raises(ConfigError, match=next(iter(bad))):
            at.Var(**bad)
    with pytest.raises(ConfigError, match="dims"):
        at.build_mechanisms((at.Var(),), at.AttentionDims(4, 2, 8), jax.random.key(0))

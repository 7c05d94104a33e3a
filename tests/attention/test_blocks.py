"""Moba, Sparsifiner and Superlinear against their formulas, document by document and head by head in loops."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rave_jax import attention as at
from rave_jax.attention import sparsifiner
from rave_jax.attention.blocks import blocks_of, read_whole
from rave_jax.batch import Kind, TokenInfo
from rave_jax.config import ConfigError
from rave_jax.kernels.routed import RouteRule
from rave_jax.models.config import ModelOptions
from tests.attention.packed import DIMS, KEY, attend, dense_map, everything, features, info_of

T, SIZE = 40, 3
ROWS = (("ssvvvvvqqqaaaaaaa", "vvq", "vvvvqqqaaaaaa"), ("ssqqvvvvvvvvvvvvvvvvvvvqqaaaaa", "qaaa"))
INFO = info_of(*ROWS, length=T)
X = features(rows=2, length=T)
MOBA = at.Moba(SIZE, top_k=3)
SUPERLINEAR = at.Superlinear(SIZE, spans=2, rank=4)
SPARSIFINER = at.Sparsifiner(SIZE, keep=0.4, rank=4, every=2)


def documents(info: TokenInfo) -> list[tuple[int, np.ndarray]]:
    """Row and tokens of every document, in their order."""
    of = np.asarray(info.document)
    return [(b, np.flatnonzero(of[b] == n)) for b in range(len(of)) for n in range(1, of[b].max() + 1)]


def predicted(mechanism: Any, b: int, t: int, head: int, blocks: list[np.ndarray]) -> np.ndarray:
    """Logits of the blocks by the learned projections."""
    w_q, w_k = (np.float64(p[...]) for p in (mechanism.query, mechanism.key))
    q = np.float64(X.q[b, t, head]) @ w_q[head]
    keys = np.float64(X.k[b, :, head // 2]) @ w_k[head // 2]
    return np.array([q @ keys[block].mean(0) / w_q.shape[-1] ** 0.5 for block in blocks])


def oracle(config: at.MechanismConfig, mechanism: Any) -> np.ndarray:
    """The attention map [B,T,H,S]."""
    found = np.zeros((2, T, DIMS.num_heads, T))
    for b, tokens in documents(INFO):
        for place, t in enumerate(tokens):
            own = place // SIZE
            blocks = [tokens[n * SIZE : (n + 1) * SIZE] for n in range(own)]
            for head in range(DIMS.num_heads):
                q, k = np.float64(X.q[b, t, head]), np.float64(X.k[b, :, head // 2])
                if isinstance(config, at.Moba):
                    ranks, count = [q @ k[block].mean(0) for block in blocks], config.top_k - 1
                elif isinstance(config, at.Superlinear):
                    ranks, count = predicted(mechanism, b, t, head, blocks), config.spans
                else:
                    ranks, count = predicted(mechanism, b, t, head, blocks), int(np.ceil(round(0.4 * own, 9)))
                best = np.argsort(ranks)[::-1][:count]
                read = [tokens[own * SIZE : place + 1], *(blocks[n] for n in best)]
                parts = [np.exp(k[span] @ q * DIMS.head_dim**-0.5) for span in read]
                if isinstance(config, at.Superlinear):
                    weights = np.exp([0.0, *(ranks[n] for n in best)])
                    parts = [w * part / part.sum() for w, part in zip(weights, parts, strict=True)]
                scores = np.concatenate(parts)
                found[b, t, head, np.concatenate(read)] = scores / scores.sum()
    return found


@pytest.mark.parametrize("config", [MOBA, pytest.param(SPARSIFINER, marks=pytest.mark.slow), SUPERLINEAR], ids=str)
def test_queries_read_their_own_block_and_the_best_before_it(config: at.MechanismConfig) -> None:
    (mechanism,) = at.build_mechanisms((config,), DIMS, KEY)
    wanted = oracle(config, mechanism)
    out, rows, gradients = everything((config,), X, INFO, features(1, 2, T).q)
    np.testing.assert_allclose(rows, wanted, atol=1e-5)
    v = np.repeat(np.float64(X.v), 2, axis=2)
    np.testing.assert_allclose(out, np.einsum("BTHS,BSHh->BTHh", wanted, v), atol=1e-5)
    # Of the values and, by the products' rule, of queries: the choice has no gradient.
    if isinstance(config, at.Superlinear):
        return
    ct = np.float64(features(1, 2, T).q)
    of_values = np.einsum("BTHS,BTHh->BSHh", wanted, ct).reshape(2, T, 2, 2, 8).sum(3)
    np.testing.assert_allclose(gradients.v, of_values, atol=1e-4)
    through = np.einsum("BTHh,BSHh->BTHS", ct, v)
    through = wanted * (through - (wanted * through).sum(-1, keepdims=True)) * DIMS.head_dim**-0.5
    np.testing.assert_allclose(
        gradients.q, np.einsum("BTHS,BSHh->BTHh", through, np.repeat(np.float64(X.k), 2, axis=2)), atol=1e-4
    )


@pytest.mark.parametrize(
    ("config", "same"),
    [(at.Moba(SIZE, top_k=14), True), (at.Sparsifiner(SIZE, keep=1.0), True), (at.Superlinear(T), True), (MOBA, False)],
    ids=str,
)
def test_all_blocks_change_no_bit(config: at.MechanismConfig, same: bool) -> None:
    mechanisms = at.build_mechanisms((config,), DIMS, KEY)
    found, plain = (jax.jit(lambda x, m=m: attend(x, INFO, m).out)(X) for m in (mechanisms, []))
    assert bool((found == plain).all()) == same


def test_no_document_has_more_blocks_than_there_is_room_for() -> None:
    """Documents that are read whole have none, and the others those of their own tokens alone."""
    for size, whole in ((3, 6), (3, 12), (5, 5), (1, 1), (7, 30)):
        found = blocks_of(INFO, size, whole)
        assert found is not None
        of = np.asarray(found.of)
        assert of.max() <= found.count and not of[np.asarray(INFO.document) == 0].any()
        seen: list[tuple[int, int]] = []
        for b, tokens in documents(INFO):
            numbers = of[b, tokens]
            if len(tokens) <= whole:
                assert not numbers.any()
                continue
            np.testing.assert_array_equal(numbers - numbers[0], np.arange(len(tokens)) // size)
            seen += [(b, n) for n in set(numbers.tolist())]
        assert len(seen) == len(set(seen))
    assert blocks_of(INFO, 3, T) is None
    assert read_whole(RouteRule(2), 3) == 9 and read_whole(RouteRule(0.4), 3) == 6
    assert read_whole(RouteRule(0.6), 3) == 9


def test_the_predictor_learns_the_true_shares_of_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The stated loss; only the predictor has a gradient, and a step against it lowers the loss."""
    monkeypatch.setattr(sparsifiner, "BLOCK", 8)  # of twenty queries
    mechanisms = at.build_mechanisms((SPARSIFINER,), DIMS, KEY)

    @jax.jit
    def both(mechanisms: Any, x: at.Features) -> Any:
        def loss(mechanisms: Any, x: at.Features) -> jax.Array:
            return attend(x, INFO, mechanisms, losses=True).losses["sparsifiner"]

        return jax.value_and_grad(loss, (0, 1))(mechanisms, x), mechanisms[0].loss_weights(INFO)["sparsifiner"]

    (found, (of_weights, of_features)), weight = both(mechanisms, X)
    total, asked = 0.0, 0
    for b, tokens in documents(INFO):
        for place, t in enumerate(tokens):
            own = place // SIZE
            if place % 2 != 1 or own < 2 or read_whole(RouteRule(0.4), SIZE) >= len(tokens):
                continue
            asked += 1
            blocks = [tokens[n * SIZE : (n + 1) * SIZE] for n in range(own)]
            for head in range(DIMS.num_heads):
                q, k = np.float64(X.q[b, t, head]), np.float64(X.k[b, :, head // 2])
                true = np.array([np.exp(k[block] @ q * DIMS.head_dim**-0.5).sum() for block in blocks])
                logits = predicted(mechanisms[0], b, t, head, blocks)
                total -= (true / true.sum() * (logits - np.log(np.exp(logits).sum()))).sum() / DIMS.num_heads
    assert asked > 10 and float(weight) == asked
    np.testing.assert_allclose(found, total, rtol=1e-5)
    assert all(not np.asarray(g).any() for g in jax.tree.leaves(of_features))
    assert all(np.asarray(g).any() for g in jax.tree.leaves(of_weights))
    stepped = jax.tree.map(lambda p, g: p - 0.01 * g, mechanisms, of_weights)
    assert both(stepped, X)[0][0] < found


@pytest.mark.slow
def test_merged_spans_have_the_gradient_of_the_formula() -> None:
    """Of a direction in queries, keys, values and both parameters, by finite differences of the output."""
    mechanisms = at.build_mechanisms((SUPERLINEAR,), DIMS, KEY)
    ct = features(1, 2, T).q

    @jax.jit
    def loss(mechanisms: Any, x: at.Features) -> jax.Array:
        return jnp.sum(attend(x, INFO, mechanisms).out * ct)

    gradient = jax.jit(jax.grad(loss, (0, 1)))(mechanisms, X)
    rng, step = np.random.default_rng(0), 2e-3
    for name in ("query", "key", "q", "k", "v"):
        path = "mechanism" if name in ("query", "key") else "features"
        shape = getattr(mechanisms[0], name)[...].shape if path == "mechanism" else getattr(X, name).shape
        towards = jnp.asarray(rng.normal(size=shape) / np.sqrt(np.prod(shape)), jnp.float32)

        def at_step(sign: float, name: str = name, path: str = path, towards: Any = towards) -> float:
            if path == "features":
                return float(loss(mechanisms, X._replace(**{name: getattr(X, name) + sign * step * towards})))
            moved = jax.tree.map(lambda x: x, mechanisms)
            param = getattr(moved[0], name)
            param[...] = param[...] + sign * step * towards
            return float(loss(moved, X))

        found = (at_step(1) - at_step(-1)) / (2 * step)
        of = gradient[0][0] if path == "mechanism" else gradient[1]
        of = getattr(of, name)[...] if path == "mechanism" else getattr(of, name)
        np.testing.assert_allclose(found, float(jnp.sum(of * towards)), rtol=0.03, atol=0.03)


def test_text_alone_may_choose() -> None:
    config = at.Moba(SIZE, top_k=2, queries="text")
    rows, plain = everything((config,), X, INFO, X.q)[1], dense_map((), X, INFO)
    visual = np.asarray(INFO.kind) == Kind.VISUAL
    np.testing.assert_allclose(rows[visual], plain[visual], atol=1e-6)
    assert np.abs(np.asarray(rows - plain))[~visual].max() > 0.1


def test_wrong_settings_and_company_are_refused() -> None:
    for field, wrong in (("block", 0), ("top_k", 1)):
        with pytest.raises(ConfigError, match=f"^{field} is "):
            at.Moba(**{field: wrong})
    for field, value in (("block", 0), ("keep", 0.0), ("keep", 1.5), ("rank", 0), ("loss", -1.0), ("every", 0)):
        with pytest.raises(ConfigError, match=f"^{field} is "):
            at.Sparsifiner(**{field: value})
    for field in ("block", "spans", "rank"):
        with pytest.raises(ConfigError, match=f"^{field} is "):
            at.Superlinear(**{field: 0})
    for other, said in (
        (at.Avar(), "weighs or measures groups"),
        (at.ZeroTuning(2.0, route="after"), "changes the wei"),
    ):
        with pytest.raises(
            ConfigError, match=f"Superlinear cannot share a layer with {type(other).__name__}, which {said}"
        ):
            at.build_mechanisms((other, at.Superlinear()), DIMS, KEY)
    for other, said in (
        (at.Sparsifiner(), "Moba and Sparsifiner cannot share a layer: each chooses the regions"),
        (at.Gaze(), "Moba and Gaze cannot share a layer: each chooses the regions"),
        (at.Cca(), "Moba cannot share a layer with Cca, which counts tokens in another order"),
        (at.Decomposed(), "Moba cannot share a layer with Decomposed, which lets other queries meet some of the keys"),
    ):
        with pytest.raises(ConfigError, match=said):
            at.build_mechanisms((at.Moba(), other), DIMS, KEY)
    for config in (at.Moba(layers=(1,)), at.Sparsifiner(), at.Superlinear()):
        with pytest.raises(
            ConfigError, match=f"Pruning cannot share a model with {type(config).__name__}, not even in"
        ):
            ModelOptions((at.Pruning(layers=(0,)), config))

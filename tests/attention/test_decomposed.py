"""D-Attn: visual tokens see themselves, text meets them without RoPE; against the two softmaxes it is stated with."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rave_jax import attention as at
from rave_jax import config as machinery
from rave_jax.attention.attend import mask_codes, positions
from rave_jax.attention.rotation import rotate
from rave_jax.batch import Kind, TokenInfo
from rave_jax.config import ConfigError
from rave_jax.models.config import ModelOptions
from rave_jax.models.rope import text_rotation
from tests.attention.packed import DIMS, KEY, ROWS, B, T, biases, features, info_of

GATE = at.Rave(rank=4, start="random")
PLAIN = at.Decomposed()
KEPT = at.Decomposed(rope="kept")


def place_of(info: TokenInfo) -> jax.Array:
    """Rotary positions that differ between the axes."""
    return info.offset + 3 * jnp.arange(3)[:, None, None] * (info.offset % 3)


@functools.partial(jax.jit, static_argnames=("configs", "implementation"))
def run(configs: Any, x: at.Features, info: TokenInfo, ct: jax.Array, implementation: Any = "xla") -> Any:
    """As a layer does: positions, rotation, attention; output, map and the gradients of q0, k0 and v."""
    mechanisms = at.build_mechanisms(configs, DIMS, KEY)
    own = jnp.broadcast_to(jnp.arange(x.q.shape[1]), x.q.shape[:2])
    placed = positions(mechanisms, info, info, own, place_of(info))
    rotation = text_rotation(placed, DIMS.head_dim, 100.0, (2, 1, 1))
    codes = mask_codes(mechanisms, info, info, at.causal_codes(info))

    def layer(x: at.Features) -> Any:
        x = x._replace(q=rotate(x.q0, rotation), k=rotate(x.k0, rotation))
        keys = at.remember(mechanisms, x)
        both = at.attend(x, keys, codes, info, info, mechanisms, implementation=implementation, queries=own)
        return both.out, both.attention

    out, pull, rows = jax.vjp(layer, x, has_aux=True)
    return out, rows, pull(ct)[0]


def by_hand(x: at.Features, info: TokenInfo, gate: bool = False, window: int = T) -> np.ndarray:
    """The output of the stated rules: for text alpha of a softmax over visual keys, and the rest over text keys."""
    rotation = text_rotation(place_of(info), DIMS.head_dim, 100.0, (2, 1, 1))
    q0, k0, v, q, k = (np.float64(a) for a in (x.q0, x.k0, x.v, rotate(x.q0, rotation), rotate(x.k0, rotation)))
    bias = np.zeros((B, T, DIMS.num_heads, T))
    if gate:
        mechanism = at.build_mechanisms((GATE, PLAIN), DIMS, KEY)[0]
        said = mechanism.score(x, mechanism.remember(x), info, info)
        assert said is not None
        bias = biases(said)
    info = jax.tree.map(np.asarray, info)
    out = np.zeros_like(q)
    for b, i, h in np.ndindex(B, T, DIMS.num_heads):
        if info.document[b, i] == 0:
            continue
        g = h // 2
        if info.kind[b, i] == Kind.VISUAL:
            out[b, i, h] = v[b, i, g]
            continue
        met = [j for j in range(max(0, i - window + 1), i + 1) if info.document[b, j] == info.document[b, i]]
        sums, parts = [], []
        for keys, query, key in (
            ([j for j in met if info.kind[b, j] == Kind.VISUAL], q0, k0),
            ([j for j in met if info.kind[b, j] != Kind.VISUAL], q, k),
        ):
            weights = np.exp([query[b, i, h] @ key[b, j, g] / np.sqrt(8) + bias[b, i, h, j] for j in keys])
            sums.append(weights.sum())
            parts.append(
                sum((w * v[b, j, g] for w, j in zip(weights, keys, strict=True)), np.zeros(8)) / max(sums[-1], 1e-9)
            )
        alpha = sums[0] / sum(sums)
        out[b, i, h] = alpha * parts[0] + (1 - alpha) * parts[1]
    return out


@pytest.mark.parametrize("beside", ["alone", "a gate", pytest.param("a window", marks=pytest.mark.slow)])
def test_it_is_the_stated_formula(beside: str) -> None:
    x, info = features(), info_of(*ROWS)
    configs: dict[str, tuple[at.MechanismConfig, ...]] = {
        "alone": (PLAIN,),
        "a gate": (GATE, PLAIN),
        "a window": (PLAIN, at.SlidingWindow(4)),
    }
    wanted = by_hand(x, info, gate=beside == "a gate", window=4 if beside == "a window" else T)
    results = [run(configs[beside], x, info, x.q, which) for which in ("reference", "xla")]
    for out, rows, _ in results:
        np.testing.assert_allclose(out, wanted, atol=1e-5)
        v = np.repeat(np.float64(x.v), 2, axis=2)
        np.testing.assert_allclose(np.einsum("BTHS,BSHh->BTHh", rows, v), wanted, atol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), results[0][2], results[1][2])
    for name in ("q0", "k0", "v"):
        assert np.abs(getattr(results[1][2], name)).max() > 1e-3


def test_gradients_are_those_of_the_formula() -> None:
    """By differences of the loops in float64, in some numbers of q0, k0 and v of text and visual tokens."""
    x, info = features(), info_of(*ROWS)
    ct = features(1).q
    gradients = run((PLAIN,), x, info, ct)[2]
    for name in ("q0", "k0", "v"):
        for where in ((0, 3, 1, 2), (0, 1, 0, 5), (1, 9, 1, 0), (0, 6, 1, 7)):
            ends = []
            for step in (-0.05, 0.05):
                moved = x._replace(**{name: getattr(x, name).at[where].add(step)})
                ends.append(np.sum(by_hand(moved, info) * np.float64(ct)))
            found = np.asarray(getattr(gradients, name))[where]
            np.testing.assert_allclose(found, (ends[1] - ends[0]) / 0.1, atol=5e-3, err_msg=f"{name} {where}")


def test_with_rope_kept_text_is_plain_attention() -> None:
    """And visual tokens get their own values; a text-only row differs in nothing under both settings."""
    x, info = features(), info_of(*ROWS)
    plain, kept = run((), x, info, x.q), run((KEPT,), x, info, x.q)
    text = np.asarray(info.kind) == Kind.TEXT
    np.testing.assert_allclose(kept[0][text], plain[0][text], atol=1e-6)
    np.testing.assert_allclose(kept[1][text], plain[1][text], atol=1e-6)
    visual = np.asarray(info.kind) == Kind.VISUAL
    values = np.repeat(np.asarray(x.v), 2, axis=2)
    for config in (PLAIN, KEPT):
        np.testing.assert_allclose(run((config,), x, info, x.q)[0][visual], values[visual], atol=1e-6)
    words = info_of(("ssqqaaaa", "qa"), ("sqa",))
    spoken = run((), x, words, x.q)
    for config in (PLAIN, KEPT):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), run((config,), x, words, x.q), spoken)


def test_the_order_of_a_picture_does_not_matter_to_text() -> None:
    x, info = features(), info_of(("ssvvvvvqqa",), ("vvvqa",))
    turned = jax.tree.map(lambda a: a.at[0, 2:7].set(a[0, 2:7][::-1]), x)
    after = (0, slice(7, 10))
    found, other = (run((PLAIN,), one, info, x.q)[0][after] for one in (x, turned))
    np.testing.assert_allclose(found, other, atol=1e-6)
    kept, moved = (run((KEPT,), one, info, x.q)[0][after] for one in (x, turned))
    assert np.abs(kept - moved).max() > 1e-2


def test_visual_tokens_are_not_rotated_and_text_stays_where_it_was() -> None:
    info = info_of(*ROWS)
    own = jnp.broadcast_to(jnp.arange(T), (B, T))
    found = positions(at.build_mechanisms((PLAIN,), DIMS, KEY), info, info, own, place_of(info))
    np.testing.assert_array_equal(found, np.where(np.asarray(info.kind) == Kind.VISUAL, 0, place_of(info)))
    x = features()
    turned = rotate(x.k0, text_rotation(found, DIMS.head_dim, 100.0))
    visual = np.asarray(info.kind) == Kind.VISUAL
    np.testing.assert_array_equal(turned[visual], x.k0[visual])


def test_a_packed_row_equals_its_documents_alone() -> None:
    x = features()
    packed = run((PLAIN, GATE), x, info_of(*ROWS), x.q)[0]
    for b, documents in enumerate(ROWS):
        start = 0
        for document in documents:
            n = len(document)
            one = jax.tree.map(lambda a, b=b, s=start: np.roll(a[b : b + 1], -s, axis=1).repeat(B, axis=0), x)
            alone = run((PLAIN, GATE), one, info_of((document,), (document,)), x.q)[0]
            np.testing.assert_allclose(packed[b, start : start + n], alone[0, :n], atol=1e-6)
            start += n


class Two(at.Mechanism):
    """Columns of q and k beside another query."""

    def score(self, x: at.Features, remembered: None, info_q: TokenInfo, info_k: TokenInfo) -> at.Score:
        return at.Score(channels=at.Channels(x.q0[..., :3], x.k0[..., :3]))


def test_channels_are_added_for_all_keys_in_any_order() -> None:
    x, info = features(), info_of(*ROWS)
    codes = at.causal_codes(info)
    unrotated = at.build_mechanisms((PLAIN,), DIMS, KEY)[0]
    every = jnp.broadcast_to(jnp.arange(T), (B, T))

    def rows(mechanisms: Any) -> np.ndarray:
        keys = at.remember(mechanisms, x)
        return np.asarray(at.attend(x, keys, codes, info, info, mechanisms, queries=every).attention)

    products = np.einsum("BTHn,BSHn->BTHS", x.q0[..., :3], np.repeat(x.k0[..., :3], 2, axis=2))
    alone = rows([unrotated]) * np.exp(products)
    wanted = alone / np.maximum(alone.sum(-1, keepdims=True), 1e-30)
    np.testing.assert_allclose(rows([Two(), unrotated]), wanted, atol=1e-5)
    np.testing.assert_allclose(rows([unrotated, Two()]), wanted, atol=1e-5)


SEES_LATER = (
    "^Decomposed cannot share a layer with Croc, which lets tokens see later ones; remove one of them, or give them "
    r"different layers \(their field `layers`\)$"
)


@pytest.mark.parametrize(
    ("configs", "message"),
    [
        ((PLAIN, PLAIN), "Decomposed cannot stand twice in a layer: each sets the rotary positions"),
        (
            (at.TextPositions(), PLAIN),
            "TextPositions and Decomposed cannot share a layer: each sets the rotary",
        ),
        ((PLAIN, at.Cca()), "Decomposed and Cca cannot share a layer: each sets the rotary positions"),
        ((PLAIN, at.Croc()), SEES_LATER),
        ((KEPT, at.Croc()), SEES_LATER),
        ((KEPT, at.Cca()), "Decomposed cannot share a layer with Cca, which counts tokens in another order"),
        (
            (at.Mma(), PLAIN),
            "Decomposed cannot share a layer with Mma, which shows keys to queries beyond",
        ),
    ],
)
def test_what_it_cannot_share_is_refused_by_name(configs: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        at.build_mechanisms(configs, DIMS, KEY)


def test_what_it_leaves_can_be_joined() -> None:
    for configs in ((PLAIN, GATE, at.ZeroTuning(2.0, route="after")), (KEPT, at.Mma(), at.TextPositions())):
        at.build_mechanisms(configs, DIMS, KEY)
    options = ModelOptions(mechanisms=(KEPT, at.Rave()))
    assert machinery.loads(ModelOptions, machinery.dumps(options)) == options

"""PINE against its algorithm in words, token by token and head by head, with keys rotated where they are seen."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rave_jax import attention as at
from rave_jax.attention.attend import mask_codes
from rave_jax.attention.pine import segments_of
from rave_jax.attention.rotation import Rope, Rotation, rotate
from rave_jax.batch import Role, TokenInfo
from tests.attention.test_other_masks import DIMS, KEY, Token, info_of, row_of, tokens_of

FREQUENCIES = np.array([1.0, 0.3, 0.1, 0.03])
CONFIG = at.Pine(pictures=3)
DOCUMENTS = (
    [(Role.SYSTEM, [2]), (Role.QUESTION, [1, (1, 2, 2), 3, (2, 1, 2), 2, (1, 1, 3), 4]), (Role.RESPONSE, [2])],
    [(Role.QUESTION, [(1, 2, 2), (1, 1, 2), 2]), (Role.RESPONSE, [1]), (Role.QUESTION, [(1, 1, 2), 1])],
    [(Role.QUESTION, [3, (1, 1, 2), 2])],
)
"""Three segments with text between them; two that nothing wraps, and a picture of a later turn; one alone."""
SEGMENTS = (
    ([2, 3, 4, 5, 6, 7, 8], [9, 10, 11, 12, 13, 14], [15, 16, 17, 18, 19]),
    ([0, 1, 2, 3], [4, 5, 6]),
    ([2, 3, 4, 5],),
)


def rows() -> list[Token]:
    return row_of([tokens_of(document) for document in DOCUMENTS])


def features(seed: int, info: TokenInfo, config: at.Pine) -> at.Features:
    """Random features, rotated as the mechanism places the tokens."""
    rng = np.random.default_rng(seed)
    B, T = info.offset.shape
    shapes = [(4, 8), (2, 8), (2, 8)]
    return rotated(*(jnp.asarray(rng.normal(size=(B, T, *s)) * 1.5, jnp.float32) for s in shapes), info, config)


def rotated(q0: jax.Array, k0: jax.Array, v: jax.Array, info: TokenInfo, config: at.Pine) -> at.Features:
    B, T = info.offset.shape
    own = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32), (B, T))
    told = jnp.broadcast_to(info.offset, (3, B, T))
    placed = at.positions(at.build_mechanisms((config,), DIMS, KEY), info, info, own, told)
    rope = Rope(placed, jnp.asarray(FREQUENCIES, jnp.float32))
    angles = placed[0, ..., None] * rope.frequencies
    rotation = Rotation(jnp.cos(angles), jnp.sin(angles))
    return at.Features(rotate(q0, rotation), rotate(k0, rotation), v, q0, k0, jnp.zeros((B, T, 1)), rope)


@functools.partial(jax.jit, static_argnames="configs")
def attend(configs: tuple[at.MechanismConfig, ...], x: at.Features, info: TokenInfo) -> tuple[jax.Array, jax.Array]:
    mechanisms = at.build_mechanisms(configs, DIMS, KEY)
    codes = mask_codes(mechanisms, info, info, at.causal_codes(info))
    every = jnp.broadcast_to(jnp.arange(x.q.shape[1]), x.q.shape[:2])
    out = at.attend(x, at.remember(mechanisms, x), codes, info, info, mechanisms, queries=every)
    assert out.attention is not None
    return out.out, out.attention


def turned(x: np.ndarray, position: float) -> np.ndarray:
    a, b = x[:4], x[4:]
    cos, sin = np.cos(position * FREQUENCIES), np.sin(position * FREQUENCIES)
    return np.concatenate([a * cos - b * sin, b * cos + a * sin])


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max())
    return e / e.sum()


def pine(q0: np.ndarray, k0: np.ndarray, segments: tuple[list[int], ...]) -> np.ndarray:
    """The map [H,T,T] of one document, of features [T,heads,8]; the algorithm of the paper."""
    T, H, _ = q0.shape
    where = {token: n for n, tokens in enumerate(segments) for token in tokens}
    end = max(where) + 1
    base = np.arange(T)
    for tokens in segments:
        base[tokens] = np.arange(end - len(tokens), end)
    result = np.zeros((H, T, T))
    for h in range(H):
        keys = k0[:, h // 2]
        before = np.zeros((T, len(segments)))
        for i in range(min(where), T):
            others = [j for n, tokens in enumerate(segments) if n != where.get(i) for j in tokens]
            if others:
                shares = dict(zip(others, softmax(keys[others] @ q0[i, h] / 8**0.5), strict=True))
                before[i] = [sum(shares.get(j, 0.0) for j in tokens) / len(tokens) for tokens in segments]
        for i in range(T):
            weight = before[i]
            if i in where:
                weight = before[segments[where[i]]].sum(0)
                weight[where[i]] = np.inf
            place, moved = base.copy(), 0
            for n in sorted(range(len(segments)), key=lambda n: -weight[n]) if i >= min(where) else ():
                place[segments[n]] -= moved
                moved += len(segments[n])
            seen = [j for j in range(T) if place[j] <= base[i]]
            scores = [turned(q0[i, h], base[i]) @ turned(keys[j], place[j]) / 8**0.5 for j in seen]
            result[h, i, seen] = softmax(np.array(scores))
    return result


def test_tokens_are_in_the_stated_segments() -> None:
    info = info_of(rows())
    found = segments_of(info, info, CONFIG)
    for number, segments in enumerate(SEGMENTS, start=1):
        there = np.flatnonzero(np.asarray(info.document)[0] == number)
        wanted = [next((n for n, tokens in enumerate(segments, 1) if i in tokens), 0) for i in range(len(there))]
        assert np.asarray(found.own)[0, there].tolist() == wanted
        last = max(segments[-1])
        assert np.asarray(found.behind)[0, there].tolist() == [i > last for i in range(len(there))]


def test_attention_is_the_algorithm_of_the_paper() -> None:
    """In a packed row; and rows on demand are those of the map."""
    info = info_of(rows())
    x = features(0, info, CONFIG)
    out, rows_of_map = attend((CONFIG,), x, info)
    for number, segments in enumerate(SEGMENTS, start=1):
        there = np.flatnonzero(np.asarray(info.document)[0] == number)
        span = slice(there[0], there[-1] + 1)
        wanted = pine(np.float64(x.q0)[0, span], np.float64(x.k0)[0, span], segments)
        found = np.moveaxis(np.asarray(rows_of_map)[0, span][:, :, span], 0, 1)
        np.testing.assert_allclose(found, wanted, atol=2e-6)
        values = np.repeat(np.float64(x.v)[0, span], 2, axis=1)
        np.testing.assert_allclose(out[0, span], np.einsum("hij,jhc->ihc", wanted, values), atol=5e-6)


def test_the_order_of_pictures_does_not_matter() -> None:
    """Pictures in another order, with their features: each token keeps its output."""
    config = at.Pine(pictures=3, wrapped=0)
    parts = [[0, 1], [2, 3, 4, 5], [6, 7, 8, 9], [10, 11, 12], [13, 14, 15]]
    order = [*parts[0], *parts[3], *parts[1], *parts[2], *parts[4], *range(16, 60)]
    grids: list[Any] = [(1, 2, 2), (2, 1, 2), (1, 1, 3)]
    one, other = (
        info_of(row_of([tokens_of([(Role.QUESTION, [2, *(grids[n] for n in of), 3])])]))
        for of in ((0, 1, 2), (2, 0, 1))
    )
    x = features(1, one, config)
    y = rotated(*(part[:, jnp.asarray(order)] for part in (x.q0, x.k0, x.v)), other, config)
    found, again = attend((config,), x, one)[0], attend((config,), y, other)[0]
    np.testing.assert_allclose(again[0, :16], np.asarray(found)[0, order][:16], atol=5e-6)
    plain, moved = attend((), x, one)[0], attend((), y, other)[0]
    assert np.abs(np.asarray(moved)[0, 5:9] - np.asarray(plain)[0, 2:6]).max() > 0.01


def test_one_picture_changes_nothing() -> None:
    """Bit for bit by the option; and a document with one picture keeps its attention."""
    info = info_of(rows())
    x = features(2, info, at.Pine(pictures=1))
    none, _ = attend((), x, info)
    off, _ = attend((at.Pine(pictures=1),), x, info)
    np.testing.assert_array_equal(off, none)
    on, _ = attend((CONFIG,), features(2, info, CONFIG), info)
    last = np.asarray(info.document)[0] == 3
    np.testing.assert_allclose(np.asarray(on)[0, last], np.asarray(none)[0, last], atol=2e-6)

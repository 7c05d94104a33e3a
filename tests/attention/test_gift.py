"""GIFT: rows of answers and saliency are the stated formulas, written out head by head."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rave_jax import attention as at
from rave_jax.attention.gift import GazeShift, question_rows, saliency_of
from rave_jax.attention.prompted import largest_half
from rave_jax.config import ConfigError
from rave_jax.typing import Array
from tests.attention.packed import DIMS, KEY, attend, dense_map, features, info_of, outputs

ROWS = (("ssvvvqqaaa",), ("qvvqvqaa",))
TURNS = ("1111111111", "11112222")
GIFT = at.Gift(alpha=3.0, beta=1.5, saliency_layer=0, layers=(0,))


def given(saliency: Any, config: at.Gift = GIFT) -> at.Mechanism:
    (built,) = at.build_mechanisms((config,), DIMS, KEY)
    assert isinstance(built, GazeShift)
    built.given = jnp.asarray(saliency, jnp.float32)
    return built


def shifted(P: np.ndarray, S: np.ndarray, letters: str, turns: str) -> np.ndarray:
    """Rows [T,H,S] of one document after the stated change."""
    visual = np.array([letter == "v" for letter in letters])
    P, H, g = P.copy(), P.shape[1], np.exp(GIFT.alpha * S[: len(letters)])
    for i, letter in enumerate(letters):
        if letter != "a":
            continue
        row = P[i]
        asks = np.array([other == "q" and turn == turns[i] for other, turn in zip(letters, turns, strict=True)])
        looks = np.argsort(-row[:, visual].sum(-1), kind="stable")[: H // 2]
        reads = np.argsort(-row[:, asks].sum(-1), kind="stable")[: H // 2]
        r = sum((row[h, visual] * g[visual]).sum() for h in looks) / sum(row[h, visual].sum() for h in looks)
        for h in looks:
            row[h, visual] *= g[visual]
        for h in reads:
            row[h, asks] *= GIFT.beta * r
        row /= row.sum(-1, keepdims=True)
    return P


def test_rows_of_answers_are_the_stated_ones() -> None:
    """The output, and rows on demand; in two documents, one a row, of which one has two turns."""
    x, info = features(), info_of(*ROWS)
    info = info._replace(turn=jnp.asarray([[*map(int, turns)] + [0] * (16 - len(turns)) for turns in TURNS]))
    S = np.random.default_rng(1).random((2, 16))
    plain = dense_map((), x, info)
    wanted = plain.copy()
    for b, ((letters,), turns) in enumerate(zip(ROWS, TURNS, strict=True)):
        n = len(letters)
        wanted[b, :n, :, :n] = shifted(plain[b, :n, :, :n], S[b], letters, turns)
    every = jnp.broadcast_to(jnp.arange(16), (2, 16))

    @jax.jit
    def run(x: at.Features, saliency: Array) -> at.AttentionOutput:
        return attend(x, info, [given(saliency)], queries=every)

    found = run(x, S)
    np.testing.assert_allclose(found.attention, wanted, atol=1e-5)
    np.testing.assert_allclose(found.out, outputs(wanted, x), atol=1e-5)
    assert np.abs(wanted - plain).max() > 0.1


def test_saliency_is_limited_and_moved_to_between_0_and_1() -> None:
    rng = np.random.default_rng(2)
    info = info_of(("sqvvvvqv",), ("qqvvvvvvvvvvvvvv",))
    rises = rng.random((2, 16, 4))
    rises[1, 5] = 40.0  # beyond three deviations of fourteen
    # The tokens of a picture may lie in another order than their offsets.
    offset = info.offset.at[0, 2:6].set(jnp.asarray([4, 2, 5, 3]))
    run = jax.jit(lambda rises: saliency_of(rises, info._replace(offset=offset), size=20))
    found = np.asarray(run(jnp.asarray(rises, jnp.float32)))
    assert found.shape == (2, 20)
    for b, places in enumerate(([2, 3, 4, 5, 7], [*range(2, 16)])):
        mine = rises[b, places]
        best = np.argsort(-mine.sum(0), kind="stable")[:2]
        S = mine[:, best].mean(1)
        S = np.clip(S, S.mean() - 3 * S.std(), S.mean() + 3 * S.std())
        wanted = np.zeros(20)
        wanted[np.asarray(offset)[b, places]] = (S - S.min()) / (S.max() - S.min())
        np.testing.assert_allclose(found[b], wanted, atol=1e-5)
    assert np.all(np.asarray(run(np.ones((2, 16, 4), np.float32))) == 0), "what is even points nowhere"


def test_the_question_is_the_last_turns_text_behind_a_picture() -> None:
    info = info_of(("qvqaqvqqaa",))
    turn = jnp.asarray([[1, 1, 1, 1, 2, 2, 2, 2, 2, 2] + [0] * 6])
    assert np.flatnonzero(np.asarray(question_rows(info._replace(turn=turn)))[0]).tolist() == [4, 6, 7]
    content = jnp.zeros((2, 16), bool).at[0, 6].set(True)
    both = jax.tree.map(lambda code: jnp.concatenate([code, code]), info._replace(turn=turn))
    found = np.asarray(question_rows(both, content))
    assert [np.flatnonzero(row).tolist() for row in found] == [[6], [4, 6, 7]], "all where none has a content"


def test_half_of_the_heads_is_at_least_one() -> None:
    assert jax.jit(largest_half)(np.float32([[1], [2]])).tolist() == [[True], [True]]


def test_the_neutral_setting_asks_for_nothing() -> None:
    for neutral in (at.Gift(alpha=0.0), at.Vhr(alpha=1.0, choose="prompt")):
        assert type(neutral.build(DIMS, KEY)) is at.Mechanism


def test_refusals() -> None:
    x, info = features(), info_of(*ROWS)
    for config in (GIFT, at.Vhr(choose="prompt")):
        mechanisms = at.build_mechanisms((config,), DIMS, KEY)
        with pytest.raises(ConfigError, match=f"{type(config).__name__} is decided for each prompt while"):
            jax.eval_shape(lambda x, m=mechanisms: attend(x, info, m), x)
    with pytest.raises(ConfigError, match=r"Gift cannot share a layer with .*, which chooses the regions"):
        at.build_mechanisms((GIFT, at.Gaze(max_regions=4, top_k=1)), DIMS, KEY)
    with pytest.raises(ConfigError, match=r"Gift cannot stand twice in a layer: each changes rows of weights"):
        at.build_mechanisms((GIFT, GIFT), DIMS, KEY)
    with pytest.raises(ConfigError, match=r'heads is .*none where choose is "prompt"'):
        at.Vhr(heads=(1,), choose="prompt")


def test_late_layers_are_the_second_and_the_last_fourteen() -> None:
    assert list(at.Vhr(layers="late").layers_of(range(32))) == [1, *range(18, 32)]
    assert list(at.Vhr(layers="late").layers_of(range(3))) == [0, 1, 2]

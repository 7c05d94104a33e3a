"""Which tokens leave after a layer: who decides, by what, and that documents of a packed row are each alone."""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rave_jax import attention as at
from rave_jax.attention import tokens
from rave_jax.attention.attend import mask_codes
from rave_jax.attention.base import Candidates
from rave_jax.attention.dyvte import router_input, router_logits
from rave_jax.attention.plan import plan_layer_runs
from rave_jax.attention.pruning import place_of
from rave_jax.batch import Kind, TokenInfo
from rave_jax.config import ConfigError
from rave_jax.kernels.attention.base import tile_allow
from rave_jax.layout import FixedRegions
from rave_jax.models.config import ModelOptions
from tests.attention.packed import DIMS, KEY, dense_map, features, info_of

# As in `packed.py`: s system prompt, v picture, q question, a answer.
ROWS = (("ssvvvqqaavvqa", "vvq", "qaa"), ("ssqqaaav", "svvvv"))
T = 24
PRUNING = at.Pruning(keep=0.5, slope=1.5, layers=(0,))


@functools.cache
def rows() -> TokenInfo:
    """Codes of the rows; each run of visual tokens is a picture of one row."""
    info = info_of(*ROWS, length=T)
    kind = np.asarray(info.kind)
    col, width = np.zeros_like(kind), np.zeros_like(kind)
    for b in range(len(kind)):
        start = 0
        for t in range(T + 1):
            if t == T or kind[b, t] != Kind.VISUAL or (t and info.document[b, t] != info.document[b, t - 1]):
                col[b, start:t], width[b, start:t] = np.arange(t - start), t - start
                start = t if t < T and kind[b, t] == Kind.VISUAL else t + 1
    one = jnp.asarray((width > 0).astype(np.int32))
    return info._replace(col=jnp.asarray(col), grid_w=jnp.asarray(width), grid_h=one, grid_t=one)


def test_the_last_token_before_the_next_answer_decides() -> None:
    """Each picture has the last token of its own prompt. A document's first token stays, and what decides."""
    wanted = [
        "ssvvvqqaavvqa" + "vvq" + "qaa",
        "..666........" + ".5." + "...",
        "ssqqaaav" + "svvvv",
        "........" + ".444.",
    ]
    expected = np.full((2, T), T)
    for b, marks in enumerate((wanted[1], wanted[3])):
        for t, mark in enumerate(marks):
            if mark != ".":
                expected[b, t] = int(mark)
    # Of the second turn, the second document of the first row, and that of the second row.
    expected[0, [9, 10]] = 11
    expected[0, 14] = 15
    expected[1, [9, 10, 11]] = 12
    np.testing.assert_array_equal(jax.jit(tokens.deciders)(rows()), expected)


def deciding(info: TokenInfo) -> tokens.Deciding:
    by = tokens.deciders(info)
    return tokens.Deciding(by, jnp.broadcast_to(jnp.arange(by.shape[1]), by.shape))


@functools.partial(jax.jit, static_argnames="configs")
def kept(configs: Any, x: at.Features, info: TokenInfo) -> Any:
    """What tokens get of attention, and which of them stay."""
    mechanisms = at.build_mechanisms(configs, DIMS, KEY)
    codes = mask_codes(mechanisms, info, info, at.causal_codes(info))
    decide = deciding(info)
    keys = at.remember(mechanisms, x)
    out = at.attend(x, keys, codes, info, info, mechanisms, deciding=decide, implementation="reference")
    return out.received, tokens.kept(mechanisms, Candidates(x.hidden, out.received, decide.by, info))


def test_pruning_ranks_by_the_last_row_without_the_bias_of_places() -> None:
    """a_i / exp(sigma i / L), a the mean over heads of the deciding row, of attention as other mechanisms change it."""
    x, info = features(rows=2, length=T), rows()
    configs = (at.Rave(rank=2), at.SlidingWindow(6), PRUNING)
    found, stays = kept(configs, x, info)
    by = np.asarray(jax.jit(tokens.deciders)(info))
    dense = dense_map(configs, x, info).mean(axis=2)
    expected = np.ones((2, T), bool)
    for b in range(2):
        for decider in {*by[b].tolist()} - {T}:
            mine = np.flatnonzero(by[b] == decider)
            a = dense[b, decider, mine]
            np.testing.assert_allclose(np.asarray(found)[b, mine], a, atol=1e-6)
            score = a / np.exp(1.5 * np.asarray(info.col)[b, mine] / np.asarray(info.grid_w)[b, mine])
            expected[b, mine] = False
            expected[b, mine[np.argsort(-score)[: math.floor(0.5 * len(mine) + 0.5)]]] = True
    np.testing.assert_array_equal(stays, expected)
    assert not np.asarray(stays).all()
    for b, start, length in _documents():
        alone = kept(configs, *_alone(x, b, start, length))[1]
        np.testing.assert_array_equal(alone[0, :length], stays[b, start : start + length])


def test_padding_leaves_before_all_else_and_no_more_stay_than_show_the_picture() -> None:
    """As the debiasing: a_i / exp(sigma i / L), then 0 on padding; of K tokens no padding stays."""
    x, info = features(rows=2, length=T), rows()
    by = np.asarray(jax.jit(tokens.deciders)(info))
    padded = np.zeros((2, T), np.int32)
    padded[0, [3, 10]], padded[1, 9:12] = 1, 1
    found, stays = kept(
        (at.Pruning(keep=0.5, slope=1.5, padding="leaves", layers=(0,)),), x, info._replace(padded=jnp.asarray(padded))
    )
    for b in range(2):
        for decider in {*by[b].tolist()} - {T}:
            mine = np.flatnonzero(by[b] == decider)
            place = np.asarray(info.col)[b, mine] / np.asarray(info.grid_w)[b, mine]
            score = np.where(padded[b, mine] > 0, 0, np.asarray(found)[b, mine] / np.exp(1.5 * place))
            count = min(math.floor(0.5 * len(mine) + 0.5), int(np.sum(padded[b, mine] == 0)))
            assert {*mine[np.argsort(-score)[:count]].tolist()} == {*mine[np.asarray(stays)[b, mine]].tolist()}
    assert not np.asarray(stays)[1, 9:12].any(), "all of a picture, where all is padding"


def _documents() -> list[tuple[int, int, int]]:
    """(row, first token, number of tokens) of each document."""
    found = []
    for b, documents in enumerate(ROWS):
        start = 0
        for document in documents:
            found.append((b, start, len(document)))
            start += len(document)
    return found


def _alone(x: at.Features, b: int, start: int, length: int) -> tuple[at.Features, TokenInfo]:
    """A document of the packed rows in two equal rows of its own."""

    def moved(a: Any) -> Any:
        return np.roll(np.asarray(a)[b : b + 1], -start, axis=1).repeat(2, axis=0)

    here = np.arange(T) < length
    info = jax.tree.map(lambda code: np.where(here, moved(code), 0), rows())
    return jax.tree.map(moved, x), info._replace(document=np.where(here, 1, 0) * np.ones((2, 1), np.int32))


def test_places_count_by_frame_row_and_column() -> None:
    zero = jnp.zeros((1, 1), jnp.int32)
    info = TokenInfo(*[zero] * len(TokenInfo._fields))
    info = info._replace(frame=zero + 1, row=zero + 1, col=zero + 2, grid_t=zero + 2, grid_h=zero + 3, grid_w=zero + 4)
    assert float(place_of(info)[0, 0]) == (1 * 12 + 1 * 4 + 2) / 24 and float(place_of(rows())[0, 0]) == 0


def test_a_router_reads_the_text_behind_the_picture_and_lets_all_leave_or_none() -> None:
    """f(x) = W2 GELU(W1 [mean of the text between; the last token])."""
    rng, info = np.random.default_rng(1), rows()
    hidden = jnp.asarray(rng.normal(size=(2, T, 6)), jnp.float32)
    router = at.Dyvte(width=5).build(at.AttentionDims(4, 2, 8, 6), KEY)
    by = jax.jit(tokens.deciders)(info)
    given = Candidates(hidden, None, by, info)
    stay = jax.jit(lambda router, given: tokens.kept([router], given))
    assert np.asarray(stay(router, given)).all(), "nothing leaves at the start"
    router.second = type(router.second)(jnp.asarray(rng.normal(size=(2, 5)), jnp.float32))
    first, second = (np.float64(w[...]) for w in (router.first, router.second))

    @jax.jit
    def said(router: Any, given: Candidates, decider: Any) -> Any:
        x = router_input(given.hidden, given.info, given.by, decider)
        return router_logits(x, router.first[...], router.second[...])

    between = {(0, 6): [5], (0, 11): [], (0, 15): [], (1, 12): []}
    stays = np.ones((2, T), bool)
    for (b, decider), text in between.items():
        mean = np.float64(hidden)[b, text].mean(0) if text else np.zeros(6)
        x = np.stack([mean, np.float64(hidden)[b, decider]])
        inner = np.einsum("fnd,nd->f", first, x)
        z = second @ (inner * 0.5 * (1 + np.vectorize(math.erf)(inner / 2**0.5)))
        mine = said(router, given, np.full((2, 1), decider))[b]
        np.testing.assert_allclose(mine, z, atol=1e-5)
        stays[b, np.asarray(by)[b] == decider] = z[1] <= z[0]
    np.testing.assert_array_equal(stay(router, given), stays)
    assert not stays.all() and stays[np.asarray(by) < T].any()


def test_what_leaves_is_hidden_from_all_and_sees_nothing() -> None:
    info = rows()
    left = np.asarray(tokens.deciders(info)) < T
    codes = tokens.hidden(at.causal_codes(info), jnp.asarray(left))
    seen = np.asarray(tile_allow(codes))[:, 0, 0]
    plain = np.asarray(tile_allow(at.causal_codes(info)))[:, 0, 0]
    np.testing.assert_array_equal(seen, plain & ~left[:, None] & ~left[:, :, None])


def test_the_neutral_setting_asks_for_nothing() -> None:
    config = at.Pruning(keep=1.0)
    assert type(config.build(DIMS, KEY)) is at.Mechanism and not config.drops and not config.looks_ahead
    assert len(plan_layer_runs((config,), 4)) == 3, "as any config that stands in the second layer"


@pytest.mark.parametrize(("keep", "visual", "pictures"), [(0.25, 576, 1), (0.1, 30, 3), (0.5, 3, 1), (0.0, 7, 2)])
def test_no_more_stay_than_is_said(keep: float, visual: int, pictures: int) -> None:
    """Each picture in a prompt of its own, of which one token has to stay."""
    said = at.Pruning(keep=keep).stays(visual, pictures)
    parts = [len(part) for part in np.array_split(np.arange(visual), pictures)]
    assert said is not None
    assert sum(math.floor(keep * (n - 1) + 0.5) + 1 for n in parts) <= said[-1] <= visual


def test_what_cannot_be_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match=r"keep is 1.5, expected a share from 0 to 1"):
        at.Pruning(keep=1.5)
    with pytest.raises(ConfigError, match=r"Pruning\.layers is 'all', all .* but the last, and the model has only 1 "):
        plan_layer_runs((at.Pruning(layers="all"),), 1)
    with pytest.raises(ConfigError, match=r"Pruning\.layers names 3, the last layer"):
        plan_layer_runs((at.Pruning(layers=(3,)),), 4)
    assert [run.stop - run.start for run in plan_layer_runs((at.Dyvte(),), 4)] == [1, 1, 1, 1]
    with pytest.raises(ConfigError, match="Pruning and Dyvte cannot share a layer: each lets tokens leave"):
        at.build_mechanisms((at.Pruning(), at.Dyvte()), DIMS, KEY)
    gaze = at.Gaze(FixedRegions(2, 2), 12)
    with pytest.raises(ConfigError, match=r"Pruning cannot share a model with Gaze, not even .*\(1,\)"):
        ModelOptions((gaze, at.Pruning()))
    odd = at.Pruning(keep=1.0)
    object.__setattr__(odd, "build", lambda dims, key: at.Pruning().build(dims, key))
    with pytest.raises(ConfigError, match=r"Pruner lets tokens leave \(the hook 'tokens'\), and `stays` of"):
        at.build_mechanisms((odd,), DIMS, KEY)

"""Context tokens against their rule in words, as loops over pairs: alone, beside every other mask, in any order of a
picture's tokens, packed and chunk by chunk."""

from __future__ import annotations

import functools
from collections.abc import Callable

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings

from rave_jax import attention as at
from rave_jax.attention.attend import mask_codes, positions
from rave_jax.attention.avar import key_group_of
from rave_jax.batch import Kind, Role, TokenInfo
from rave_jax.config import ConfigError
from rave_jax.kernels.attention.base import tile_allow
from rave_jax.layout import ContextTokens
from tests.attention.built_in import BUILT_IN
from tests.attention.packed import DIMS, KEY, attend, features
from tests.attention.test_other_masks import (
    SIZE,
    Token,
    asks,
    cca,
    croc_prefix,
    croc_visual,
    expected,
    info_of,
    peeled,
    ring,
    row_of,
    rows,
    visual,
)

Rule = Callable[[list[Token], int, int], bool]

tokens_of_context = st.builds(
    ContextTokens, st.integers(1, 3), st.sampled_from(("frame", "image")), st.sampled_from(("own", "own+first"))
)


def with_context(row: list[Token], tokens: ContextTokens) -> list[Token]:
    """The row's documents with context tokens behind each frame or picture; those that do not fit are left out."""
    documents: list[list[Token]] = []
    for token in row:
        if not token:
            break
        if token["offset"] == 0:
            documents.append([])
        documents[-1].append(token)
        last = visual(token) and (token["row"], token["col"]) == (token["grid_h"] - 1, token["grid_w"] - 1)
        if last and (tokens.per == "frame" or token["frame"] == token["grid_t"] - 1):
            behind = {**token, "kind": Kind.CONTEXT, "col": 0}
            documents[-1] += [{**behind, "row": n} for n in range(tokens.count)]
    numbered = []
    for document in documents:
        first = min((token["image"] for token in document if "image" in token), default=1)
        own = [token | ({"image": token["image"] - first + 1} if "image" in token else {}) for token in document]
        numbered.append([{**token, "offset": place} for place, token in enumerate(own)])
    return row_of(numbered)


def context(token: Token) -> bool:
    return token.get("kind") == Kind.CONTEXT


def sight(tokens: ContextTokens) -> Rule:
    """What the context token i sees of its document, in words."""

    def sees(row: list[Token], i: int, j: int) -> bool:
        a, b = row[i], row[j]
        same = b.get("image") == a["image"] and (tokens.per == "image" or b["frame"] == a["frame"])
        return (same and b["offset"] <= a["offset"]) or (tokens.sees == "own+first" and b["offset"] == 0)

    return sees


def beside(tokens: ContextTokens, rule: Rule) -> Rule:
    """Another rule for all tokens but the context ones."""
    own = sight(tokens)
    return lambda row, i, j: own(row, i, j) if context(row[i]) else rule(row, i, j)


def causal(row: list[Token], i: int, j: int) -> bool:
    return row[j]["offset"] <= row[i]["offset"]


def of_one_picture(row: list[Token], i: int, j: int) -> bool:
    """Croc's rule with context tokens: they are of the picture, as keys."""
    return causal(row, i, j) or (visual(row[i]) and row[i]["image"] == row[j].get("image"))


def itself(row: list[Token], i: int, j: int) -> bool:
    """D-Attn's rule: a visual token sees itself alone."""
    return i == j if visual(row[i]) else causal(row, i, j)


def mma(row: list[Token], i: int, j: int) -> bool:
    return causal(row, i, j) or asks(row, i, j)


def cca_and_context(row: list[Token], i: int, j: int) -> bool:
    return cca(row, i, j) if visual(row[i]) and visual(row[j]) else causal(row, i, j)


BESIDE: dict[str, tuple[tuple[at.MechanismConfig, ...], Rule]] = {
    "alone": ((), causal),
    "rave": ((at.Rave(rank=2),), causal),
    "gaze": ((at.Gaze(max_regions=4),), causal),
    "text positions": ((at.TextPositions(),), causal),
    "croc visual": ((at.Croc(),), of_one_picture),
    "croc prefix": ((at.Croc("prefix"),), croc_prefix),
    "cca": ((at.Cca(),), cca_and_context),
    "mma": ((at.Mma(),), mma),
    "arrow": ((at.Arrow(SIZE, 2),), causal),
    # What pictures see of each other is opened by view, and never to context tokens.
    "pine": ((at.Pine(2),), causal),
    "decomposed": ((at.Decomposed("kept"),), itself),
    "decomposed without rope": ((at.Decomposed(),), itself),
}
OPENING = {"mma", "arrow", "pine", "decomposed without rope"}
"""What own+first is refused beside."""


def sights(tokens: ContextTokens, *configs: at.MechanismConfig) -> list[at.Mechanism]:
    return list(at.build_mechanisms((*configs, at.ContextSight(tokens)), DIMS, KEY))


def allowed(mechanisms: list[at.Mechanism], info: TokenInfo) -> np.ndarray:
    return np.asarray(tile_allow(mask_codes(mechanisms, info, info, at.causal_codes(info))))[0, 0, 0]


@pytest.mark.parametrize("name", BESIDE)
@given(row=rows, tokens=tokens_of_context)
@settings(max_examples=20)
def test_the_mask_is_the_stated_rule(name: str, row: list[Token], tokens: ContextTokens) -> None:
    configs, rule = BESIDE[name]
    row = with_context(row, tokens)
    if tokens.sees == "own+first" and name in OPENING:
        with pytest.raises(ConfigError, match="cannot share a layer"):
            sights(tokens, *configs)
        return
    whole = beside(tokens, rule)
    found = allowed(sights(tokens, *configs), info_of(row))
    np.testing.assert_array_equal(found, expected(row, lambda i, j: whole(row, i, j)))


@given(row=rows, tokens=tokens_of_context, window=st.integers(1, 12))
def test_a_window_closes_them_further_and_not_the_first_token(
    row: list[Token], tokens: ContextTokens, window: int
) -> None:
    row = with_context(row, tokens)
    mechanisms = sights(tokens, at.SlidingWindow(window), at.Rave(rank=2), at.Croc())
    whole = beside(tokens, of_one_picture)

    def rule(i: int, j: int) -> bool:
        opened = tokens.sees == "own+first" and context(row[i]) and row[j]["offset"] == 0
        return opened or (whole(row, i, j) and row[i]["offset"] - row[j]["offset"] < window)

    wanted = expected(row, rule)
    np.testing.assert_array_equal(allowed(mechanisms, info_of(row)), wanted)
    np.testing.assert_array_equal(allowed(mechanisms[::-1], info_of(row)), wanted)


def shuffled(info: TokenInfo, rng: np.random.Generator) -> tuple[TokenInfo, np.ndarray]:
    """The row with the tokens of every picture in another order, and the tokens' indices in it."""
    image = np.asarray(info.image)[0]
    order = np.arange(SIZE)
    for number in range(1, int(image.max()) + 1):
        (span,) = np.nonzero(image == number)
        order[span] = rng.permutation(span)
    return jax.tree.map(lambda code: code[:, order], info), order


@pytest.mark.parametrize("name", BESIDE)
@given(row=rows, tokens=tokens_of_context, seed=st.integers(0, 99))
@settings(max_examples=20)
def test_masks_and_positions_go_by_places(name: str, row: list[Token], tokens: ContextTokens, seed: int) -> None:
    if tokens.sees == "own+first" and name in OPENING:
        tokens = ContextTokens(tokens.count, tokens.per)
    mechanisms = sights(tokens, *BESIDE[name][0])
    info = info_of(with_context(row, tokens))
    other, order = shuffled(info, np.random.default_rng(seed))
    np.testing.assert_array_equal(allowed(mechanisms, other), allowed(mechanisms, info)[np.ix_(order, order)])
    own, given_ = jnp.arange(SIZE)[None], jnp.arange(3 * SIZE).reshape(3, 1, SIZE)
    plain, moved = (positions(mechanisms, i, i, own, p) for i, p in ((info, given_), (other, given_[..., order])))
    np.testing.assert_array_equal(moved, plain[..., order])


@given(row=rows, tokens=tokens_of_context)
def test_rings_leave_one_position_to_each_context_token(row: list[Token], tokens: ContextTokens) -> None:
    row = with_context(row, tokens)
    info, own = info_of(row), jnp.arange(SIZE)[None]
    mechanisms = sights(tokens, at.Cca())
    found = np.asarray(positions(mechanisms, info, info, own, jnp.zeros((3, 1, SIZE), jnp.int32)))[0, 0]
    position = 0
    for i, token in enumerate(row):
        if not token:
            break
        position = 0 if token["offset"] == 0 else position
        assert found[i] == position + (ring(token) if visual(token) else 0)
        if not visual(token):
            position += 1
        elif (token["row"], token["col"]) == (token["grid_h"] - 1, token["grid_w"] - 1):
            position += int(peeled(token["grid_h"], token["grid_w"]).max()) + 1


@given(row=rows, tokens=tokens_of_context, cut=st.sampled_from((1, 14, 30, 46, SIZE - 1)))  # few shapes of chunks
def test_a_cache_gives_the_same_rule(row: list[Token], tokens: ContextTokens, cut: int) -> None:
    """The first document in two chunks, with empty entries behind."""
    info = info_of([token if token.get("document") == 1 else {} for token in with_context(row, tokens)])
    mechanisms = sights(tokens)
    whole = allowed(mechanisms, info)
    for chunk in (slice(0, cut), slice(cut, SIZE)):
        part = jax.tree.map(lambda code, chunk=chunk: code[:, chunk], info)
        held = jax.tree.map(lambda code, stop=chunk.stop: jnp.where(jnp.arange(SIZE) < stop, code, 0), info)
        found = tile_allow(mask_codes(mechanisms, part, held, at.cached_codes(part, held)))
        np.testing.assert_array_equal(np.asarray(found)[0, 0, 0], whole[chunk])


# One document for what acts on attention itself: text, a picture of 2 x 2, two context tokens, a question, an answer.
ONE: list[Token] = [
    *({"kind": Kind.TEXT, "role": Role.SYSTEM} for _ in range(2)),
    *(
        {"kind": Kind.VISUAL, "row": r, "col": c, "image": 1, "grid_t": 1, "grid_h": 2, "grid_w": 2}
        for r, c in np.ndindex(2, 2)
    ),
    *({"kind": Kind.CONTEXT, "row": n, "image": 1, "grid_t": 1, "grid_h": 2, "grid_w": 2} for n in range(2)),
    *({"kind": Kind.TEXT} for _ in range(2)),
    *({"kind": Kind.TEXT, "role": Role.RESPONSE} for _ in range(2)),
]
DOCUMENT = [
    {"role": Role.QUESTION, "turn": 1, **token, "document": 1, "offset": place} for place, token in enumerate(ONE)
]
CONTEXT = slice(6, 8)


@functools.cache
def document() -> TokenInfo:
    return info_of(DOCUMENT)


def test_the_gate_is_on_visual_keys_and_on_no_context_key() -> None:
    info, x = document(), features(rows=1, length=len(DOCUMENT))
    gate = at.Rave(rank=2, start="random").build(DIMS, KEY)
    (term,) = gate.score(x, gate.remember(x), info, info).terms
    np.testing.assert_array_equal(term.key_on[0], [visual(token) for token in DOCUMENT])
    np.testing.assert_array_equal(term.query_on[0, CONTEXT], np.ones((2, DIMS.num_heads)))
    text = at.Rave(rank=2, queries="text").build(DIMS, KEY)
    (term,) = text.score(x, text.remember(x), info, info).terms
    assert not np.any(term.query_on[0, CONTEXT])


def test_context_tokens_are_neither_the_picture_nor_the_prompt() -> None:
    """AVAR's losses and VAS count them with the rest, VAR with the text, whose sinks a row may lose."""
    info, x = document(), features(rows=1, length=len(DOCUMENT))
    assert key_group_of(info)[0].tolist() == [2, 2, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0]
    var = at.Var(dims=(0,)).build(DIMS, KEY)
    for sink, number in ((True, 1), (False, 0)):
        found = var.key_groups(x, jnp.full((1, len(DOCUMENT), DIMS.num_kv_heads), sink), info)
        assert found is not None and found.of[0, CONTEXT].tolist() == [number] * 2


@pytest.mark.parametrize(
    ("sees", "route"),
    [
        pytest.param(sees, route, marks=[pytest.mark.slow] * (route not in ("key_bias", "after")))
        for sees in ("own", "own+first")
        for route in ("key_bias", "channel", "merge", "after")
    ],
)
def test_first_tokens_are_weighed_where_context_tokens_see_them(route, sees) -> None:
    info, x = document(), features(rows=1, length=len(DOCUMENT))
    tokens = ContextTokens(2, sees=sees)
    plain = attend(x, info, sights(tokens), implementation="reference").out
    tuned = attend(x, info, sights(tokens, at.ZeroTuning(3.0, route=route)), implementation="reference").out
    differs = np.abs(np.asarray(tuned - plain))[0].max((1, 2)) > 1e-6
    # The first token sees itself alone, and so has nothing to weigh.
    wanted = [False, *[True] * (len(DOCUMENT) - 1)]
    wanted[CONTEXT] = [sees == "own+first"] * 2
    assert differs.tolist() == wanted


def test_every_mechanism_is_tried_beside_context_tokens() -> None:
    tried = {type(config) for configs, _ in BESIDE.values() for config in configs}
    tried |= {at.SlidingWindow, at.ZeroTuning, at.Avar, at.Var}
    # They are no visual keys.
    tried |= {at.VisualBias}
    # It counts every token of a document.
    tried |= {at.LogN}
    # It looks for visual tokens, text of the system prompt and answers: a context token is none of them.
    tried |= {at.Steer}
    # What heads give is scaled token by token, whatever a token is.
    tried |= {at.Moh, at.Sads, at.Vhr}
    # It weighs visual tokens and those of the question, and they are neither.
    tried |= {at.Gift, at.Paint}
    # They change no mask, and documents with context tokens are packed with them in `tests/models/test_packed.py`.
    tried |= {at.Moba, at.BiFormer, at.Sparsifiner, at.Superlinear, at.Pruning, at.Dyvte}
    assert tried == set(BUILT_IN)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            at.Mma(),
            r"Mma and ContextTokens\(sees='own\+first'\) cannot share a layer: .*, or set sees='own'",
        ),
        (at.Decomposed(), r"Decomposed cannot share a layer with ContextTokens\(sees='own\+first'\), which"),
    ],
)
def test_what_also_needs_the_opening_is_refused_by_name(config: at.MechanismConfig, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        sights(ContextTokens(sees="own+first"), config)


def test_the_rule_of_croc_is_the_old_one_where_there_are_no_context_tokens() -> None:
    row = row_of(
        [[{**token, "offset": place} for place, token in enumerate(DOCUMENT) if token["kind"] != Kind.CONTEXT]]
    )
    row = [{**token, "offset": place} if token else token for place, token in enumerate(row)]
    for i, j in np.ndindex(len(DOCUMENT) - 2, len(DOCUMENT) - 2):
        assert of_one_picture(row, i, j) == croc_visual(row, i, j)

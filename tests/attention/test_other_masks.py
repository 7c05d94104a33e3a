"""MMA, Croc and CCA against their rules in words, as loops over pairs, on prompts of all kinds."""

from __future__ import annotations

import functools
from collections.abc import Callable
from itertools import chain

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings

from rave_jax import attention as at
from rave_jax.attention.attend import mask_codes, positions
from rave_jax.batch import Kind, Role, TokenInfo
from rave_jax.config import ConfigError
from rave_jax.kernels.attention.base import tile_allow

DIMS = at.AttentionDims(4, 2, 8)
KEY = jax.random.key(0)
SIZE = 60

Token = dict[str, int]
Picture = tuple[int, int, int]
Part = int | Picture


def tokens_of(document: list[tuple[Role, list[Part]]]) -> list[Token]:
    """Token codes of a document of messages, each of text runs (their lengths) and pictures (t, h, w)."""
    tokens: list[Token] = []
    turn = image = 0
    for role, parts in document:
        turn += role is Role.QUESTION
        for part in parts:
            said = {"role": role, "turn": turn}
            if isinstance(part, int):
                tokens += [{**said, "kind": Kind.TEXT}] * part
                continue
            image += 1
            grid = {"grid_t": part[0], "grid_h": part[1], "grid_w": part[2], "image": image, "kind": Kind.VISUAL}
            tokens += [{**said, **grid, "frame": t, "row": r, "col": c} for t, r, c in np.ndindex(part)]
    return [{**token, "offset": place} for place, token in enumerate(tokens)]


def row_of(documents: list[list[Token]]) -> list[Token]:
    """A packed row; documents that do not fit are left out."""
    row: list[Token] = []
    images = 0
    for number, document in enumerate(documents, start=1):
        if len(row) + len(document) <= SIZE:
            row += [
                {**token, "document": number} | ({"image": token["image"] + images} if "image" in token else {})
                for token in document
            ]
            images += max((token.get("image", 0) for token in document), default=0)
    return row + [{}] * (SIZE - len(row))


def info_of(row: list[Token]) -> TokenInfo:
    return TokenInfo(*(jnp.array([[token.get(name, 0) for token in row]], jnp.int32) for name in TokenInfo._fields))


side = st.integers(1, 5)
pictures = st.tuples(st.integers(1, 2), side, side)
parts = st.lists(st.integers(1, 3) | pictures, min_size=1, max_size=3)
answers = st.lists(st.integers(1, 4), min_size=0, max_size=1)
turns = st.tuples(parts, answers).map(lambda t: [(Role.QUESTION, t[0]), (Role.RESPONSE, t[1])])
systems = st.lists(st.tuples(st.just(Role.SYSTEM), parts), max_size=1)
documents = st.tuples(systems, st.lists(turns, min_size=1, max_size=3)).map(lambda d: tokens_of([*d[0], *chain(*d[1])]))
rows = st.lists(documents, max_size=4).map(row_of)


def visual(token: Token) -> bool:
    return token.get("kind") == Kind.VISUAL


def asks(row: list[Token], i: int, j: int) -> bool:
    """j is question text of the turn of i, which is visual."""
    question = row[j]["kind"] == Kind.TEXT and row[j]["role"] == Role.QUESTION
    return visual(row[i]) and question and row[i]["turn"] == row[j]["turn"]


def mma(row: list[Token], i: int, j: int) -> bool:
    """A visual token also sees the question text of its turn."""
    return j <= i or asks(row, i, j)


def croc_visual(row: list[Token], i: int, j: int) -> bool:
    """Tokens of one picture see each other."""
    return j <= i or (visual(row[i]) and visual(row[j]) and row[i]["image"] == row[j]["image"])


def croc_prefix(row: list[Token], i: int, j: int) -> bool:
    """Every token of the document sees those before its first answer."""
    before = (row[n] for n in range(j + 1) if row[n]["document"] == row[j]["document"])
    return j <= i or all(token["role"] != Role.RESPONSE for token in before)


def peeled(height: int, width: int) -> np.ndarray:
    """How often the border of a grid has to be taken off until a cell is at the border."""
    rings = np.zeros((height, width), int)
    if height > 2 and width > 2:
        rings[1:-1, 1:-1] = peeled(height - 2, width - 2) + 1
    return rings


def ring(token: Token) -> int:
    return int(peeled(token["grid_h"], token["grid_w"])[token["row"], token["col"]])


def cca(row: list[Token], i: int, j: int) -> bool:
    """Within a picture, a token sees its own ring and those around it."""
    a, b = row[i], row[j]
    if visual(a) and visual(b) and (a["image"], a["frame"]) == (b["image"], b["frame"]):
        return ring(b) <= ring(a)
    return j <= i


def arrow(row: list[Token], i: int, j: int) -> bool:
    """The last five tokens, and the first two of the document."""
    return i - 5 < j <= i or (j <= i and row[j]["offset"] < 2)


RULES: dict[str, tuple[at.MechanismConfig, Callable[[list[Token], int, int], bool]]] = {
    "mma": (at.Mma(), mma),
    "croc visual": (at.Croc(), croc_visual),
    "croc prefix": (at.Croc("prefix"), croc_prefix),
    "cca": (at.Cca(), cca),
    "arrow": (at.Arrow(window=5, first=2), arrow),
}


def allowed(row: list[Token], *configs: at.MechanismConfig) -> np.ndarray:
    info = info_of(row)
    codes = mask_codes(at.build_mechanisms(configs, DIMS, KEY), info, info, at.causal_codes(info))
    return np.asarray(tile_allow(codes))[0, 0, 0]


def expected(row: list[Token], rule: Callable[[int, int], bool]) -> np.ndarray:
    """The map of a rule that is asked for pairs of one document only."""
    result = np.zeros((SIZE, SIZE), bool)
    for i, j in np.ndindex(SIZE, SIZE):
        document = row[i].get("document", 0)
        result[i, j] = document > 0 and document == row[j].get("document", 0) and rule(i, j)
    return result


@pytest.mark.parametrize("name", RULES)
@given(row=rows)
@settings(max_examples=25, deadline=None)
def test_masks_are_the_stated_rules(name: str, row: list[Token]) -> None:
    config, rule = RULES[name]
    np.testing.assert_array_equal(allowed(row, config), expected(row, lambda i, j: rule(row, i, j)))


@given(row=rows, window=st.integers(1, 12))
@settings(max_examples=15, deadline=None)
def test_rules_join_in_any_order(row: list[Token], window: int) -> None:
    """A window closes what lies too far back, and the opening adds to what the others leave."""
    several = (at.SlidingWindow(window), at.Croc(), at.Mma(), at.Rave())
    wanted = expected(row, lambda i, j: (croc_visual(row, i, j) and i - j < window) or asks(row, i, j))
    np.testing.assert_array_equal(allowed(row, *several), wanted)
    np.testing.assert_array_equal(allowed(row, *several[::-1]), wanted)
    opened = expected(row, lambda i, j: (croc_visual(row, i, j) and i - j < 5) or arrow(row, i, j))
    np.testing.assert_array_equal(allowed(row, at.Arrow(5, 2), at.Croc()), opened)
    np.testing.assert_array_equal(allowed(row, at.Croc(), at.Arrow(5, 2)), opened)
    both = expected(row, lambda i, j: cca(row, i, j) or asks(row, i, j))
    np.testing.assert_array_equal(allowed(row, at.Mma(), at.Cca()), both)
    np.testing.assert_array_equal(allowed(row, at.Cca(), at.Mma()), both)


@given(row=rows)
@settings(max_examples=40, deadline=None)
def test_positions_count_rings(row: list[Token]) -> None:
    info, own = info_of(row), jnp.arange(SIZE)[None]
    found = positions([at.Cca().build(DIMS, KEY)], info, info, own, jnp.full((3, 1, SIZE), -1))
    position = 0
    for i, token in enumerate(row):
        if not token:
            break
        if token["offset"] == 0:
            position = 0
        stands = position + (ring(token) if visual(token) else 0)
        assert found[:, 0, i].tolist() == [stands] * 3
        last = visual(token) and (token["row"], token["col"]) == (token["grid_h"] - 1, token["grid_w"] - 1)
        if last:
            position += peeled(token["grid_h"], token["grid_w"]).max() + 1
        position += not visual(token)


def test_rings_of_the_papers_grid() -> None:
    """24 x 24 tokens take 12 positions: 92 tokens in the outer ring, 4 in the centre, and text goes on at 12."""
    info = info_of([{**token, "document": 1} for token in tokens_of([(Role.QUESTION, [(1, 24, 24), 1])])])
    own = jnp.arange(577)[None]
    found = positions([at.Cca().build(DIMS, KEY)], info, info, own, jnp.zeros((3, 1, 577), jnp.int32))[0, 0]
    assert np.bincount(found[:-1]).tolist() == list(range(92, 0, -8)) and found[-1] == 12


@functools.partial(jax.jit, static_argnames="implementation")
def attention_and_gradients(q, k, v, out, codes, info, implementation):
    """What a gate and these codes give, and the gradients of q, k and v where the output's is `out`."""
    gate = at.Rave(start="random", rank=4).build(DIMS, KEY)

    def run(q, k, v):
        x = at.Features(q, k, v, q, k, jnp.zeros((*q.shape[:2], 1)))
        return at.attend(x, at.remember([gate], x), codes, info, info, [gate], implementation=implementation).out

    made, pull = jax.vjp(run, q, k, v)
    return made, *pull(out)


@pytest.mark.parametrize("name", RULES)
def test_blocks_give_what_the_whole_map_gives(name: str) -> None:
    """Outputs and gradients of `xla` over several blocks of keys."""
    one: list[tuple[Role, list[Part]]] = [
        (Role.QUESTION, [3, (1, 5, 6), 9, (2, 3, 4), 8]),
        (Role.RESPONSE, [6]),
        (Role.QUESTION, [(1, 2, 3), 4]),
        (Role.RESPONSE, [5]),
    ]
    tokens = tokens_of(one)
    row = [{**token, "document": number} for number in (1, 2) for token in tokens] + [{}] * 9
    for token in row:
        if visual(token) and token["document"] == 2:
            token["image"] += 3
    info = info_of(row)
    T = len(row)
    assert T * T > 1 << 14, "one block would prove nothing"
    rng = np.random.default_rng(0)
    q, k, v, out = (jnp.asarray(rng.normal(size=(1, T, n, 8)), jnp.float32) for n in (4, 2, 2, 4))
    codes = mask_codes([RULES[name][0].build(DIMS, KEY)], info, info, at.causal_codes(info))
    results = [attention_and_gradients(q, k, v, out, codes, info, which) for which in ("reference", "xla")]
    for dense, blocks in zip(*results, strict=True):
        np.testing.assert_allclose(blocks, dense, atol=2e-5)


@pytest.mark.parametrize(
    ("configs", "message"),
    [
        ((at.Mma(), at.Mma()), "Mma cannot stand twice in a layer: each shows keys to queries beyond the causal mask"),
        (
            (at.Cca(), at.Croc()),
            "Cca and Croc cannot share a layer: each lets tokens see later ones, and only one",
        ),
        ((at.Cca(), at.Mma(), at.Cca()), "Cca cannot stand twice in a layer: each sets the rotary positions of tokens"),
        (
            (at.TextPositions(), at.Cca()),
            "TextPositions and Cca cannot share a layer: each sets the rotary positions",
        ),
        ((at.Croc(), at.Croc("prefix")), "Croc cannot stand twice in a layer: each lets tokens see later ones"),
        (
            (at.SlidingWindow(), at.Cca()),
            "SlidingWindow cannot share a layer with Cca, which counts tokens in another order",
        ),
    ],
)
def test_what_two_cannot_own_is_refused_by_name(configs: tuple[at.MechanismConfig, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        at.build_mechanisms(configs, DIMS, KEY)


def test_mechanisms_say_what_they_own() -> None:
    """Who overrides a hook that only one can have, or changes codes that only one may, says so."""
    info = info_of(row_of([tokens_of([(Role.QUESTION, [2, (1, 3, 4), 3]), (Role.RESPONSE, [2])])]))
    plain = at.causal_codes(info)
    masks = (at.SlidingWindow(4), at.Arrow(4, 2), at.Mma(), at.Croc(), at.Cca())
    for config in (at.Rave(), at.TextPositions(), *masks):
        mechanism = config.build(DIMS, KEY)
        kind = type(mechanism)
        for hook, thing in (("positions", "positions"), ("factor", "factor")):
            assert (thing in kind.OWNS) == (getattr(kind, hook) is not getattr(at.Mechanism, hook))
        changed = mechanism.mask(info, info, plain)
        differs = {name for name in plain._fields if not np.array_equal(getattr(plain, name), getattr(changed, name))}
        assert ("order" in kind.OWNS) == ("order" in differs) and ("hi" in kind.OWNS) == ("hi" in differs)
        assert ("opening" in kind.OWNS) == bool(differs & {"open_q", "open_k"})
        seen = np.asarray(tile_allow(changed))[0, 0, 0]
        assert bool(np.triu(seen, 1).any()) == config.looks_ahead

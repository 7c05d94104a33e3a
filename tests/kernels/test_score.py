"""Score functions of a user's own: what they mean, their gradients, and what is refused."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rave_jax.kernels.attention import ScoreFunction, Term, Tile, attention
from rave_jax.kernels.attention.score import Shape, function_of, reads_dot
from rave_jax.kernels.support import interpreted
from tests.kernels.drawn import Dims, drawn_codes, random_cotangents, random_operands, term_of

DIMS = Dims(2, 70, 300, 2, 2, 8, 6, 4)
SCALE = 0.3


def distance(tile: Tile):
    """A slope of each head over a distance, softened: reads features of both sides and of the head."""
    far = tile.query["at"] - tile.key["at"]
    return -tile.head["slope"] * jnp.sqrt(1.0 + far * far)


def louder(tile: Tile):
    """Of the score itself, of the pair product and of a key: s + |s| tanh(<u, w>) key."""
    assert tile.pair is not None
    return jnp.abs(tile.dot) * jnp.tanh(tile.pair) * tile.key["loud"]


def operands(seed: int = 0):
    """(q, k, v, codes, terms, cotangents); both terms have switches of their own."""
    rng, d = np.random.default_rng(seed), DIMS
    q, k, v, bias = random_operands(rng, d, 0.6)

    def normal(*shape: int):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    H = d.K * d.G
    terms = (
        Term(
            distance,
            query={"at": normal(d.B, d.T, H)},
            key={"at": normal(d.B, d.S, d.K)},
            head={"slope": normal(H)},
            key_on=jnp.asarray(rng.random((d.B, d.S)) < 0.7),
        ),
        Term(
            louder, u=bias.u, w=bias.w, key={"loud": normal(d.B, d.S, d.K)}, query_on=bias.query_on, key_on=bias.key_on
        ),
    )
    return q, k, v, drawn_codes(rng, "opened", d.B, d.T, d.S, d.S), terms, random_cotangents(rng, d)


def by_hand(q, k, v, codes, terms):
    """Output and log-sum-exp in numpy and float64."""

    def f64(x):
        return np.asarray(x, np.float64)

    def of_keys(x):
        """[B,S,K] as [B,H,1,S]."""
        return np.moveaxis(np.repeat(f64(x), DIMS.G, axis=2), 2, 1)[:, :, None]

    def of_queries(x):
        """[B,T,H] as [B,H,T,1]."""
        return np.moveaxis(f64(x), 2, 1)[..., None]

    far, loud = terms
    k, v, w = (np.repeat(f64(x), DIMS.G, axis=2) for x in (k, v, loud.w))
    dot = SCALE * np.einsum("BTHh,BSHh->BHTS", f64(q), k)
    gap = of_queries(far.query["at"]) - of_keys(far.key["at"])
    first = -f64(far.head["slope"])[:, None, None] * np.sqrt(1 + gap**2)
    second = np.abs(dot) * np.tanh(np.einsum("BTHr,BSHr->BHTS", f64(loud.u), w)) * of_keys(loud.key["loud"])
    on = (of_queries(loud.query_on) > 0) & np.asarray(loud.key_on)[:, None, None]
    scores = dot + np.where(np.asarray(far.key_on)[:, None, None], first, 0) + np.where(on, second, 0)
    lo, hi, order, open_q, open_k = (np.asarray(x) for x in codes)
    allow = (lo[..., None] <= order[:, None]) & (order[:, None] <= hi[..., None])
    allow |= open_q[..., None] == open_k[:, None]
    weights = np.where(allow[:, None], np.exp(scores), 0)
    total = weights.sum(-1)
    return np.einsum("BHTS,BSHc->BTHc", weights, v) / np.moveaxis(total, 1, 2)[..., None], np.moveaxis(
        np.log(total), 1, 2
    )


def floats(q, k, v, terms):
    """The operands that have gradients."""
    far, loud = terms
    return {
        "q": q,
        "k": k,
        "v": v,
        "query at": far.query["at"],
        "key at": far.key["at"],
        "slope": far.head["slope"],
        "u": loud.u,
        "w": loud.w,
        "loud": loud.key["loud"],
    }


def moved(terms, x):
    far, loud = terms
    far = far.replace(query={"at": x["query at"]}, key={"at": x["key at"]}, head={"slope": x["slope"]})
    return far, loud.replace(u=x["u"], w=x["w"], key={"loud": x["loud"]})


@pytest.mark.parametrize("name", ["reference", "xla", pytest.param("pallas_tpu", marks=pytest.mark.slow)])
def test_two_functions_of_a_user_and_their_slopes_are_the_formula(name):
    """Features of queries, keys and heads, a pair product, the score itself and switches, all at once; the slope of
    every float operand along a random line, by differences."""
    q, k, v, codes, terms, ct = operands()

    @jax.jit
    def run(x):
        def of(x):
            with interpreted():
                return attention(x["q"], x["k"], x["v"], codes, moved(terms, x), scale=SCALE, implementation=name)

        (out, lse), pull = jax.vjp(of, x)
        return out, lse, pull(ct)[0]

    start = floats(q, k, v, terms)
    out, lse, gradients = run(start)
    expected = by_hand(q, k, v, codes, terms)
    np.testing.assert_allclose(out, expected[0], atol=2e-5)
    np.testing.assert_allclose(lse, expected[1], atol=2e-5)
    rng = np.random.default_rng(1)
    for key, gradient in gradients.items():
        way = rng.normal(size=gradient.shape)

        def at(step, key=key, way=way):
            x = {**start, key: np.float64(start[key]) + step * way}
            out, lse = by_hand(x["q"], x["k"], x["v"], codes, moved(terms, x))
            return (out * np.float64(ct[0])).sum() + (lse * np.float64(ct[1])).sum()

        slope = (at(1e-5) - at(-1e-5)) / 2e-5
        assert float((np.float64(gradient) * way).sum()) == pytest.approx(slope, rel=2e-3, abs=2e-3), key


def test_who_reads_the_score_is_found_in_the_function():
    _, _, _, _, (far, loud), _ = operands()
    assert reads_dot(function_of(louder), Shape.of(loud)) and not reads_dot(function_of(distance), Shape.of(far))


@dataclass(frozen=True)
class NotZeroOff(ScoreFunction):
    """Says what does not hold."""

    ZERO_OFF = True

    def __call__(self, tile: Tile):
        assert tile.pair is not None
        return tile.pair + 1.0


@dataclass(frozen=True)
class OutOfBounds(ScoreFunction):
    """Says what does not hold."""

    @property
    def bounds(self) -> tuple[float, float]:
        return -1.0, 1.0

    def __call__(self, tile: Tile):
        return 3.0 * tile.dot


def missing(tile: Tile):
    return tile.key["nowhere"]


def of_another_shape(tile: Tile):
    return tile.dot[None]


def of_another_type(tile: Tile):
    return tile.dot > 0


def infinite(tile: Tile):
    return jnp.log(jnp.abs(tile.key["loud"]))


def steep(tile: Tile):
    return jnp.sqrt(jnp.abs(tile.dot))


def steep_in_the_pair(tile: Tile):
    assert tile.pair is not None
    return jnp.sqrt(jnp.abs(tile.pair))


def of_the_row(tile: Tile):
    return jax.nn.softmax(tile.dot, axis=-1)


def of_one_key(tile: Tile):
    return tile.dot[:, 0]


TABLE = jnp.arange(3.0)


def of_a_table(tile: Tile):
    return tile.key["loud"] * TABLE[1]


def of_an_inner_constant(tile: Tile):
    return jax.jit(lambda x: x * np.float32([2.0]))(tile.dot)


@dataclass
class Unhashable:
    """Its numbers may change."""

    a: float = 1.0

    def __call__(self, tile: Tile):
        return self.a * tile.dot


class Undecorated(ScoreFunction):
    """Equal to any other by its fields, of which it has none."""

    a: float = 1.0

    def __init__(self, a: float):
        self.a = a

    def __call__(self, tile: Tile):
        return self.a * tile.dot


def behind(tile: Tile):
    """Finite for keys that lie behind their query alone."""
    return -tile.head["slope"] * jnp.log(1.0 + tile.query["at"] - tile.key["at"])


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (missing, r"missing fails on a tile with .*key: loud.*KeyError: 'nowhere'"),
        (of_another_shape, r"of_another_shape gives shape \(1, 8, 12\)"),
        (of_one_key, r"of_one_key gives shape \(8,\) for a tile \(8, 12\)"),
        (of_the_row, "of_the_row gives a pair another bias in another tile"),
        (Unhashable(), "Unhashable cannot be hashed; make it a function, or a frozen dataclass"),
        (Undecorated(2.0), r"Undecorated keeps a beside the fields .* make its class a frozen dataclass"),
        (of_a_table, "of_a_table holds parameters or other arrays of its own, .* constants as Python numbers"),
        (of_an_inner_constant, "of_an_inner_constant holds parameters or other arrays of its own"),
        (of_another_type, "of_another_type gives bool, expected a float32 array"),
        (infinite, "infinite or its slope is not finite where all features are 0"),
        (steep, "steep or its slope is not finite where all features are 0, or the scores are too"),
        (steep_in_the_pair, "steep_in_the_pair or its slope is not finite"),
        (NotZeroOff(), "NotZeroOff declares ZERO_OFF, but gives 1.0 where <u, w> is 0"),
        (OutOfBounds(), r"OutOfBounds declares bounds \(-1.0, 1.0\), but gives"),
    ],
)
def test_a_function_that_does_not_give_what_it_should_is_named(function, message):
    q, k, v, codes, (_, loud), _ = operands()
    with pytest.raises(ValueError, match=message):
        attention(q, k, v, codes, [loud.replace(function=function)], scale=SCALE)


def test_a_function_that_is_finite_for_keys_behind_alone_is_refused():
    """It is computed at masked pairs, where a key lies ahead."""
    q, k, v, codes, (far, _), _ = operands()
    with pytest.raises(ValueError, match=r"behind is finite where .* at least .* not where they are less"):
        attention(q, k, v, codes, [far.replace(function=behind)], scale=SCALE)


def of_shares(tile: Tile):
    """Finite where features are shares, 0 to 1."""
    return jnp.log(1.001 - tile.query["at"] * tile.key["at"]) * tile.head["slope"]


def test_features_that_are_no_places_are_not_tried_as_places():
    q, k, v, codes, (far, _), _ = operands()
    shares = {"query": {"at": jax.nn.sigmoid(far.query["at"])}, "key": {"at": jax.nn.sigmoid(far.key["at"])}}
    out, _ = attention(q, k, v, codes, [far.replace(function=of_shares, **shares)], scale=SCALE)
    assert np.isfinite(out).all()


@pytest.mark.parametrize("name", ["reference", "xla", "pallas_tpu"])
def test_features_that_are_not_finite_give_nan_and_no_zeros(name):
    q, k, v, codes, (far, _), _ = operands()
    far = far.replace(query={"at": far.query["at"].at[:, 3].set(jnp.nan)}, key_on=None)

    @jax.jit
    def run(q, k, v, far):
        with interpreted():
            return attention(q, k, v, codes, [far], scale=SCALE, implementation=name)

    out, lse = map(np.asarray, run(q, k, v, far))
    seen = [n for n in range(DIMS.T) if n != 3]
    assert np.isnan(out[:, 3]).all() and np.isnan(lse[:, 3]).all() and np.isfinite(out[:, seen]).all()


def test_one_function_alone_may_read_the_score():
    q, k, v, codes, (_, loud), _ = operands()
    with pytest.raises(ValueError, match="2 score functions that read dot, louder and louder, and only one may"):
        attention(q, k, v, codes, [loud, loud], scale=SCALE)


def test_log_gates_of_two_terms_add_and_lose_no_row():
    """Both are bounded, and only one of them may be left out of a row's maximum."""
    q, k, v, bias = random_operands(np.random.default_rng(3), DIMS, 1.0)
    bias = bias._replace(row=bias.row * 0 - 200.0, query_on=bias.query_on | True, key_on=bias.key_on | True)
    codes = drawn_codes(np.random.default_rng(3), "window", DIMS.B, DIMS.T, DIMS.S, DIMS.S)
    twice = [term_of(bias, "log_gate")] * 2
    found, plain = (attention(q, k, v, codes, terms, scale=SCALE, implementation="xla") for terms in (twice, ()))
    np.testing.assert_allclose(found[0], plain[0], atol=1e-4)
    np.testing.assert_allclose(found[1], plain[1] - 2 * (69.0 - np.log(2)), atol=1e-3)

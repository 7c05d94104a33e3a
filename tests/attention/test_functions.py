"""What a model's build finds in the score functions of its mechanisms, without running them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from rave_jax import attention as at
from rave_jax.attention.functions import spread, terms_of
from rave_jax.batch import TokenInfo
from rave_jax.config import ConfigError
from rave_jax.kernels.attention import Term, Tile
from tests.attention.packed import DIMS, KEY, ROWS, info_of


class Adding(at.Mechanism):
    """Adds one term."""

    def __init__(self, term: Callable[[TokenInfo, TokenInfo], Term]):
        self.term = term

    def score(self, x: at.Features, remembered: None, info_q: TokenInfo, info_k: TokenInfo) -> at.Score:
        return at.Score(terms=(self.term(info_q, info_k),))


def far(tile: Tile) -> jax.Array:
    return -tile.head["slope"] * jnp.abs(tile.query["at"] - tile.key["at"])


def ranked(tile: Tile) -> jax.Array:
    return jax.scipy.special.digamma(1.0 + jnp.abs(tile.dot))


def of_places(info_q: TokenInfo, info_k: TokenInfo) -> Term:
    """Integers, without an axis of heads."""
    slopes = jnp.ones(DIMS.num_heads, jnp.bfloat16)
    on = info_q.document > 0
    return Term(far, query={"at": info_q.offset}, key={"at": info_k.offset}, head={"slope": slopes}, query_on=on)


def of_another_shape(info_q: TokenInfo, info_k: TokenInfo) -> Term:
    return of_places(info_q, info_k).replace(head={"slope": jnp.ones(3)})


def without_its_key(info_q: TokenInfo, info_k: TokenInfo) -> Term:
    return of_places(info_q, info_k).replace(key={})


def of_keys_at_hand(info_q: TokenInfo, info_k: TokenInfo) -> Term:
    """Of the keys beside the queries, where a cache has more."""
    return of_places(info_q, info_k).replace(key={"at": info_q.offset})


def of_one_row(info_q: TokenInfo, info_k: TokenInfo) -> Term:
    """Without the axis of rows."""
    return of_places(info_q, info_k).replace(query={"at": info_q.offset[0]})


def of_the_first_row(info_q: TokenInfo, info_k: TokenInfo) -> Term:
    """The first row's places for all rows."""
    return of_places(info_q, info_k).replace(query={"at": info_q.offset[:1]})


def of_pairs(info_q: TokenInfo, info_k: TokenInfo) -> Term:
    """Of complex numbers."""
    return of_places(info_q, info_k).replace(query={"at": info_q.offset + 1j})


def of_ranks(info_q: TokenInfo, info_k: TokenInfo) -> Term:
    return Term(ranked)


@dataclass(frozen=True)
class Far(at.MechanismConfig):
    """A user's config that adds a term by name."""

    term: str = "of_places"

    def build(self, dims: at.AttentionDims, key: jax.Array) -> at.Mechanism:
        return Adding(globals()[self.term])


def test_what_has_no_axis_of_heads_is_for_all_and_becomes_float32() -> None:
    info = info_of(*ROWS)
    term = spread(of_places(info, info), DIMS.num_heads, DIMS.num_kv_heads)
    B, T = info.offset.shape
    assert {x.dtype for x in (term.query["at"], term.key["at"], term.head["slope"])} == {jnp.dtype("float32")}
    np.testing.assert_array_equal(term.query["at"], np.broadcast_to(info.offset[..., None], (B, T, 4)))
    assert term.key["at"].shape == (B, T, 2) and term.query_on is not None and term.query_on.shape == (B, T, 4)
    (traced,) = terms_of(Adding(of_places), DIMS)
    assert traced.function is far and traced.key["at"].shape == (2, 16, 2)


def test_a_term_that_does_not_fit_is_refused_by_its_config() -> None:
    with pytest.raises(ConfigError, match=r"Far: score operand terms\[0\]\.head\['slope'\] has shape \(3,\), expected"):
        at.build_mechanisms((Far("of_another_shape"),), DIMS, KEY)
    with pytest.raises(ConfigError, match=r"Far: score function far fails .* KeyError: 'at'"):
        at.build_mechanisms((Far("without_its_key"),), DIMS, KEY)
    with pytest.raises(ConfigError, match=r"key\['at'\] has shape \(2, 8, 2\), expected \(2, 16, 2\) .* `remember`"):
        at.build_mechanisms((Far("of_keys_at_hand"),), DIMS, KEY)
    with pytest.raises(ConfigError, match=r"query\['at'\] has shape \(8,\), expected \(2, 8, 4\)"):
        at.build_mechanisms((Far("of_one_row"),), DIMS, KEY)
    with pytest.raises(ConfigError, match=r"query\['at'\] has shape \(1, 8, 4\), expected \(2, 8, 4\) for 2 rows"):
        at.build_mechanisms((Far("of_the_first_row"),), DIMS, KEY)
    with pytest.raises(ConfigError, match=r"query\['at'\] is complex64, expected float32"):
        at.build_mechanisms((Far("of_pairs"),), DIMS, KEY)


class Holding(at.Mechanism):
    """Its function holds a parameter."""

    def __init__(self):
        self.slope = nnx.Param(jnp.ones(()), axes=())

    def score(self, x: at.Features, remembered: None, info_q: TokenInfo, info_k: TokenInfo) -> at.Score:
        slope = self.slope[...]
        return at.Score(terms=(Term(lambda tile: slope * tile.dot),))


@dataclass(frozen=True)
class Hold(at.MechanismConfig):
    """A user's config of it."""

    def build(self, dims: at.AttentionDims, key: jax.Array) -> at.Mechanism:
        return Holding()


def test_a_function_that_holds_an_array_is_refused_by_its_config() -> None:
    message = "Hold: score function .*<lambda> holds parameters or other arrays of its own, .* give them to its term"
    with pytest.raises(ConfigError, match=message):
        at.build_mechanisms((Hold(),), DIMS, KEY)


def test_a_function_that_tpu_kernels_cannot_run_is_refused_by_its_config_and_operation() -> None:
    at.check_kernels(at.build_mechanisms((Far(),), DIMS, KEY), "pallas_tpu", DIMS)
    mechanisms = at.build_mechanisms((Far("of_ranks"),), DIMS, KEY)
    at.check_kernels(mechanisms, "xla", DIMS)
    with pytest.raises(ConfigError, match=r"cannot serve Far: its score function ranked does not fit: .* digamma"):
        at.check_kernels(mechanisms, "pallas_tpu", DIMS)

"""Score functions that are not RAVE's, and terms by the names of their functions, of the operands that tests draw."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from rave_jax.kernels.attention import Term, Tile
from tests.kernels.drawn import FORMS, PairBias, term_of


def distance(tile: Tile) -> jax.Array:
    """A head's slope times the distance of numbers of query and key, as ALiBi has it. Of the score it asks the shape
    alone."""
    return jnp.broadcast_to(-tile.head["gain"] * jnp.abs(tile.query["row"] - tile.key["key"]), tile.dot.shape)


def bent_score(tile: Tile) -> jax.Array:
    """s + a |s| with a of the pair, and a number of the query: it reads the score itself."""
    assert tile.pair is not None
    return 0.3 * jnp.abs(tile.dot) * jax.nn.sigmoid(tile.pair) + tile.query["row"]


def soft_cap(tile: Tile) -> jax.Array:
    """The score is at most 2, everywhere."""
    return 2.0 * jnp.tanh(tile.dot / 2.0) - tile.dot


def terms_of(operands: PairBias, names: str) -> tuple[Term, ...]:
    """Terms of functions whose names are joined by +. Each is switched in its own way: by queries and keys, by one of
    them, by none."""
    return tuple(_term(operands, name) for name in names.split("+"))


def _term(x: PairBias, name: str) -> Term:
    if name in FORMS:
        return term_of(x, name)
    if name == "distance":
        return Term(distance, query={"row": x.row}, key={"key": x.key}, head={"gain": x.gain}, key_on=x.key_on)
    if name == "bent_score":
        return Term(bent_score, x.u, x.w, query={"row": x.row}, query_on=x.query_on)
    assert name == "soft_cap"
    return Term(soft_cap)

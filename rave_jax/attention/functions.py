"""Score terms as kernels take them, and which of them a mechanism adds: found by tracing its hooks when a model is
built, so that nothing is computed."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from rave_jax.attention.base import AttentionDims, Features, Mechanism, overrides
from rave_jax.attention.rotation import Rope
from rave_jax.batch import TokenInfo
from rave_jax.kernels import support
from rave_jax.kernels.attention import ScoreFunction, Term
from rave_jax.kernels.attention.checks import TermShapes, check_terms
from rave_jax.kernels.attention.score import Shape, function_of, name_of, reads_dot
from rave_jax.typing import Array

ROWS, TOKENS, KEYS = 2, 8, 16
"""Rows, queries and keys that hooks are traced with."""


def spread(term: Term, num_heads: int, num_kv_heads: int) -> Term:
    """A term as kernels take it: float32, what has no axis of heads for all heads."""

    def of(heads: int) -> Callable[[Array], Array]:
        def wide(x: Array) -> Array:
            x = jnp.asarray(x)
            # What fits no query or key stays as it was given: `check_terms` says what it is.
            x = jnp.broadcast_to(x[..., None], (*x.shape, heads)) if x.ndim == 2 else x
            real = jnp.issubdtype(x.dtype, jnp.floating) or jnp.issubdtype(x.dtype, jnp.integer)
            return x.astype(jnp.float32) if real else x

        return wide

    def floats(x: Array | None) -> Array | None:
        return None if x is None else x.astype(jnp.float32)

    query_on, query = jax.tree.map(of(num_heads), (term.query_on, dict(term.query)))
    return term.replace(
        u=floats(term.u),
        w=floats(term.w),
        query=query,
        key=jax.tree.map(of(num_kv_heads), dict(term.key)),
        head={name: jnp.asarray(x, jnp.float32) for name, x in term.head.items()},
        query_on=query_on,
    )


def terms_of(mechanism: Mechanism, dims: AttentionDims) -> tuple[Term, ...]:
    """The score terms that it adds in a layer of these sizes, with the shapes of their operands in place of arrays.

    Raises:
        ValueError: an operand does not fit, or a function does not give what it should.
    """
    if not overrides(mechanism, "score"):
        return ()
    H, K, h, D = dims
    program, parameters = nnx.split(mechanism)

    # Shapes stand in the places of arrays.
    def of_tokens(tokens: int) -> tuple[dict[str, Any], Features]:
        def of(*shape: int) -> Any:
            return jax.ShapeDtypeStruct((ROWS, tokens, *shape), jnp.float32)

        queries, keys = of(H, h), of(K, h)
        positions: Any = jax.ShapeDtypeStruct((3, ROWS, tokens), jnp.int32)
        frequencies: Any = jax.ShapeDtypeStruct((h // 2,), jnp.float32)
        rope = Rope(positions, frequencies)
        codes = {name: jax.ShapeDtypeStruct((ROWS, tokens), jnp.int32) for name in TokenInfo._fields}
        return codes, Features(queries, keys, keys, queries, keys, of(max(D, 1)), rope)

    def added(parameters: Any, queries: Any, keys: Any) -> tuple[Term, ...]:
        mechanism: Mechanism = nnx.merge(program, parameters)
        mechanism.try_on(ROWS, H, KEYS)
        (codes_q, x), (codes_k, x_k) = queries, keys
        score = mechanism.score(x, mechanism.remember(x_k), TokenInfo(**codes_q), TokenInfo(**codes_k))
        return () if score is None else tuple(spread(term, H, K) for term in score.terms)

    # As beside a cache, there are more keys than queries.
    terms = jax.eval_shape(added, parameters, of_tokens(TOKENS), of_tokens(KEYS))
    beside = (
        f"for {ROWS} rows, {TOKENS} queries, {KEYS} keys, {H} query heads and {K} kv heads (what a key has of the "
        "layer's features comes from `remember`)"
    )
    check_terms("score", terms, TermShapes((ROWS, TOKENS, H), (ROWS, KEYS, K), (ROWS, KEYS), H), beside)
    return terms


def reads_score(terms: tuple[Term, ...]) -> bool:
    """Does one of the functions read <q, k>?"""
    return any(reads_dot(function_of(term.function), Shape.of(term)) for term in terms)


def against_tpu(terms: tuple[Term, ...]) -> str | None:
    """Why the TPU kernels cannot run one of the functions, as a sentence that names it; None where they can."""
    for term in terms:
        function = function_of(term.function)
        against = _against_tpu(function, Shape.of(term))
        if against is not None:
            return f"its score function {name_of(function)} does not fit: {against}"
    return None


@functools.cache
def _against_tpu(function: ScoreFunction, shape: Shape) -> str | None:
    return support.against_lowering(function, shape.tile(lambda size: jax.ShapeDtypeStruct(size, jnp.float32)))

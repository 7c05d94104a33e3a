"""Two rows of packed documents, random features of them, and attention written out densely in numpy."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rave_jax import attention as at
from rave_jax.attention.attend import mask_codes
from rave_jax.attention.functions import spread
from rave_jax.batch import Kind, Role, TokenInfo
from rave_jax.kernels.attention.base import tile_allow, tile_bias, ungroup_heads

DIMS = at.AttentionDims(4, 2, 8)
KEY = jax.random.key(7)
B, T = 2, 16

# A document is a word: s system prompt, v picture, q question, a answer. The others have no answer, no picture and no
# system prompt, or no picture; the rest of the row is padding.
ROWS = (("ssvvvqaa", "vvq", "qaa"), ("ssqqaaa", "sqvvvva"))
KINDS = {"s": Kind.TEXT, "v": Kind.VISUAL, "q": Kind.TEXT, "a": Kind.TEXT}
ROLES = {"s": Role.SYSTEM, "v": Role.QUESTION, "q": Role.QUESTION, "a": Role.RESPONSE}


def info_of(*rows: tuple[str, ...], length: int = T) -> TokenInfo:
    """Token codes of rows of documents."""
    codes = {name: np.zeros((len(rows), length), np.int32) for name in TokenInfo._fields}
    for b, documents in enumerate(rows):
        at_ = 0
        for number, document in enumerate(documents, 1):
            for place, letter in enumerate(document):
                told = {"document": number, "offset": place, "kind": KINDS[letter], "role": ROLES[letter]}
                for name, value in told.items():
                    codes[name][b, at_ + place] = value
            at_ += len(document)
    return TokenInfo(**{name: jnp.asarray(code) for name, code in codes.items()})


def features(seed: int = 0, rows: int = B, length: int = T) -> at.Features:
    rng = np.random.default_rng(seed)
    shapes = [(4, 8), (2, 8), (2, 8), (4, 8), (2, 8), (5,)]
    return at.Features(*(jnp.asarray(rng.normal(size=(rows, length, *shape)), jnp.float32) for shape in shapes))


def attend(x: at.Features, info: TokenInfo, mechanisms: Any, **options: Any) -> at.AttentionOutput:
    """Attention over whole rows."""
    codes = mask_codes(mechanisms, info, info, at.causal_codes(info))
    return at.attend(x, at.remember(mechanisms, x), codes, info, info, mechanisms, **options)


@functools.partial(jax.jit, static_argnames=("configs", "implementation"))
def everything(configs, x: at.Features, info: TokenInfo, ct, implementation="xla"):
    """Output, the whole map as rows on demand, and the gradients of all features where the output's is `ct`."""
    mechanisms = at.build_mechanisms(configs, DIMS, KEY)
    every = jnp.broadcast_to(jnp.arange(x.q.shape[1]), x.q.shape[:2])

    def both(x: at.Features) -> tuple[jax.Array, Any]:
        found = attend(x, info, mechanisms, implementation=implementation, queries=every)
        return found.out, found.attention

    out, pull, rows = jax.vjp(both, x, has_aux=True)
    return out, rows, pull(ct)[0]


def dense_map(configs, x: at.Features, info: TokenInfo) -> np.ndarray:
    """The attention map [B,T,H,S] of windows, masks and a gate, in float64; rows that see nothing are zero."""
    mechanisms = at.build_mechanisms(configs, DIMS, KEY)
    k = np.repeat(np.float64(x.k), 2, axis=2)
    scores = np.einsum("BTHh,BSHh->BTHS", np.float64(x.q), k) * DIMS.head_dim**-0.5
    for mechanism in mechanisms:
        said = mechanism.score(x, mechanism.remember(x), info, info)
        if said is not None:
            scores = scores + biases(said)
    allow = np.asarray(tile_allow(mask_codes(mechanisms, info, info, at.causal_codes(info))))[:, 0, 0, :, None]
    return normalised(np.where(allow, np.exp(scores), 0.0))


def biases(said: at.Score) -> np.ndarray:
    """What the terms of a score add [B,T,H,S], of functions that do not read the score itself."""
    H, K, _, _ = DIMS
    terms = [spread(term, H, K) for term in said.terms]
    B, T, S = *terms[0].query_on.shape[:2], terms[0].key_on.shape[1]
    dot = jnp.zeros((B, K, H // K, T, S))
    return np.float64(ungroup_heads(sum(tile_bias(term, dot, K) for term in terms)))


def normalised(weights: np.ndarray) -> np.ndarray:
    """Rows that add up to 1, or are zero."""
    total = weights.sum(-1, keepdims=True)
    return weights / np.where(total > 0, total, 1)


def outputs(weights: np.ndarray, x: at.Features) -> np.ndarray:
    """What heads give with this map."""
    return np.einsum("BTHS,BSHh->BTHh", weights, np.repeat(np.float64(x.v), 2, axis=2))

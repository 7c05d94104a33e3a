"""Greedy generation for a batch of prompts: one prefill, then one token per row and step over a key/value cache."""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from rave_jax.attention import KvCache
from rave_jax.batch import Batch, Kind, Role, TokenInfo
from rave_jax.models.vlm import Vlm
from rave_jax.typing import Array, Bool, Int


class Generated(NamedTuple):
    """New tokens of each row (N of them at most).

    `tokens[b, :lengths[b]]` is the answer; a stop token is not part of it, and what follows is 0. A row
    whose length is N was cut by the budget.
    """

    tokens: Int[Array, "B N"]
    lengths: Int[Array, "B"]


class _State(NamedTuple):
    step: Int[Array, ""]
    token: Int[Array, "B"]
    done: Bool[Array, "B"]
    out: Generated
    cache: KvCache


@functools.partial(jax.jit, static_argnames=("max_new_tokens", "stop_ids"))
def generate(model: Vlm, batch: Batch, *, max_new_tokens: int, stop_ids: tuple[int, ...]) -> Generated:
    """The most likely token, again and again, until every row has met a stop token or the budget.

    One compilation per padded shape, budget and set of stop ids. The cache holds T + N - 1 slots per row.

    Args:
        model: the model.
        batch: prompts, one document per row, padded on the right; a row of padding alone gives length 0.
        max_new_tokens: N, at least 1.
        stop_ids: ids that end an answer.
    """
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens is {max_new_tokens}, expected at least 1")
    B, T = batch.tokens.shape
    lengths = jnp.sum(batch.info.kind != Kind.PAD, axis=1, dtype=jnp.int32)
    last = jnp.maximum(lengths - 1, 0)
    hidden, cache = model.prefill(batch, model.empty_cache(B, T + max_new_tokens - 1))
    # Tokens that follow continue after the largest of the three M-RoPE coordinates in the prompt.
    real = (batch.info.kind != Kind.PAD)[None]
    next_position = jnp.max(jnp.where(real, batch.positions, -1), axis=(0, 2)) + 1
    stops = jnp.asarray(stop_ids, jnp.int32)

    def choose(hidden: Array) -> Int[Array, "B"]:
        return jnp.argmax(model.logits(hidden), axis=-1).astype(jnp.int32)

    def record(state: _State) -> _State:
        done = state.done | jnp.isin(state.token, stops)
        column = jnp.where(done, 0, state.token)
        tokens = jax.lax.dynamic_update_index_in_dim(state.out.tokens, column, state.step, axis=1)
        out = Generated(tokens, state.out.lengths + ~done)
        return state._replace(step=state.step + 1, done=done, out=out)

    def unfinished(state: _State) -> Bool[Array, ""]:
        return (state.step < max_new_tokens) & ~jnp.all(state.done)

    def advance(state: _State) -> _State:
        slot = lengths + state.step - 1
        positions = jnp.broadcast_to((next_position + state.step - 1)[None, :, None], (3, B, 1))
        info = _answer_info(batch.info, last, slot)
        hidden, cache = model.decode(state.token[:, None], info, positions, state.cache)
        return record(state._replace(token=choose(hidden[:, 0]), cache=cache))

    first = choose(hidden[jnp.arange(B), last])
    empty = Generated(jnp.zeros((B, max_new_tokens), jnp.int32), jnp.zeros(B, jnp.int32))
    state = record(_State(jnp.int32(0), first, lengths == 0, empty, cache))
    return jax.lax.while_loop(unfinished, advance, state).out


def _answer_info(prompt: TokenInfo, last: Int[Array, "B"], slot: Int[Array, "B"]) -> TokenInfo:
    """Codes [B,1] of the next answer token: text of the response, in the document and turn of the last prompt token."""
    nothing = jnp.zeros_like(last)[:, None]

    def at_last(field: Array) -> Array:
        return jnp.take_along_axis(field, last[:, None], axis=1)

    return TokenInfo(*[nothing] * len(TokenInfo._fields))._replace(
        segment=at_last(prompt.segment),
        kind=jnp.full_like(nothing, Kind.TEXT),
        role=jnp.full_like(nothing, Role.RESPONSE),
        turn=at_last(prompt.turn),
        place=slot[:, None],
    )

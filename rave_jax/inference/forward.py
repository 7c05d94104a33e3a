"""One pass over a whole conversation or batch: hidden states and logits of every token."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from rave_jax.batch import Batch, TokenInfo
from rave_jax.data.collate import collate, smallest_shape
from rave_jax.data.processor import Processor
from rave_jax.data.sample import Example, Message, OverBudget
from rave_jax.models.forward import Want
from rave_jax.models.vlm import Vlm
from rave_jax.parallel.sharding import use_mesh
from rave_jax.typing import Array, Float, Int, NpArray

TOKEN_BUCKET = 64
"""T is padded to a multiple of it, so that conversations of similar length share one program."""


class Forward(NamedTuple):
    """What a model computes of each token.

    Fields:
        tokens: token ids; visual tokens hold a placeholder.
        info: token codes, each of the shape of `tokens`.
        hidden: hidden states after the final norm.
        logits: scores of the token that follows each, float32; None where they are not wanted.
    """

    tokens: Int[NpArray, "*rows"]
    info: TokenInfo
    hidden: Float[Array, "*rows D"]
    logits: Float[Array, "*rows V"] | None


def batch_of(example: Example, processor: Processor) -> Batch:
    """A batch of one row with one document, padded to few shapes."""
    rules = processor.rules
    shape = smallest_shape([[example]], TOKEN_BUCKET, rules.patch_sizes.window)
    return collate([[example]], shape, rules.patch_sizes)


def forward(
    model: Vlm,
    processor: Processor,
    given: Sequence[Message] | Batch,
    *,
    mesh: Mesh | None = None,
    add_generation_prompt: bool = False,
    logits: bool = True,
) -> Forward:
    """One pass of the model.

    Args:
        model: on the mesh.
        processor: of the model.
        given: a conversation, of which the arrays have the shape [T, ...] without padding, or a batch, [B,T, ...].
        mesh: the devices, None for a single one.
        add_generation_prompt: a conversation ends with the header of an answer to come.
        logits: whether they are wanted; they are the largest of the arrays.

    Raises:
        SampleError: a message or a picture that cannot be used.
        OverBudget: a conversation has more tokens than the model has positions; nothing is computed then.
    """
    if isinstance(given, Batch):
        found = _run(model, given, mesh, logits)
        return Forward(np.asarray(given.tokens), given.info, *found)
    example = _encoded(model, processor, given, add_generation_prompt)
    hidden, scores = _run(model, batch_of(example, processor), mesh, logits)
    T = len(example.tokens)
    return Forward(example.tokens, example.info, hidden[0, :T], None if scores is None else scores[0, :T])


def _encoded(model: Vlm, processor: Processor, messages: Sequence[Message], add_generation_prompt: bool) -> Example:
    most = model.config.text.max_position
    advice = f"the model has {most} positions (max_position_embeddings): shorten it, or give fewer or smaller pictures"
    try:
        example = processor.encode(messages, add_generation_prompt, most_tokens=most)
    except OverBudget as error:
        raise OverBudget(f"{error}; {advice}") from error
    if len(example.tokens) > most:
        raise OverBudget(f"the conversation has {len(example.tokens)} tokens; {advice}")
    return example


def attention_rows(
    model: Vlm, batch: Batch, rows: Int[NpArray, "B N"], mesh: Mesh | None = None
) -> Float[NpArray, "L B N H S"]:
    """Attention of some queries, by index, over all keys in every layer and head.

    Args:
        model: on the mesh.
        batch: whose rows are read.
        rows: the queries.
        mesh: the devices, None for a single one.
    """
    with on_mesh(mesh):
        return np.asarray(_rows(model, batch, rows))


def on_mesh(mesh: Mesh | None) -> contextlib.AbstractContextManager[Any]:
    """The mesh in use, where there is one."""
    return contextlib.nullcontext() if mesh is None else use_mesh(mesh)


def _run(model: Vlm, batch: Batch, mesh: Mesh | None, logits: bool) -> tuple[Any, Any]:
    with on_mesh(mesh):
        hidden = _hidden(model, batch)
        return hidden, _logits(model, hidden) if logits else None


@jax.jit
def _hidden(model: Vlm, batch: Batch) -> jax.Array:
    return model.forward(batch).hidden


@jax.jit
def _logits(model: Vlm, hidden: jax.Array) -> jax.Array:
    return model.logits(hidden)


@jax.jit
def _rows(model: Vlm, batch: Batch, rows: jax.Array) -> jax.Array | None:
    return model.forward(batch, Want(queries=rows)).attention

"""Prompts with their answers as rows, and what one pass over them gives: the programs behind `ModelSubject`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from rave_jax.batch import Batch, Kind, Role, TokenInfo
from rave_jax.data.sample import Example
from rave_jax.inference.prompted import PromptNumbers, found_numbers, with_numbers
from rave_jax.layout import Shown
from rave_jax.models.forward import Chunk, Want
from rave_jax.models.vlm import Vlm
from rave_jax.parallel.sharding import replicated
from rave_jax.typing import Array, Bool, Float, Int, NpArray

QUESTION_ROWS = 32
"""Most tokens of a question whose attention is read."""


def question_rows(info: TokenInfo, shown: Sequence[Shown], picture: int) -> Int[NpArray, "N"]:
    """The text of the last question behind a picture, of a prompt: its last tokens, at most QUESTION_ROWS.

    Args:
        info: token codes of the prompt (arrays [S]).
        shown: for each image number of `info`, from 1, what its tokens show; empty: each is a whole picture.
        picture: number of the picture in the conversation, from 1.
    """
    codes = {name: np.asarray(code) for name, code in info._asdict().items()}
    numbers = [n for n, one in enumerate(shown, 1) if one.picture == picture] if shown else [picture]
    tokens = np.flatnonzero(np.isin(codes["image"], numbers))
    if not len(tokens):
        return np.zeros(0, np.int32)
    text = (codes["kind"] == Kind.TEXT) & (codes["role"] == Role.QUESTION) & (codes["turn"] == codes["turn"].max())
    return np.flatnonzero(text & (np.arange(len(text)) > tokens[-1]))[-QUESTION_ROWS:].astype(np.int32)


def program(function: Callable[..., Any], mesh: Mesh, *sizes: str) -> Any:
    """A function of a model and more, compiled: it takes the model, the numbers of its rows' prompts, and the rest."""

    def of_rows(model: Vlm, numbers: PromptNumbers, *arguments: Any, **given: Any) -> Any:
        return function(with_numbers(model, numbers), *arguments, **given)

    return jax.jit(of_rows, static_argnames=sizes, out_shardings=replicated(mesh))


def prompt_numbers(
    model: Vlm, seen: Batch, blind: Batch | None, content: Bool[Array, "B T"] | None, size: int
) -> PromptNumbers:
    """What mechanisms ask of prompts, one a row.

    Args:
        model: the model.
        seen: the prompts.
        blind: the same without their pictures; None where nothing asks for them.
        content: which tokens belong to content words; None where nothing asks for it.
        size: tokens of a prompt with its answer.
    """
    features = model.embed_images(seen.patches) if seen.patches.length else None
    return found_numbers(model, _chunk(seen), None if blind is None else _chunk(blind), features, size, content)


def _chunk(batch: Batch) -> Chunk:
    return Chunk(batch.tokens, batch.info, batch.positions, batch.visual_index)


def with_answer(prompt: Example, tokens: Sequence[int]) -> Example:
    """A prompt followed by an answer's tokens, as generation lays them out."""
    count = len(tokens)
    start = len(prompt.tokens)
    after = np.arange(count, dtype=np.int32)

    def extend(x: NpArray, value: NpArray | int) -> NpArray:
        return np.concatenate([x, np.broadcast_to(np.asarray(value, x.dtype), (*x.shape[:-1], count))], axis=-1)

    codes = {name: extend(np.asarray(code), 0) for name, code in prompt.info._asdict().items()}
    ends = {"document": 1, "offset": start + after, "kind": Kind.TEXT, "role": Role.RESPONSE}
    for name, value in {**ends, "turn": codes["turn"][start - 1]}.items():
        codes[name][start:] = value
    return prompt._replace(
        tokens=extend(prompt.tokens, np.asarray(tokens, np.int32)),
        loss_mask=extend(prompt.loss_mask, 0),
        info=TokenInfo._make(codes.values()),
        positions=extend(prompt.positions, prompt.positions.max() + 1 + after),
        visual_index=extend(prompt.visual_index, 0),
    )


def answer_attention(
    model: Vlm, batch: Batch, queries: Int[Array, "B N"], weights: Float[Array, "B N"]
) -> Float[Array, "L B H S"]:
    """Attention averaged over queries, in every layer and head; never the whole map.

    Args:
        model: the model.
        batch: prompts with their answers.
        queries: which queries, by index.
        weights: of each query in the average; 0 for fillers.
    """
    found = model.forward(batch, Want(queries=queries)).attention
    assert found is not None
    return jnp.einsum("LBNHS,BN->LBHS", found.astype(jnp.float32), weights)


def answer_glances(
    model: Vlm, batch: Batch, queries: Int[Array, "B N"], layers: tuple[int, ...]
) -> Float[Array, "M B N S"]:
    """Attention of queries, averaged over heads, in M of the layers that attend, by their places among these.

    Args:
        model, batch, queries: as in `answer_attention`.
        layers: which layers.
    """
    found = model.forward(batch, Want(queries=queries)).attention
    assert found is not None
    return jnp.mean(found[jnp.array(layers)].astype(jnp.float32), axis=3)


def answer_routes(
    model: Vlm, batch: Batch, queries: Int[Array, "B N"], weights: Float[Array, "B N"]
) -> Float[Array, "L B H R"]:
    """Share of the queries that chose each region, in every layer that routes and every head; arguments as in
    `answer_attention`.

    Raises:
        ValueError: no layer routes.
    """
    chosen = model.forward(batch, Want(queries=queries)).chosen
    if chosen is None:
        raise ValueError("no mechanism of the model routes")
    return jnp.einsum("LBNHR,BN->LBHR", chosen.astype(jnp.float32), weights)

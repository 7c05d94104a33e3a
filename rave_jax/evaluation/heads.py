"""What the heads of a model do on a calibration set: what SADS, VHR and the heads of RAVE are calibrated by.

Samples are read in blocks of one shape, one document a row, so that each measurement is one compiled program.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from rave_jax.attention.base import overrides
from rave_jax.attention.calibrate.sads import HeadStats, hoyer, peak_and_entropy
from rave_jax.attention.calibrate.traced import with_scales
from rave_jax.attention.calibrate.vhr import reinforcing
from rave_jax.attention.checks import name_of
from rave_jax.batch import Batch, Kind
from rave_jax.config import ConfigError, require
from rave_jax.data.collate import BatchShape, collate, round_up, smallest_shape
from rave_jax.data.processor import Processor
from rave_jax.data.sample import Example, Sample, SampleError, without_pictures
from rave_jax.evaluation.calibration import NOTHING, TOKEN_BUCKET, asked_at, encoded
from rave_jax.models.forward import Want
from rave_jax.models.vlm import Vlm
from rave_jax.parallel.rows import batch_shardings, global_batch, row_ways
from rave_jax.parallel.sharding import shard, use_mesh
from rave_jax.typing import Array, Bool, Float, Int, NpArray

MOST_QUERIES = 32
"""Text queries of a sample whose attention is read, evenly spaced."""


class Pair(NamedTuple):
    """A prompt as it is, and without its pictures."""

    seen: Example
    blind: Example


def with_answer(processor: Processor, sample: Sample) -> Example:
    """A sample with a picture and an answer, as SADS wants it.

    Raises:
        SampleError: it cannot be used.
    """
    _check_picture(sample)
    return encoded(processor, sample, "accuracy")


def with_and_without(processor: Processor, sample: Sample) -> Pair:
    """A prompt with a picture, and the same without it, as VHR wants them.

    Raises:
        SampleError: it cannot be used.
    """
    _check_picture(sample)
    seen, blind = (
        processor.encode(messages, add_generation_prompt=True, name=sample.called)
        for messages in (sample.prompt, tuple(map(without_pictures, sample.prompt)))
    )
    return Pair(seen, blind)


def _check_picture(sample: Sample) -> None:
    if not sample.has_visuals:
        raise SampleError(f"{sample.called}: has no picture, and heads are told apart by what they do with it")


def head_stats(model: Vlm, processor: Processor, examples: Sequence[Example], mesh: Mesh, rows: int) -> HeadStats:
    """What the heads attend to, and what shows where late layers begin, as means over samples.

    Args:
        model: all of whose layers attend, on the mesh.
        processor: of the model.
        examples: what `with_answer` made of the samples.
        mesh: the devices.
        rows: samples measured at once.

    Raises:
        ConfigError: there are no examples.
    """
    places = [asked_at(example, "accuracy") for example in examples]
    width = max((len(at) for at, _ in places), default=0)
    found: list[list[NpArray]] = []
    with use_mesh(mesh):
        for span, batch in blocks(processor, examples, mesh, rows):
            B = batch.tokens.shape[0]
            at, answer = np.zeros((B, width), np.int32), np.full((B, width), NOTHING, np.int32)
            for row, (here, tokens) in enumerate(places[span]):
                at[row, : len(here)], answer[row, : len(tokens)] = here, tokens
            arrays = jax.device_put((at, answer, *_queries(examples[span], B)), batch_shardings(mesh, B).tokens)
            peak, entropy, gradient, variance = map(np.asarray, _stats(model, batch, *arrays))
            some = slice(None, len(examples[span]))
            found.append([peak[:, some], entropy[:, some], hoyer(gradient[:, some]), variance[:, some]])
    return HeadStats(*(np.mean(np.concatenate(parts, axis=1), axis=1) for parts in zip(*found, strict=True)))


def visual_mass(
    model: Vlm, processor: Processor, examples: Sequence[Example], mesh: Mesh, rows: int
) -> Float[NpArray, "L H"]:
    """How much of its attention each head gives to visual tokens: the mean over text queries, and over samples.

    Arguments and errors are those of `head_stats`.
    """
    found = []
    with use_mesh(mesh):
        for span, batch in blocks(processor, examples, mesh, rows):
            B = batch.tokens.shape[0]
            arrays = jax.device_put(_queries(examples[span], B), batch_shardings(mesh, B).tokens)
            found.append(np.asarray(_mass(model, batch, *arrays))[:, : len(examples[span])])
    return np.mean(np.concatenate(found, axis=1), axis=1)


def first_inputs(
    model: Vlm, processor: Processor, examples: Sequence[Example], mesh: Mesh, rows: int
) -> Float[NpArray, "L N D"]:
    """What enters each layer of the first token of each sample.

    Arguments and errors are those of `head_stats`.
    """
    found = []
    with use_mesh(mesh):
        for span, batch in blocks(processor, examples, mesh, rows):
            found.append(np.asarray(_first_inputs(model, batch))[:, : len(examples[span])])
    return np.concatenate(found, axis=1)


def reinforced(
    model: Vlm, processor: Processor, pairs: Sequence[Pair], mesh: Mesh, rows: int, alpha: float, on: Bool[NpArray, "L"]
) -> Bool[NpArray, "N L H"]:
    """Which heads VHR multiplies in each sample.

    Args:
        model, processor, mesh, rows: as in `head_stats`.
        pairs: what `with_and_without` made of the samples.
        alpha: what heads are multiplied by.
        on: layers that are reinforced.

    Raises:
        ConfigError: there are no pairs, or the model scales heads already.
    """
    scaling = [m for run in model.decoder.layer_runs for m in run.layers.mechanisms if overrides(m, "head_gate")]
    if scaling:
        raise ConfigError(f"the model has {name_of(scaling[0])}, which scales heads already: give a model without it")
    require(len(pairs) > 0, "the calibration set", "0 samples", "at least one that can be used")
    rows = min(rows, len(pairs))
    found = []
    with use_mesh(mesh):
        for start in range(0, len(pairs), rows):
            some = [*pairs[start : start + rows]]
            # The program takes one size, and both halves are as large: the last pair fills them up.
            filled = some + [some[-1]] * (round_up(rows, row_ways(mesh)) - len(some))
            both = [pair.seen for pair in filled] + [pair.blind for pair in filled]
            shape = smallest_shape([[e] for pair in pairs for e in pair], TOKEN_BUCKET, _window(processor))
            batch = _batch(processor, both, shape._replace(rows=len(both)), mesh)
            found.append(np.asarray(_reinforced(model, batch, on, alpha=alpha))[: len(some)])
    return np.concatenate(found)


@jax.jit
def _stats(
    model: Vlm,
    batch: Batch,
    at: Int[Array, "B N"],
    answer: Int[Array, "B N"],
    queries: Int[Array, "B M"],
    asked: Bool[Array, "B M"],
) -> tuple[Array, Array, Array, Array]:
    """x_h and H_h [L,B,H], the gradient of each row's loss by its gates [L,B,H], the variance of visual keys [L,B]."""
    info, tokens = batch.info, model.embedded(batch)
    decoder = model.decoder
    layers, heads, B = list(decoder.layer_runs)[-1].stop, decoder.attention_dims.num_heads, info.document.shape[0]

    def loss(scales: Float[Array, "L B H"]) -> tuple[Array, Any]:
        out = with_scales(decoder, scales)(tokens, info, batch.positions, Want(queries=queries, inputs=True))
        log_probs = jax.nn.log_softmax(model.logits(jnp.take_along_axis(out.hidden, at[..., None], axis=1)))
        given = answer != NOTHING
        chosen = jnp.take_along_axis(log_probs, jnp.maximum(answer, 0)[..., None], axis=-1)[..., 0]
        count = jnp.maximum(jnp.sum(given, axis=1), 1)
        return -jnp.sum(jnp.where(given, chosen, 0.0) / count[:, None]), (out.attention, out.inputs)

    gradient, (attention, inputs) = jax.grad(loss, has_aux=True)(jnp.ones((layers, B, heads)))
    visual = info.kind == Kind.VISUAL
    peak, entropy = peak_and_entropy(attention, asked, visual, (info.document > 0) & ~visual)
    keys_of = jax.vmap(lambda layer, x: layer.attention.keys(layer.attention_norm(x)))
    keys = [keys_of(run.layers, inputs[run.start : run.stop]) for run in decoder.layer_runs]
    variance = _variance(jnp.concatenate(keys).astype(jnp.float32), visual)
    return shard(peak, None, None, None), shard(entropy, None, None, None), shard(gradient, None, None, None), variance


@jax.jit
def _mass(model: Vlm, batch: Batch, queries: Int[Array, "B M"], asked: Bool[Array, "B M"]) -> Float[Array, "L B H"]:
    """The mean over the asked queries of their attention to visual tokens."""
    out = model.decoder(model.embedded(batch), batch.info, batch.positions, Want(queries=queries))
    assert out.attention is not None
    weights = asked / jnp.maximum(jnp.sum(asked, axis=1, keepdims=True), 1)
    visual = (batch.info.kind == Kind.VISUAL).astype(jnp.float32)
    return shard(jnp.einsum("BN,BS,LBNHS->LBH", weights, visual, out.attention), None, None, None)


@jax.jit
def _first_inputs(model: Vlm, batch: Batch) -> Float[Array, "L B D"]:
    out = model.decoder(model.embedded(batch), batch.info, batch.positions, Want(inputs=True))
    assert out.inputs is not None
    return shard(out.inputs[:, :, 0].astype(jnp.float32), None, None, None)


def _variance(keys: Float[Array, "L B T K h"], visual: Bool[Array, "B T"]) -> Float[Array, "L B"]:
    """Over visual tokens, the mean over kv heads and channels."""
    share = visual / jnp.maximum(jnp.sum(visual, axis=1, keepdims=True), 1)
    mean = jnp.einsum("BT,LBTKh->LBKh", share, keys)
    off = jnp.einsum("BT,LBTKh->LBKh", share, (keys - mean[:, :, None]) ** 2)
    return shard(jnp.mean(off, axis=(2, 3)), None, None)


@functools.partial(jax.jit, static_argnames="alpha")
def _reinforced(model: Vlm, batch: Batch, on: Bool[Array, "L"], alpha: float) -> Bool[Array, "B L H"]:
    """The heads that are multiplied in each row of the first half."""
    decoder = reinforcing(model.decoder, alpha, on)
    gates = decoder(model.embedded(batch), batch.info, batch.positions, Want(gates=True)).gates
    assert gates is not None
    return shard(jnp.swapaxes(jnp.split(gates[:, :, 0], 2, axis=1)[0] != 1, 0, 1), None, None, None)


def _queries(examples: Sequence[Example], rows: int) -> tuple[Int[NpArray, "B M"], Bool[NpArray, "B M"]]:
    """Text queries of so many rows, and which of these places hold one."""
    queries, asked = np.zeros((rows, MOST_QUERIES), np.int32), np.zeros((rows, MOST_QUERIES), bool)
    for row, example in enumerate(examples):
        text = _text_queries(example)
        queries[row, : len(text)], asked[row, : len(text)] = text, True
    return queries, asked


def _text_queries(example: Example) -> Int[NpArray, "N"]:
    """Text tokens behind the first picture, at most MOST_QUERIES of them, evenly spaced."""
    kind = np.asarray(example.info.kind)
    text = np.flatnonzero((kind == Kind.TEXT) & (np.cumsum(kind == Kind.VISUAL) > 0))
    return text[np.unique(np.linspace(0, len(text) - 1, MOST_QUERIES).round().astype(int))] if len(text) else text


def blocks(processor: Processor, examples: Sequence[Example], mesh: Mesh, rows: int) -> Iterator[tuple[slice, Batch]]:
    """Examples in blocks of one shape, one a row."""
    require(len(examples) > 0, "the calibration set", "0 samples", "at least one that can be used")
    rows = round_up(min(rows, len(examples)), row_ways(mesh))
    shape = smallest_shape([[e] for e in examples], TOKEN_BUCKET, _window(processor))._replace(rows=rows)
    for start in range(0, len(examples), rows):
        span = slice(start, start + rows)
        yield span, _batch(processor, examples[span], shape, mesh)


def _batch(processor: Processor, examples: Sequence[Example], shape: BatchShape, mesh: Mesh) -> Batch:
    def load(span: range) -> Batch:
        mine = [[example] for example in examples[span.start : span.stop]]
        return collate(mine, shape._replace(rows=len(span)), processor.rules.patch_sizes)

    return global_batch(load, mesh, shape.rows)


def _window(processor: Processor) -> int:
    return processor.rules.patch_sizes.window

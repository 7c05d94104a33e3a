"""A calibration set on the devices: how right, or how sure, a model is of its answers under a table of gammas.

A search asks this hundreds of times, so pictures go through the tower once, every block of samples has one shape, and
the gammas are an argument of the one program. Nothing is generated:

- right: 1 where every token of the sample's answer, its end too, is the most likely one after those before it, which is
  what greedy generation would write;
- entropy: of the answer's first token over the whole vocabulary, in nats. It needs no labels. For answers of one token
  that is the entropy of the answer; for others it is our reading.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from rave_jax.attention.calibrate.traced import with_gammas
from rave_jax.attention.calibrate.zero_tuning import entropy
from rave_jax.batch import Batch, TokenInfo
from rave_jax.config import ConfigError, require
from rave_jax.data.collate import BatchShape, collate, round_up, smallest_shape
from rave_jax.data.processor import Processor
from rave_jax.data.sample import EmptyAnswer, Example, Sample
from rave_jax.models.forward import Embedded
from rave_jax.models.vlm import Vlm
from rave_jax.parallel.rows import batch_shardings, global_batch, row_ways
from rave_jax.parallel.sharding import shard, use_mesh
from rave_jax.typing import Array, Float, Int, NpArray

Criterion = Literal["accuracy", "entropy"]
TOKEN_BUCKET = 64
"""T is padded to a multiple of it."""
NOTHING = -1
"""Stands for no token."""


class Asked(NamedTuple):
    """A block of samples on the devices; N is the most tokens of an answer.

    Fields:
        tokens: as they are embedded, visual ones in their places.
        info, positions: of the tokens.
        at: queries that predict the answer's tokens; 0 fills up.
        answer: the answer's tokens; NOTHING fills up.
    """

    tokens: Embedded
    info: TokenInfo
    positions: Int[Array, "3 B T"]
    at: Int[Array, "B N"]
    answer: Int[Array, "B N"]


def encoded(processor: Processor, sample: Sample, criterion: Criterion) -> Example:
    """A sample as it is measured: with its answer for accuracy, and without for entropy.

    Raises:
        SampleError: it cannot be used, or accuracy is asked of a sample without an answer.
    """
    if criterion == "entropy":
        return processor.encode(sample.prompt, add_generation_prompt=True, name=sample.called)
    if len(sample.prompt) == len(sample.messages):
        raise EmptyAnswer(f"{sample.called}: has no answer, which --criterion accuracy needs; entropy needs none")
    return processor.encode(sample.messages, name=sample.called)


def asked_at(example: Example, criterion: Criterion) -> tuple[Int[NpArray, "N"], Int[NpArray, "N"]]:
    """Queries that predict the tokens of a sample's last answer, and those tokens; for entropy the prompt's last."""
    if criterion == "entropy":
        return np.array([len(example.tokens) - 1]), np.array([NOTHING])
    turn = example.info.turn
    places = np.flatnonzero((example.loss_mask > 0) & (turn == turn.max()))
    return places - 1, example.tokens[places]


class CalibrationSet:
    """Examples that wait to be measured; calling it with gammas measures them.

    Args:
        model: the model, on the mesh.
        processor: of the model.
        examples: what `encoded` made of the samples.
        criterion: what is measured.
        mesh: the devices.
        rows: samples measured at once.

    Raises:
        ConfigError: there are no examples.
    """

    def __init__(
        self,
        model: Vlm,
        processor: Processor,
        examples: Sequence[Example],
        criterion: Criterion,
        mesh: Mesh,
        rows: int = 16,
    ):
        require(len(examples) > 0, "the calibration set", "0 samples", "at least one that can be used")
        require(rows >= 1, "rows", rows, "at least 1")
        self._model, self._processor, self._mesh = model, processor, mesh
        self._count = len(examples)
        places = [asked_at(example, criterion) for example in examples]
        width = max(len(at) for at, _ in places)
        if width == 0:
            raise ConfigError("the calibration set has no token of an answer")
        rows = round_up(min(rows, len(examples)), row_ways(mesh))
        least = smallest_shape([[e] for e in examples], TOKEN_BUCKET, processor.rules.patch_sizes.window)
        shape = least._replace(rows=rows)
        embed = jax.jit(lambda model, batch: model.embedded(batch))
        self._criterion: Criterion = criterion
        self._blocks: list[Asked] = []
        with use_mesh(mesh):
            for start in range(0, len(examples), rows):
                span = slice(start, start + rows)
                batch = self._batch(examples[span], shape)
                at, answer = np.zeros((rows, width), np.int32), np.full((rows, width), NOTHING, np.int32)
                for row, (queries, tokens) in enumerate(places[span]):
                    at[row, : len(queries)], answer[row, : len(tokens)] = queries, tokens
                where = jax.device_put((at, answer), batch_shardings(mesh, rows).tokens)
                self._blocks.append(Asked(embed(model, batch), batch.info, batch.positions, *where))

    def __call__(self, gammas: Float[NpArray, "L H"]) -> Float[NpArray, "samples"]:
        """What is measured of every sample in order, float32.

        Raises:
            ConfigError: the table is not of the model's layers and heads, or the model's logits for a sample are NaN or
                infinite.
        """
        table = np.asarray(gammas, np.float32)
        with use_mesh(self._mesh):
            found = [_measured(self._model, table, block, criterion=self._criterion) for block in self._blocks]
        values = np.concatenate([np.asarray(part) for part in found])[: self._count]
        (broken,) = np.nonzero(~np.isfinite(values))
        if len(broken):
            raise ConfigError(
                f"the model's logits for {len(broken)} of {self._count} samples of the calibration set are NaN or "
                f"infinite, first for sample {broken[0]}, counted from 0"
            )
        return values

    def _batch(self, examples: Sequence[Example], shape: BatchShape) -> Batch:
        rules = self._processor.rules

        def load(span: range) -> Batch:
            mine = [[example] for example in examples[span.start : span.stop]]
            return collate(mine, shape._replace(rows=len(span)), rules.patch_sizes)

        return global_batch(load, self._mesh, shape.rows)


def measured(model: Vlm, gammas: Float[Array, "L H"], asked: Asked, criterion: Criterion) -> Float[Array, "B"]:
    """How right, or how unsure, the model is of each row's answer with these gammas; see the module's text."""
    decoder = with_gammas(model.decoder, gammas)
    hidden = decoder(asked.tokens, asked.info, asked.positions).hidden
    logits = model.logits(jnp.take_along_axis(hidden, asked.at[..., None], axis=1))
    # NaN, which a search refuses: over logits that are not finite an entropy would be 0, and an argmax a wrong answer.
    finite = jnp.all(jnp.isfinite(logits), axis=-1)
    if criterion == "entropy":
        return shard(jnp.where(finite[:, 0], entropy(jax.nn.log_softmax(logits[:, 0])), jnp.nan), None)
    right = jnp.argmax(logits, axis=-1) == asked.answer
    sound = jnp.all(finite | (asked.answer == NOTHING), axis=1)
    return shard(jnp.where(sound, jnp.all(right | (asked.answer == NOTHING), axis=1), jnp.nan), None)


_measured: Any = jax.jit(measured, static_argnames="criterion")


def compilations() -> int:
    """Programs for measuring that this process holds compiled, of all models and sets."""
    return _measured._cache_size()

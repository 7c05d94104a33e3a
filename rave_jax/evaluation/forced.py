"""Which samples a model would answer exactly, from whole forward passes: nothing is generated.

A sample counts where every token of its answer, its end too, is the most likely one after those before it. That is when
greedy generation writes exactly these tokens, so the share of such samples is the exact match of greedy answers (but
for texts that other tokens spell too), for the price of reading each conversation once.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from rave_jax.batch import Batch
from rave_jax.data.collate import BatchShape, collate
from rave_jax.data.processor import Processor
from rave_jax.data.sample import EmptyAnswer, Example, Sample
from rave_jax.evaluation.calibration import NOTHING, asked_at
from rave_jax.inference import NotFinite
from rave_jax.models.vlm import Vlm
from rave_jax.parallel.rows import batch_shardings, global_batch
from rave_jax.parallel.sharding import replicated, use_mesh
from rave_jax.typing import Array, Bool, Int, NpArray


def conversation(processor: Processor, sample: Sample) -> Example:
    """A sample with its answer, in numbers.

    Raises:
        SampleError: it cannot be used, or has no answer.
    """
    if len(sample.prompt) == len(sample.messages):
        raise EmptyAnswer(f"{sample.called}: has no answer")
    return processor.encode(sample.messages, name=sample.called)


class ForcedAnswers:
    """Asks a model block by block; every block has one shape and one program.

    Args:
        model: on the mesh.
        processor: of the model.
        mesh: the devices.
        shape: of a block: samples, tokens of a conversation with its answer, patches.
        answer_tokens: most tokens of an answer, its end counted.
    """

    def __init__(self, model: Vlm, processor: Processor, mesh: Mesh, shape: BatchShape, answer_tokens: int):
        self._model, self._processor, self._mesh = model, processor, mesh
        self._shape, self._width = shape, answer_tokens
        self._right: Any = jax.jit(right, out_shardings=replicated(mesh))

    def on(self, model: Vlm) -> ForcedAnswers:
        """The same of other weights of the model, by the same program."""
        other = copy.copy(self)
        other._model = model
        return other

    def __call__(self, examples: Sequence[Example], names: Sequence[str] = ()) -> Bool[NpArray, "samples"]:
        """Is each conversation's last answer what the model would write?

        Args:
            examples: from `conversation`; the answer is what the loss mask of the last turn marks.
            names: of the samples in errors; none: their numbers.

        Raises:
            OverBudget: one is over budget.
            NotFinite: the model's logits for an answer are NaN or infinite.
        """
        found = [np.zeros(0, bool)]
        for start in range(0, len(examples), self._shape.rows):
            part = examples[start : start + self._shape.rows]
            same, broken = self._block(part)
            for row, position in enumerate(broken[: len(part)].tolist()):
                if position != NOTHING:
                    name = names[start + row] if names else f"sample {start + row}"
                    raise NotFinite(f"{name}: the model's logits at position {position} are NaN or infinite")
            found.append(same[: len(part)])
        return np.concatenate(found)

    def _block(self, examples: Sequence[Example]) -> tuple[Bool[NpArray, "B"], Int[NpArray, "B"]]:
        B = self._shape.rows
        at, answer = np.zeros((B, self._width), np.int32), np.full((B, self._width), NOTHING, np.int32)
        for row, example in enumerate(examples):
            queries, tokens = asked_at(example, "accuracy")
            at[row, : len(queries)], answer[row, : len(tokens)] = queries, tokens
        with use_mesh(self._mesh):
            where = jax.device_put((at, answer), batch_shardings(self._mesh, B).tokens)
            same, broken = self._right(self._model, self._batch(examples), *where)
            return np.asarray(same), np.asarray(broken)

    def _batch(self, examples: Sequence[Example]) -> Batch:
        rules = self._processor.rules

        def load(span: range) -> Batch:
            mine = [[example] for example in examples[span.start : span.stop]]
            return collate(mine, self._shape._replace(rows=len(span)), rules.patch_sizes)

        return global_batch(load, self._mesh, self._shape.rows)


def right(
    model: Vlm, batch: Batch, at: Int[Array, "B N"], answer: Int[Array, "B N"]
) -> tuple[Bool[Array, "B"], Int[Array, "B"]]:
    """Is each row's answer the most likely one, token after token?

    Args:
        model: the model.
        batch: conversations with their answers.
        at: queries that predict the answer's tokens; anything for fillers.
        answer: the answer's tokens; NOTHING for fillers.

    Returns:
        the answer to it, and the first query of the row whose logits are NaN or infinite, -1 where none are.
    """
    hidden = model.forward(batch).hidden
    logits = model.logits(jnp.take_along_axis(hidden, at[..., None], axis=1))
    same = jnp.all((jnp.argmax(logits, axis=-1) == answer) | (answer == NOTHING), axis=1)
    broken = ~jnp.all(jnp.isfinite(logits), axis=-1) & (answer != NOTHING)
    first = jnp.take_along_axis(at, jnp.argmax(broken, axis=1)[:, None], axis=1)[:, 0]
    return same, jnp.where(jnp.any(broken, axis=1), first, NOTHING)

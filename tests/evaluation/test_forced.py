"""Exact match from whole forward passes is exact match of what greedy generation writes."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rave_jax.attention import Gaze
from rave_jax.data.collate import BatchShape, collate
from rave_jax.data.sample import EmptyAnswer, Example, OverBudget
from rave_jax.evaluation.answered import with_answer
from rave_jax.evaluation.forced import ForcedAnswers, conversation
from rave_jax.inference import Completion, Generator, NotFinite, Request, Sampling, SlotConfig
from rave_jax.layout import FixedRegions
from rave_jax.models.config import ModelOptions
from rave_jax.models.parameters import with_values
from rave_jax.parallel.mesh import MeshConfig, make_mesh
from tests.evaluation.test_routing import ask, made

SHAPE = BatchShape(rows=4, tokens=128, patches=128)
GAZE = Gaze(regions=FixedRegions(2, 2), max_regions=8, top_k=1)
logits = jax.jit(lambda model, batch: model.logits(model.forward(batch).hidden))


@pytest.mark.parametrize(
    "mechanisms", [pytest.param((), id="plain"), pytest.param((GAZE,), id="gaze", marks=pytest.mark.slow)]
)
def test_an_answer_counts_where_every_token_of_it_is_what_generation_writes(mechanisms: tuple[Gaze, ...]) -> None:
    vlm, processor = made(ModelOptions(mechanisms=mechanisms))
    sample = ask("Where?", (32, 48))
    prompt = processor.encode(sample.prompt, add_generation_prompt=True)
    tokens: list[int] = []
    for _ in range(3):
        example = with_answer(prompt, tokens)
        batch = collate([[example]], SHAPE._replace(rows=1), processor.rules.patch_sizes)
        tokens.append(int(np.argmax(logits(vlm, batch)[0, len(example.tokens) - 1])))
    if not mechanisms:
        generator = Generator(vlm, processor, SlotConfig(slots=1, max_length=128, chunk=128))
        (end,) = generator.answers([Request(sample.prompt, Sampling(3))])
        assert isinstance(end, Completion) and end.tokens == tuple(tokens)

    def scored(change: int | None) -> Example:
        example = with_answer(prompt, [t + (n == change) for n, t in enumerate(tokens)])
        answer = np.arange(len(example.tokens)) >= len(prompt.tokens)
        return example._replace(loss_mask=answer.astype(np.float32))

    forced = ForcedAnswers(vlm, processor, make_mesh(MeshConfig(), jax.devices()[:2]), SHAPE, 5)
    found = forced([scored(None), scored(0), scored(2)] * 3)
    assert found.tolist() == [True, False, False] * 3

    if not mechanisms:
        # One token's logit is NaN, from the first query that is judged on.
        assert vlm.lm_head is not None
        broken = with_values(vlm, {"lm_head.weight": vlm.lm_head.weight[...].at[tokens[0]].set(jnp.nan)})
        forced = ForcedAnswers(broken, processor, make_mesh(MeshConfig(), jax.devices()[:2]), SHAPE, 5)
        message = f"^one: the model's logits at position {len(prompt.tokens) - 1} are NaN or infinite"
        with pytest.raises(NotFinite, match=message):
            forced([scored(0), scored(None)], ["one", "two"])


def test_what_cannot_be_asked_is_refused() -> None:
    vlm, processor = made(ModelOptions())
    forced = ForcedAnswers(vlm, processor, make_mesh(MeshConfig(), jax.devices()[:1]), SHAPE, 8)
    sample = ask("Where?", (16, 16))
    with pytest.raises(EmptyAnswer, match="has no answer"):
        conversation(processor, dataclasses.replace(sample, messages=sample.prompt))
    with pytest.raises(OverBudget):
        forced([conversation(processor, ask("word " * 60, (16, 16)))])
    assert forced([]).shape == (0,)

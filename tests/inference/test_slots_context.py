"""Slots with context tokens: answers are a whole forward's, in chunks that cut pictures and context tokens apart."""

from __future__ import annotations

import dataclasses
import functools

import numpy as np
import pytest

from rave_jax.attention import Cca, Gaze, Rave, SlidingWindow, ZeroTuning
from rave_jax.data.sample import SampleError
from rave_jax.inference import Sampling
from rave_jax.layout import ContextTokens, FixedRegions
from rave_jax.models.config import ModelOptions
from rave_jax.models.vlm import Vlm
from tests.inference.prompts import example_of, whole_forward
from tests.inference.test_slots import CONFIG, NEW, PARTS, SIZES, engine, run
from tests.models.layout import Document, Visual, document
from tests.models.made import model

# The longest prompt is cut in its video: in a picture or in the context tokens behind one.
SLOTS = dataclasses.replace(SIZES, max_length=96, chunk=34, smallest=34)
SETTINGS = {
    "frames": ModelOptions((Rave(rank=4), SlidingWindow(20)), ContextTokens(3)),
    "images, first token too": ModelOptions(
        (ZeroTuning(0.2, layers=(0, 2)),), ContextTokens(5, per="image", sees="own+first")
    ),
    "gaze": ModelOptions(
        (Gaze(FixedRegions(2, 2), 12, top_k=2, visual_queries="frame+routed"), Rave(rank=4)), ContextTokens(2)
    ),
    "rings": ModelOptions((Cca(layers=(0, 1)),), ContextTokens(2)),
}


@functools.cache
def a_model(name: str) -> Vlm:
    return model(CONFIG, SETTINGS[name], seed=3)


def prompts(name: str) -> list[Document]:
    rng = np.random.default_rng(0)
    return [document(parts, CONFIG, rng, SETTINGS[name].context) for parts in PARTS]


@pytest.mark.slow
@pytest.mark.parametrize("name", SETTINGS)
def test_each_token_is_the_argmax_of_a_whole_forward(name: str) -> None:
    vlm, asked = a_model(name), prompts(name)
    # Rings look ahead: such prompts are read whole.
    sizes = dataclasses.replace(SLOTS, chunk=64, smallest=64) if name == "rings" else SLOTS
    answers = run(engine(vlm, sizes), asked)
    assert [len(answer) for answer in answers] == [NEW] * len(PARTS)
    assert len({token for answer in answers for token in answer}) > 5, "a model that says one thing proves nothing"
    for answer, logits in zip(answers, whole_forward(vlm, asked, answers, T=96, P=160), strict=True):
        assert answer == logits.argmax(-1).tolist()
        best = np.sort(logits, axis=-1)
        assert (best[:, -1] - best[:, -2]).min() > 1e-4, "no tie decides"


def test_an_answer_starts_behind_the_last_position_of_its_prompt() -> None:
    name = "frames"
    slots, asked = engine(a_model(name), SLOTS), prompts(name)[3]
    slots.submit(example_of(asked, CONFIG), Sampling(NEW))
    slots.step()
    assert slots._state.position[0] == max(max(p) for p in asked.positions) + 1
    assert slots._state.cache.index[0] == len(asked.tokens)


def test_pictures_without_their_context_tokens_are_refused_by_name() -> None:
    bare = document([2, Visual(1, 4, 4), 3], CONFIG, np.random.default_rng(0))
    with pytest.raises(SampleError, match="bare: a picture without context tokens: the processor needs"):
        engine(a_model("frames"), SLOTS).submit(example_of(bare, CONFIG), Sampling(NEW), "bare")

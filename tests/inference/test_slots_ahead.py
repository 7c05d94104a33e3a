"""Slots with mechanisms whose tokens see later ones: answers are a whole forward's, and a prompt is read at once."""

from __future__ import annotations

import dataclasses
import functools

import numpy as np
import pytest

from rave_jax.attention import BiFormer, Cca, Croc, Gaze, MechanismConfig, Mma, Rave, ZeroTuning
from rave_jax.batch import Role
from rave_jax.inference.buckets import Buckets
from rave_jax.layout import FixedRegions, VisualLayout
from rave_jax.models.config import ModelOptions
from rave_jax.models.vlm import Vlm
from tests.inference.prompts import whole_forward
from tests.inference.test_slots import CONFIG, NEW, SIZES, engine, run
from tests.models.layout import Document, Visual, document
from tests.models.made import model

WHOLE = dataclasses.replace(SIZES, slots=2, max_length=48, chunk=48, smallest=32)
SETTINGS: dict[str, tuple[MechanismConfig, ...]] = {
    "mma and croc": (Mma(), Croc(layers=(0, 1)), Croc("prefix", layers=(2,))),
    "cca": (Cca(), Mma(), Rave(rank=4)),
    "regions": (
        Gaze(FixedRegions(2, 2), 16, top_k=1, layers=(0,)),
        Cca(layers=(0,)),
        BiFormer(FixedRegions(2, 2), 16, top_k=1, layers=(1,)),
        Croc("prefix", layers=(1,)),
        BiFormer(FixedRegions(2, 2), 16, top_k=1, text="dense", share="group", layers=(2,)),
        ZeroTuning((5.0, 0.3), heads=(0, 2), route="after", layers=(0, 2)),
    ),
}


@functools.cache
def a_model(name: str) -> Vlm:
    return model(CONFIG, ModelOptions(mechanisms=SETTINGS[name]), seed=3)


def asked() -> list[Document]:
    """Prompts, two for the slots and two for what those leave.

    The picture at the end of the first covers slots 27 to 35. The third ends at slot 28 within a reach of 32, so that
    its answer meets slots which still hold the end of a picture that began before it. The second has an answer in its
    middle.
    """
    rng = np.random.default_rng(1)
    parts: tuple[list[int | Visual], ...] = (
        [2, Visual(2, 4, 4, video=True), 17, Visual(1, 6, 6), 2],
        [2, Visual(1, 4, 6), 6, Visual(1, 6, 6), 3],
        [29],
        [3, Visual(1, 4, 4), 4],
    )
    documents = [document(some, CONFIG, rng) for some in parts]
    for code in documents[1].codes[10:13]:
        code["role"] = Role.RESPONSE
    for code in documents[1].codes[13:]:
        code["turn"] = 2
    return documents


SLOW = pytest.mark.slow


@pytest.mark.parametrize("name", ["mma and croc", pytest.param("cca", marks=SLOW), pytest.param("regions", marks=SLOW)])
def test_each_token_is_the_argmax_of_a_whole_forward(name: str) -> None:
    vlm = a_model(name)
    answers = run(engine(vlm, WHOLE), asked())
    assert len({token for answer in answers for token in answer}) > 5, "a model that says one thing proves nothing"
    for answer, logits in zip(answers, whole_forward(vlm, asked(), answers, T=48, P=80), strict=True):
        assert len(answer) == NEW and answer == logits.argmax(-1).tolist()
        best = np.sort(logits, axis=-1)
        assert (best[:, -1] - best[:, -2]).min() > 1e-4, "no tie decides"


@pytest.mark.slow
def test_a_prompt_longer_than_a_chunk_is_read_at_once() -> None:
    """As by a chunk that holds it; prompts that fit are read by the sizes of the chunk."""
    vlm = a_model("mma and croc")
    expected = run(engine(vlm, WHOLE), asked())
    slots = engine(vlm, dataclasses.replace(WHOLE, chunk=20, smallest=20))
    assert run(slots, asked()) == expected
    assert {size[1] for name, size in slots.usage.programs if name == "prefill"} == {40}


def test_the_sizes_of_whole_prompts_grow_to_the_longest() -> None:
    sizes = dataclasses.replace(SIZES, max_length=900, chunk=128, smallest=64)
    apart, whole = (Buckets(sizes, None, VisualLayout(), whole) for whole in (False, True))
    assert whole.lengths == apart.lengths == (64, 96, 128, 256, 512, 1024)
    assert [apart.chunk_of(n) for n in (1, 90, 129, 900)] == [64, 96, 128, 128]
    assert [whole.chunk_of(n) for n in (1, 90, 129, 900)] == [64, 96, 256, 1024]

"""MMA, Croc and CCA through a whole model: documents do not meet, and no answer reaches what comes before it."""

from __future__ import annotations

import functools

import jax
import numpy as np
import pytest

from rave_jax.attention import Cca, Croc, MechanismConfig, Mma, Rave
from rave_jax.batch import Batch, Role
from rave_jax.families.qwen2_5_vl import presets
from rave_jax.models.config import ModelOptions
from rave_jax.models.vlm import Vlm
from tests.models.layout import Document, Visual, batch, document
from tests.models.made import model as made

CONFIG = presets.tiny(vocab_size=64, num_layers=2, vision_depth=1, full_attention_blocks=(0,))
SETTINGS: dict[str, tuple[MechanismConfig, ...]] = {
    "mma": (Mma(),),
    "croc visual": (Croc(),),
    "croc prefix": (Croc("prefix"), Mma()),
    "cca": (Cca(), Mma(layers=(0,)), Rave(rank=4, layers=(1,))),
}


@functools.cache
def a_model(name: str) -> Vlm:
    return made(CONFIG, ModelOptions(mechanisms=SETTINGS[name]))


@jax.jit
def logits(model: Vlm, batch: Batch) -> jax.Array:
    return model.logits(model.hidden(batch))


def spoken(parts: list[int | Visual], answers: list[range], seed: int) -> Document:
    """A document in which these places are answers; a new turn begins after each."""
    doc = document(parts, CONFIG, np.random.default_rng(seed))
    for answer in answers:
        for place in answer:
            doc.codes[place]["role"] = Role.RESPONSE
        for code in doc.codes[answer.stop :]:
            code["turn"] += 1
    return doc


DOCUMENTS = (
    spoken([2, Visual(1, 4, 8), 5, Visual(1, 6, 6), 6], [range(13, 15), range(27, 30)], seed=1),
    spoken([6], [range(3, 6)], seed=2),
    spoken([Visual(2, 6, 4, video=True), 4], [range(14, 16)], seed=3),
)
SHAPE = {"tokens": 60, "patches": 144}


FAST = ("cca", "croc prefix")
"""The masks of mma and of croc are in the tests of slots and of rows by regions as well."""
NAMES = [pytest.param(name, marks=[pytest.mark.slow] * (name not in FAST)) for name in SETTINGS]


@pytest.mark.parametrize("name", NAMES)
def test_packed_documents_equal_each_alone(name: str) -> None:
    model = a_model(name)
    packed = logits(model, batch([list(DOCUMENTS), list(DOCUMENTS[::-1])], CONFIG, **SHAPE))
    alone = [logits(model, batch([[doc], []], CONFIG, **SHAPE)) for doc in DOCUMENTS]
    for row, numbers in ((0, (0, 1, 2)), (1, (2, 1, 0))):
        start = 0
        for number in numbers:
            n = len(DOCUMENTS[number].tokens)
            np.testing.assert_allclose(packed[row, start : start + n], alone[number][0, :n], atol=2e-5)
            start += n


@pytest.mark.parametrize("name", NAMES)
def test_an_answer_changes_nothing_before_it(name: str) -> None:
    model, rows = a_model(name), batch([list(DOCUMENTS), []], CONFIG, **SHAPE)
    before = np.asarray(logits(model, rows))[0]
    for place in np.flatnonzero(np.asarray(rows.info.role)[0] == Role.RESPONSE):
        tokens = np.asarray(rows.tokens).copy()
        tokens[0, place] = (tokens[0, place] + 1) % (CONFIG.text.vocab_size - 6)
        after = np.asarray(logits(model, rows._replace(tokens=tokens)))[0]
        np.testing.assert_array_equal(after[:place], before[:place])
        assert np.any(after[place] != before[place])


def test_a_question_changes_the_picture_before_it() -> None:
    model, rows = a_model("mma"), batch([list(DOCUMENTS), []], CONFIG, **SHAPE)
    tokens = np.asarray(rows.tokens).copy()
    question, picture = 11, slice(2, 10)
    tokens[0, question] += 1
    before, after = (np.asarray(logits(model, rows._replace(tokens=t)))[0] for t in (rows.tokens, tokens))
    assert np.all(np.any(after[picture] != before[picture], axis=-1))
    np.testing.assert_array_equal(after[:2], before[:2])

"""VAS: the stated mean over the map of every layer, and a model that does not notice it was read."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from rave_jax.attention import Rave, SlidingWindow, Var
from rave_jax.batch import Batch, Kind, Role
from rave_jax.evaluation.vas import vas_sums, with_vas
from rave_jax.families.qwen2_5_vl import presets
from rave_jax.models.config import ModelOptions
from rave_jax.models.vlm import Vlm
from tests.models.layout import Document, Visual, batch, document
from tests.models.made import model as made

CONFIG = presets.tiny(vocab_size=64, num_layers=2)


@pytest.fixture(scope="module")
def model() -> Vlm:
    mechanisms = (Rave(rank=2, layers=(0,)), Var(dims=(3,), tau=1.8, summ=0.05, layers=(1,)), SlidingWindow(16, (1,)))
    return made(CONFIG, ModelOptions(mechanisms=mechanisms))


def spoken(system: int, parts: list[int | Visual], answer: int, seed: int) -> Document:
    """A document that begins with a system prompt and ends with an answer."""
    doc = document([system, *parts, answer], CONFIG, np.random.default_rng(seed))
    for code in doc.codes[:system]:
        code["role"] = Role.SYSTEM
    for code in doc.codes[-answer:]:
        code["role"] = Role.RESPONSE
    return doc


@pytest.fixture(scope="module")
def rows() -> Batch:
    """The last two have no picture, or no system prompt; text before a picture counts with none."""
    documents = [
        spoken(3, [2, Visual(1, 4, 8), 5], 3, seed=1),
        spoken(2, [Visual(1, 4, 4), 3, Visual(1, 4, 4), 2], 4, seed=2),
    ]
    others = [spoken(2, [4], 2, seed=3), spoken(0, [Visual(1, 4, 4), 4], 2, seed=4)]
    return batch([documents, others], CONFIG, tokens=48, patches=80)


@pytest.fixture(scope="module")
def whole(model: Vlm, rows: Batch) -> tuple[np.ndarray, np.ndarray]:
    """Hidden states, and the map [L,B,T,H,S] of all layers."""
    every = np.broadcast_to(np.arange(48, dtype=np.int32), (2, 48))
    hidden, found = jax.jit(lambda m, b: m.hidden(b, rows=every))(model, rows)
    return np.asarray(hidden), np.float64(found)


def test_it_is_the_stated_mean(model: Vlm, rows: Batch, whole: tuple[np.ndarray, np.ndarray]) -> None:
    info, ratios = rows.info, []
    for L, b, i, h in np.ndindex(2, 2, 48, CONFIG.text.num_heads):
        row = whole[1][L, b, i, h]
        picture = row[(info.kind[b] == Kind.VISUAL)].sum()
        prompt = row[(info.kind[b] == Kind.TEXT) & (info.role[b] == Role.SYSTEM)].sum()
        asks = info.kind[b, i] == Kind.TEXT and info.role[b, i] == Role.QUESTION
        if asks and picture > 0 and prompt > 0:
            ratios.append(picture / prompt)
    assert len(ratios) > 30 and max(ratios) > 2 * min(ratios)
    found = jax.jit(vas_sums)(with_vas(model), rows)
    assert found.ratios == len(ratios)
    np.testing.assert_allclose(found.total, np.sum(ratios), rtol=1e-4)


def test_reading_changes_nothing_and_needs_something_to_read(
    model: Vlm, rows: Batch, whole: tuple[np.ndarray, np.ndarray]
) -> None:
    before = jax.tree.structure(model)
    reading = with_vas(model)
    assert jax.tree.structure(model) == before != jax.tree.structure(reading)
    assert all(a is b for a, b in zip(jax.tree.leaves(model), jax.tree.leaves(reading), strict=True))
    np.testing.assert_allclose(jax.jit(lambda m, b: m.hidden(b))(reading, rows), whole[0], atol=1e-5)
    info = rows.info._replace(role=np.where(rows.info.role == Role.SYSTEM, Role.QUESTION, rows.info.role))
    assert jax.jit(vas_sums)(reading, rows._replace(info=info)) == (0, 0)

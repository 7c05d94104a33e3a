"""For every family: documents packed into rows give what each gives alone, gradients of the tower and connector too."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import example, given, settings

from rave_jax.attention import Gaze, Rave
from rave_jax.data.collate import smallest_shape
from rave_jax.data.sample import Example, Message
from rave_jax.layout import ContextTokens
from rave_jax.models.config import ModelOptions
from rave_jax.models.decoder import ROUTER
from rave_jax.models.parameters import is_unused, named_parameters
from tests import packing
from tests.families.every import EVERY, WITH_PICTURES, WITHOUT_CONTEXT, answer, question, small
from tests.packing import MANY, ROUTERS, Documents

FAST = "qwen2_5_vl"
"""The family whose program the tests that are not slow share."""
EACH = pytest.mark.parametrize(
    "family", [FAST, *(pytest.param(name, marks=pytest.mark.slow) for name in EVERY if name != FAST)]
)
EXPERTS = ("qwen3_moe", "qwen3_vl_moe")
"""Families whose models have routers."""
WITH_OURS = (FAST, "qwen3_vl", "qwen3_5", "llava_onevision")
"""Families with this project's own mechanisms here: pictures in windows, in several layers, beside layers without
attention, and of mixed units."""
OURS = (Rave(rank=2), Gaze(top_k=2, max_regions=96, share="group"))


@functools.cache
def documents_of(family: str, windows: int = 0, learning: bool = True) -> Documents:
    """Documents of a small model of a family; `windows` makes rows longer."""
    pictures = family in WITH_PICTURES
    context = ContextTokens(2) if pictures and family not in WITHOUT_CONTEXT else None
    options = ModelOptions(OURS if family in WITH_OURS else (), context=context)
    of = small(family, options)
    videos = pictures and of.processor.rules.video_token_id >= 0
    tolerance = packing.TOLERANCE if of.config.text.delta is None else packing.DELTA
    told = packing.conversations(pictures, videos)
    return Documents(of, of.model(options), told, tolerance=tolerance, learning=learning, windows=windows)


@EACH
@settings(max_examples=2)
@given(rows=packing.arrangements(6))
@example(rows=[[0], [MANY]]).via("text alone beside a row of nine pictures")
@example(rows=[[], [4, MANY, 1, 5, 0, 2]]).via("all in one row")
def test_packed_documents_are_each_alone(family: str, rows: list[list[int]]) -> None:
    documents = documents_of(family)
    packing.check(documents, [[n for n in row if n < len(documents.examples)] for row in rows])


@EACH
def test_neighbours_change_no_bit(family: str) -> None:
    packing.check_neighbours(documents_of(family))


@pytest.mark.slow
def test_longer_rows_change_nothing() -> None:
    """Not even how the tower cuts rows into chunks."""
    documents, longer = (documents_of(FAST, windows, learning=False) for windows in (0, 5))
    assert longer.shape.patches > documents.shape.patches and longer.shape.tokens > documents.shape.tokens
    rows = [[2, 1, MANY], [0, 5, 4]]
    found, wanted = longer.of_rows(rows), documents.of_rows(rows)
    for row, tokens in documents.places(rows).values():
        wrong = packing.difference(found.logits[row, tokens], wanted.logits[row, tokens])
        assert wrong < packing.TOLERANCE


@EACH
def test_every_parameter_learns(family: str) -> None:
    """Gradients are finite, and none is zero but of what the family keeps and does not compute. Every token is learned:
    some of what the tower gives reaches visual tokens alone."""
    documents = documents_of(family)
    every = [one._replace(loss_mask=np.ones_like(one.loss_mask)) for one in documents.examples]
    measured = documents.measure(documents.batch([every]))
    assert (ROUTER in measured.losses) == (family in EXPERTS)
    found = measured.gradients
    for path, parameter in named_parameters(documents.model).items():
        assert np.isfinite(found[path]).all(), path
        assert found[path].any() != is_unused(parameter), path


@pytest.mark.slow
@pytest.mark.parametrize("family", EXPERTS)
def test_the_loss_of_routers_is_of_all_tokens_wherever_they_stand(family: str) -> None:
    """It is no sum over documents: it compares how often experts are chosen in the whole batch. Packing moves tokens
    and changes nothing of that, so the loss and its gradients stay."""
    documents = documents_of(family)
    apart, together = (documents.of_rows(rows, ROUTERS) for rows in ([[2], [MANY]], [[2, MANY], []]))
    np.testing.assert_allclose(together.losses[ROUTER], apart.losses[ROUTER], rtol=packing.TOLERANCE)
    packing.check_gradients(together, apart.gradients, packing.TOLERANCE)
    alone = sum(documents.alone(number).losses[ROUTER] for number in (2, MANY))
    assert abs(alone - together.losses[ROUTER]) > 1e-3 * alone
    routers = {name for name, value in together.gradients.items() if ".router." in name and value.any()}
    assert routers == {name for name in together.gradients if ".router." in name}


def test_fifty_sizes_are_one_program() -> None:
    """Documents of fifty sizes, of none to nine pictures, in two orders that give each other neighbours: nothing is
    compiled for them, and each has the same loss in both."""
    documents = documents_of(FAST)
    documents.alone(0)  # which compiles the program
    fifty = [documents.encode(odd(n)) for n in range(50)]
    assert len({(len(one.tokens), one.patches.length) for one in fifty}) == 50
    assert {int(one.info.image.max()) for one in fifty} == set(range(10))
    programs = packing.program._cache_size()
    forth, back = losses_of(documents, fifty), losses_of(documents, fifty[::-1])[::-1]
    assert packing.program._cache_size() == programs
    np.testing.assert_allclose(forth, back, rtol=packing.TOLERANCE)
    assert min(forth) > 0 and len(set(forth)) == 50


def odd(n: int) -> list[Message]:
    """A document of its own size."""
    side = 14 * (1 + n // 10 % 2)
    return [question("x" * (1 + n // 10), *[(side, 15 + n // 20 * 14)] * (n % 10), seed=n), answer("y" * (1 + n % 3))]


def losses_of(documents: Documents, examples: Sequence[Example]) -> list[float]:
    """The loss of each, packed in this order, each row as full as it gets."""
    rows: list[list[Example]] = [[]]
    for one in examples:
        need = smallest_shape([[*rows[-1], one]], 1, 1)
        if need.tokens > documents.shape.tokens or need.patches > documents.shape.patches:
            rows.append([])
        rows[-1].append(one)
    found: list[float] = []
    for some in itertools.batched(rows, packing.ROWS):
        batch, measured = documents.batch(some), documents.measure(documents.batch(some))
        scores = measured.logits - np.logaddexp.reduce(measured.logits, axis=-1, keepdims=True)
        of_targets = np.take_along_axis(scores, batch.targets[..., None], axis=-1)[..., 0]
        for row, loss in enumerate(-of_targets * batch.loss_weights):
            sums = np.bincount(batch.info.document[row], loss)
            found += sums[1 : len(some[row]) + 1].tolist() if row < len(some) else []
    return found

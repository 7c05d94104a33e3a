"""Packing: every document of a row can be read back, and nothing leaks from one into another."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rave_jax.batch import Patches
from rave_jax.data.collate import BatchShape, collate, empty_batch, smallest_shape
from rave_jax.data.processor import Processor
from rave_jax.data.sample import Example, OverBudget
from tests.data.pictures import noise

SIZES = st.lists(st.tuples(st.integers(1, 30), st.integers(1, 30)), max_size=2)
DOCUMENT = st.tuples(SIZES, st.text("abc ", max_size=8), st.text("xyz", min_size=1, max_size=6))
ROWS = st.lists(st.lists(DOCUMENT, max_size=3), min_size=1, max_size=3)


def encode(processor: Processor, document: tuple) -> Example:
    sizes, question, answer = document
    parts = [{"type": "image", "image": noise(h, w, seed=h * 31 + w)} for h, w in sizes]
    content = [*parts, {"type": "text", "text": question}]
    return processor.encode([{"role": "user", "content": content}, {"role": "assistant", "content": answer}])


def unpack(batch: Any, row: int, number: int, merge: int) -> Example:
    """Document `number` of a row, with everything counted from its own start again."""
    t = batch.info.document[row] == number
    image = batch.info.image[row][t]
    images = image[image > 0]
    first_unit = batch.visual_index[row][t][image > 0].min(initial=np.iinfo(np.int32).max)
    count = int((image > 0).sum()) * merge
    patches = slice(first_unit * merge, first_unit * merge + count) if count else slice(0, 0)
    own_patches = Patches(*(x[row][patches] for x in batch.patches))
    frame, window = own_patches.frame, own_patches.window
    info = type(batch.info)(*(code[row][t] for code in batch.info))
    own = info._replace(
        document=np.ones_like(info.document), image=np.where(image > 0, image - images.min(initial=99) + 1, 0)
    )
    return Example(
        tokens=batch.tokens[row][t],
        loss_mask=np.concatenate([[0], batch.loss_weights[row][t][:-1]]),
        info=own,
        positions=batch.positions[:, row][:, t],
        visual_index=np.where(image > 0, batch.visual_index[row][t] - first_unit, 0),
        patches=own_patches._replace(
            frame=frame - frame.min(initial=10**6) + 1, window=window - window.min(initial=10**6) + 1
        ),
    )


@given(ROWS, st.integers(0, 70), st.integers(0, 2))
def test_documents_come_out_as_they_went_in(processor: Processor, plan: list, more: int, windows: int) -> None:
    s = processor.rules
    rows = [[encode(processor, document) for document in row] for row in plan]
    least = smallest_shape(rows, 1, s.patch_sizes.window)
    shape = BatchShape(least.rows + 1, least.tokens + more, least.patches + windows * s.patch_sizes.window)
    batch = collate(rows, shape, s.patch_sizes)
    for b, row in enumerate(rows):
        for number, example in enumerate(row, start=1):
            back = unpack(batch, b, number, s.patch_sizes.merge)
            # A batch does not say what tokens show of a picture: that is for maps of it.
            pairs = zip(*(jax.tree.leaves_with_path(e) for e in (back, example._replace(shown=()))), strict=True)
            for (path, ours), (_, theirs) in pairs:
                np.testing.assert_array_equal(ours, theirs, err_msg=jax.tree_util.keystr(path))
        length = sum(len(example.tokens) for example in row)
        patches = sum(example.patches.length for example in row)
        for code in (*batch.info, batch.tokens, batch.targets, batch.loss_weights):
            assert not code[b, length:].any()
        for array in batch.patches:
            assert not array[b, patches:].any()
        assert (np.diff(batch.patches.window[b, :patches]) >= 0).all()
        assert (np.diff(batch.patches.frame[b, :patches]) >= 0).all()
        frames = batch.patches.frame[b, :patches]
        assert set(frames) == set(range(1, frames.max(initial=0) + 1))


@given(ROWS)
def test_targets_are_the_next_token_of_the_document(processor: Processor, plan: list) -> None:
    s = processor.rules
    rows = [[encode(processor, document) for document in row] for row in plan]
    batch = collate(rows, smallest_shape(rows, 16, 16), s.patch_sizes)
    weights = 0
    for b in range(len(rows)):
        document = batch.info.document[b]
        for t in np.flatnonzero(batch.loss_weights[b]):
            assert document[t] == document[t + 1] > 0
            assert batch.targets[b, t] == batch.tokens[b, t + 1]
            weights += 1
    assert weights == sum(int(example.loss_mask.sum()) for row in rows for example in row)


def test_over_budget_is_an_error_and_never_a_cut(processor: Processor) -> None:
    example = encode(processor, ([(20, 20)], "a", "b"))
    s = processor.rules
    short = BatchShape(1, len(example.tokens) - 1, 640)
    with pytest.raises(OverBudget, match=rf"row 0, document 1: {len(example.tokens)} tokens and \d+ patches"):
        collate([[example]], short, s.patch_sizes)
    few = BatchShape(1, 1000, example.patches.length - 4)
    with pytest.raises(OverBudget, match="over the budget"):
        collate([[example]], few, s.patch_sizes)
    with pytest.raises(OverBudget, match="2 rows for a batch of 1"):
        collate([[], []], BatchShape(1, 10, 0), s.patch_sizes)


def test_text_only_batches_have_no_patches(processor: Processor) -> None:
    rows = [[encode(processor, ([], "hi", "yes"))]]
    shape = smallest_shape(rows, 8, 64)
    assert shape.patches == 0
    batch = collate(rows, shape, processor.rules.patch_sizes)
    assert batch.patches.pixels.shape == (1, 0, processor.rules.patch_sizes.numbers)


def test_types() -> None:
    batch = empty_batch(BatchShape(2, 3, 4), 5)
    assert batch.patches.pixels.dtype == np.uint8
    assert batch.loss_weights.dtype == batch.patches.weight.dtype == np.float32
    codes = (batch.tokens, batch.targets, batch.positions, batch.visual_index, *batch.info, *batch.patches[1:-1])
    assert {array.dtype for array in codes} == {np.dtype(np.int32)}
    assert batch.positions.shape == (3, 2, 3)

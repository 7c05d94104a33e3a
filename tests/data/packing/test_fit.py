"""Documents into rows: nothing twice, nothing over its budget, rows full and their pictures even."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rave_jax.data.packing.fit import fit
from rave_jax.data.packing.sizes import Room, Sizes
from rave_jax.data.packing.steps import arrange, balance, group
from tests.data.packing.made import mixed, sizes

DOCUMENT = st.tuples(st.integers(1, 40), st.sampled_from((0, 0, 4, 8, 20, 60)), st.integers(0, 3))


@given(
    st.lists(DOCUMENT, max_size=60),
    st.integers(1, 12),
    st.sampled_from((1, 2, 4)),
    st.integers(1, 9),
    st.lists(st.booleans(), min_size=60, max_size=60),
)
def test_rows_keep_their_budgets(
    documents: list[tuple[int, int, int]], rows: int, of_step: int, most: int, due: list[bool]
) -> None:
    room = Room(tokens=40, patches=60, regions=5, documents=most)
    given_sizes = sizes(*map(list, zip(*documents, strict=True))) if documents else sizes([])
    first = np.array(due[: len(documents)], bool)
    row = fit(given_sizes, first, room, rows, of_step)
    assert ((row >= -1) & (row < rows)).all()
    for column, budget in zip(given_sizes[:3], room[:3], strict=True):
        assert (np.bincount(row[row >= 0], column[row >= 0], rows) <= budget).all()
    assert (np.bincount(row[row >= 0], minlength=rows) <= most).all()
    np.testing.assert_array_equal(row, fit(given_sizes, first, room, rows, of_step))
    if len(documents) <= rows and not given_sizes.patches.any():
        assert (row >= 0).all()  # each could have a row of its own


def test_texts_fill_rows_to_the_brim() -> None:
    texts = mixed(4000, 512)
    texts = texts._replace(patches=texts.patches * 0)
    room = Room(512, 0, 2**30, 64)
    rows = int(room.rows(texts)) // 8 * 8
    row = fit(texts, np.zeros(4000, bool), room, rows, 8)
    assert texts.tokens[row >= 0].sum() > 0.998 * rows * 512


def test_documents_that_are_due_come_first() -> None:
    """Three documents for two rows: the one that is due gets a row, though it is the shortest."""
    row = fit(sizes([30, 31, 25]), np.array([False, False, True]), Room(40, 0, 9, 9), 2, 2)
    assert row[2] >= 0
    assert sorted(row.tolist()) == [-1, 0, 1]


def test_few_large_pictures_get_steps_of_their_own() -> None:
    """Twelve pictures for 32 rows: eight rows share them, but for those that would make one stand out; the others have
    none."""
    given_sizes = sizes([20] * 12 + [10] * 100, [48, 40, 36, 32] * 3 + [0] * 100)
    row = fit(given_sizes, np.zeros(112, bool), Room(40, 200, 9, 99), 32, 8)
    assert set(row[:12].tolist()) - {-1} == set(range(8))
    assert (row[12:] >= 0).all()


@pytest.mark.parametrize("rows", [1, 2, 6, 8, 12, 64])
def test_rows_of_a_step_even_each_other_out(rows: int) -> None:
    work = np.random.default_rng(rows).integers(100, 110, rows)
    order = arrange(work)
    assert sorted(order.tolist()) == list(range(rows))
    for shards in (n for n in range(1, rows + 1) if rows % n == 0):
        assert balance(work[order], shards) <= work.max() / work.mean() + 1e-12
    if rows == 64:
        assert balance(work[order], 8) < 1.002
        assert balance(np.sort(work), 8) > 1.02
    assert balance(np.zeros(4, np.int64), 2) == 1.0


def test_steps_are_of_rows_that_are_alike_and_full() -> None:
    work = np.array([100, 0, 98, 50, 99, 0, 101, 0, 0])
    full = np.ones(9)
    none = np.zeros(9, bool)
    found = group(work, full, none, 4, 9)
    assert [sorted(rows.tolist()) for rows in found] == [[0, 2, 4, 6], [1, 5, 7, 8]]  # the row of 50 waits
    full[5] = 0.5
    assert len(group(work, full, none, 4, 9)) == 1
    assert len(group(work, full, none, 4, 1)) == 1
    due = none.copy()
    due[5] = True  # a row that is not full, with a document that waited long
    assert any(5 in rows for rows in group(work, full, due, 4, 9))
    assert len(group(np.arange(4) * 100, full[:4], none[:4], 4, 1)) == 1  # rather unlike rows than none
    assert group(work, full, none, 16, 1) == []


def test_sizes_say_how_many_rows_they_fill() -> None:
    found: Sizes = sizes([10, 20], [4, 40], [1, 1])
    assert Room(30, 40, 9, 9).rows(found) == 44 / 40
    assert Room(15, 400, 9, 9).rows(found) == 2
    assert Room(300, 400, 9, 1).rows(found) == 2
    assert Room(300, 400, 1, 9).rows(found) == 2
    assert Room(15, 40, 1, 9).holds(found).tolist() == [True, False]

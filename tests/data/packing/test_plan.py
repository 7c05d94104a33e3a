"""The plan of packing: each draw once, rows within their budgets, the same rows whoever asks and after any stop."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rave_jax.config import ConfigError
from rave_jax.data.packing.config import Packing
from rave_jax.data.packing.plan import LONGEST_WAIT, PackedRows
from rave_jax.data.packing.report import StepReport
from rave_jax.data.packing.sizes import Room
from rave_jax.data.packing.steps import balance
from rave_jax.data.packing.taking import epoch_length
from rave_jax.data.plan import PlannedDocument
from rave_jax.data.sample import SampleError
from tests.data.packing.made import mixed, plan, sizes

ROOM = Room(256, 1024, 2**30, 32)


def rows_of(made: PackedRows, steps: range) -> list[list[tuple[PlannedDocument, ...]]]:
    return [[made.row(step, row) for row in range(made.shape(step).rows)] for step in steps]


def documents(made: PackedRows) -> Iterator[tuple[int, int]]:
    """The samples of a plan, row by row, without end."""
    for step in itertools.count():
        for row in range(made.shape(step).rows):
            yield from ((document.source, document.index) for document in made.row(step, row))


@given(st.integers(0, 100), st.sampled_from((1, 3, 8)), st.integers(1, 6), st.sampled_from((2, 7, 32)))
def test_each_sample_comes_once_in_each_epoch(seed: int, rows: int, lookahead: int, most: int) -> None:
    samples = mixed(150, 256, seed)
    made = plan(samples, rows=rows, room=ROOM._replace(documents=most), packing=Packing(most, lookahead), seed=seed)
    found = list(itertools.islice(documents(made), 450))
    for epoch in range(3):
        assert len(set(found[150 * epoch : 150 * (epoch + 1)])) == 150
    assert found[:150] != found[150:300]


@given(st.integers(0, 100), st.integers(2, 9))
def test_epochs_may_run_into_each_other(seed: int, lookahead: int) -> None:
    """Counts of samples are then one or two apart, and what has not come waits in the state."""
    samples = mixed(150, 256, seed)
    made = plan(samples, rows=4, room=ROOM, packing=Packing(32, lookahead, whole_epochs=False), seed=seed)
    step = next(step for step in itertools.count() if made.state(step)["window"]["next_draw"] >= 450)
    step = made.state(step)["window"]["step"]
    window = made.state(step)["window"]
    came = Counter(each.index for rows in rows_of(made, range(step)) for row in rows for each in row)
    waits = sorted(draw for draws in window["waiting"].values() for draw in draws)
    assert len(set(waits)) == len(waits)
    assert sum(came.values()) + len(waits) == window["next_draw"]
    _, indices = made._order.then(0, made._stages[0].shares).draws(0, window["next_draw"])
    assert came + Counter(indices[waits].tolist()) == Counter(indices.tolist())


@given(st.integers(0, 100), st.booleans())
def test_rows_keep_their_budgets_in_every_stage(seed: int, whole: bool) -> None:
    sources = mixed(90, 200, seed), mixed(70, 256, seed + 1)
    small, wide = Room(200, 300, 2**30, 32), Room(256, 1024, 2**30, 3)
    stages = ((0, (1, 0), small), (3, (1, 2), ROOM), (7, (0, 1), wide))
    made = plan(*sources, rows=3, room=ROOM, packing=Packing(whole_epochs=whole), stages=stages, seed=seed)
    for step, rows in enumerate(rows_of(made, range(14))):
        room = next(room for first, _, room in reversed(stages) if first <= step)
        assert made.shape(step) == (3, room.tokens, room.patches)
        for row in rows:
            assert len(row) <= room.documents
            for number, budget in enumerate(room[:3]):
                assert sum(document.budget[number] for document in row) <= budget
            for document in row:
                of = sources[document.source]
                assert document.budget == (of.tokens[document.index], of.patches[document.index], 0)
                assert document.messages is None
    held = small.holds(sources[0])
    assert {each.index for each in made.left_out(0)} <= set(np.flatnonzero(~held).tolist())


@given(st.integers(0, 50), st.integers(0, 17), st.integers(0, 17))
def test_a_plan_goes_on_after_a_stop_at_any_step(seed: int, stop: int, again: int) -> None:
    samples = mixed(120, 256, seed), mixed(200, 256, seed + 1)
    stages = ((0, (2, 1), ROOM), (5, (1, 1), ROOM), (9, (1, 3), ROOM))

    def made() -> PackedRows:
        return plan(*samples, rows=4, room=ROOM, packing=Packing(lookahead=3), stages=stages, seed=seed)

    whole = made()
    expected = rows_of(whole, range(20))
    state = json.loads(json.dumps(whole.state(stop)))
    other = made()
    assert other.restore(state) == stop
    assert rows_of(other, range(stop, 20)) == expected[stop:]
    state = json.loads(json.dumps(other.state(max(stop, again))))
    last = made()
    step = last.restore(state)
    assert rows_of(last, range(step, 20)) == expected[step:]
    assert rows_of(last, range(20)) == expected  # steps before the state are planned from the beginning
    assert len(json.dumps(state)) < 10_000


@pytest.mark.parametrize("stop", [2, 5, 8])
def test_a_source_that_has_changed_takes_no_sample_of_another_with_it(stop: int) -> None:
    """What was planned together is dealt again: samples of the others may come again, and none is lost."""
    same, before, after = mixed(120, 256), mixed(120, 256, seed=1), mixed(120, 256, seed=2)
    packing = Packing(lookahead=4)
    first = plan(same, before, rows=2, room=ROOM, packing=packing)
    seen = Counter(document for step in rows_of(first, range(stop)) for row in step for document in row)
    assert first.state(stop)["window"]["step"] < stop
    second = plan(same, after, rows=2, room=ROOM, packing=packing)
    assert second.restore(json.loads(json.dumps(first.state(stop))), changed={1}) == stop
    later = Counter(document for step in rows_of(second, range(stop, 24)) for row in step for document in row)
    assert {each.index for each in seen | later if each.source == 0} == set(range(120))


def test_rows_do_not_depend_on_the_order_in_which_they_are_asked_for() -> None:
    samples = mixed(300, 256)
    expected = rows_of(plan(samples, rows=4, room=ROOM), range(40))
    made = plan(samples, rows=4, room=ROOM)
    with ThreadPoolExecutor(4) as pool:
        assert (
            list(pool.map(lambda step: rows_of(made, range(step, step + 1))[0], reversed(range(40)))) == expected[::-1]
        )


def test_a_sample_to_a_row_is_the_order_of_draws() -> None:
    samples = mixed(50, 256)
    made = plan(samples, rows=4, room=ROOM, packing=Packing(documents=1))
    _, indices = made._order.then(0, made._stages[0].shares).draws(0, 120)
    found = [row for rows in rows_of(made, range(30)) for row in rows]
    assert [[document.index for document in row] for row in found] == [[index] for index in indices.tolist()]


@pytest.mark.parametrize("rows", [8, 64])
def test_a_mixed_set_fills_rows_and_balances_the_towers(rows: int) -> None:
    """The measures of the benchmark: at least 95 % of the tokens, and 1.1 times the mean at one row to a device."""
    made = plan(mixed(rows * 400, 4096), rows=rows, room=Room(4096, 4 * 4096, 2**30, 256))
    found = [made.report(step) for step in range(40)]
    total = StepReport()
    for report in found:
        total = total.also(report)
    assert total.tokens >= 0.98 * total.room_tokens
    assert np.mean([report.balance <= 1.1 for report in found]) >= 0.95
    for step in (0, 7, 39):
        work = np.array([sum(d.budget.patches for d in made.row(step, row)) for row in range(rows)])
        for shards in (n for n in range(1, rows + 1) if rows % n == 0):
            assert balance(work, shards) <= found[step].balance + 1e-12
    assert max(int(made._window(step).begin.waiting.waited.max(initial=0)) for step in range(40)) <= 2 * LONGEST_WAIT
    values = total.values()
    assert set(values) == {
        f"packing/{name}" for name in ["tokens", "patches", "documents", "cut", "balance", "worst_balance"]
    }
    assert "of the tokens" in total.summary()
    assert "samples in" in total.summary()


def test_samples_that_cannot_be_used_are_left_out_and_said_once() -> None:
    samples = sizes([10, 300, 20, 30, 400, 15])  # two that no row holds
    made = plan(samples, rows=1, room=ROOM)
    steps = range(6)  # an epoch fills one row
    assert [sorted(each.index for each in made.row(step, 0)) for step in steps] == [[0, 2, 3, 5]] * 6
    assert [sorted(skip.index for skip in made.left_out(step)) for step in steps] == [[1, 4]] * 6
    with pytest.raises(SampleError, match="2 consecutive samples cannot be used: 2 over budget"):
        rows_of(plan(sizes([300, 400]), rows=1, room=ROOM, max_skips=1), range(1))
    with pytest.raises(SampleError, match="source 0: sample"):
        rows_of(plan(samples, rows=1, room=ROOM, fails=True), range(1))


def test_a_state_of_other_rows_is_refused_by_name() -> None:
    samples = mixed(100, 256)
    made = plan(samples, rows=4, room=ROOM)
    state = made.state(3)
    assert made.facts() == {
        "rows": 4,
        "packing.documents": 256,
        "packing.lookahead": 8,
        "packing.long": "skip",
        "packing.whole_epochs": True,
    }
    with pytest.raises(ConfigError, match=r"data\.tokens.*\[512, 1024.*expected \[256, 1024"):
        plan(samples, rows=4, room=ROOM._replace(tokens=512)).restore(state)
    with pytest.raises(ConfigError, match=r"data\.packing is set, but the saved run had none"):
        made.restore({"step": 3})


def test_sources_that_end_their_epochs_together() -> None:
    assert epoch_length((100,), (1,), (0,)) == (100, 100)
    assert epoch_length((100, 7), (3, 0), (130, 5)) == (70, 100)  # one source is drawn from, and is within an epoch
    assert epoch_length((100, 50), (2, 1), (0, 0)) == (150, 150)
    assert epoch_length((100, 50), (1, 1), (0, 100)) == (200, 200)
    assert epoch_length((100, 50), (1, 1), (0, 30)) is None

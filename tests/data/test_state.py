"""Going on from a saved state: the batch that would have come, or one line on what has changed and what to do."""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rave_jax.config import ConfigError
from rave_jax.data.config import DataConfig, Stage
from rave_jax.data.packing.config import Packing
from rave_jax.data.pipeline import Pipeline
from rave_jax.data.processor import Processor
from rave_jax.data.sources import QaJsonl

ROWS = 4


@pytest.fixture
def make(tmp_path: Path, processor: Processor) -> Callable[..., Pipeline]:
    """Pipelines over two sources of texts: the ids of their records, as they are written just before."""

    def pipeline(a: Sequence[int], b: Sequence[int], **changes: object) -> Pipeline:
        for name, numbers in (("a", a), ("b", b)):
            lines = (json.dumps({"id": f"{name}{n}", "question": "q", "answers": [str(n)]}) for n in numbers)
            (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
        sources = tuple(QaJsonl(str(tmp_path / f"{name}.jsonl"), name=name) for name in "ab")
        values = {"sources": sources, "rows": ROWS, "tokens": 64, "patches": 0, **changes}
        return Pipeline(DataConfig(**values), processor)

    return pipeline


def ids(pipeline: Pipeline, start: int, stop: int) -> list[str]:
    """The samples of some steps, in their order."""
    return [sample.id for step in range(start, stop) for row in range(ROWS) for sample in pipeline.samples(step, row)]


def state_at(pipeline: Pipeline, step: int) -> dict:
    return json.loads(json.dumps(pipeline.state(step)))


A, B = list(range(10)), list(range(6))


def test_the_next_batch_is_the_one_that_would_have_come(make: Callable[..., Pipeline]) -> None:
    """Whenever it stops, over three epochs and stages; each sample comes once in each epoch of its source."""
    stages = (Stage(0, epochs=(1, 1)), Stage(3, weights=(1, 0)), Stage(4, epochs=(1, 1)))
    alone = make(A, B, stages=stages)
    expected = ids(alone, 0, 14)
    for source, numbers in (("a", A), ("b", B)):
        drawn = [name for name in expected if name[0] == source]
        for begin in range(0, len(drawn), len(numbers)):
            epoch = drawn[begin : begin + len(numbers)]
            assert len(set(epoch)) == len(epoch)
    for step in range(0, 14, 3):
        state = state_at(alone, step)
        assert len(json.dumps(state)) < 500
        again = make(A, B, stages=stages)
        assert again.restore(state) == step
        assert ids(again, step, 14) == expected[step * ROWS :]
        assert state_at(again, step) == state


@given(st.lists(st.tuples(st.integers(1, 7), st.sampled_from([1, 2, 4])), min_size=1, max_size=6))
@settings(max_examples=10, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_killed_and_continued_on_other_hosts(make: Callable[..., Pipeline], lives: list[tuple[int, int]]) -> None:
    """Each sample comes once in each of three epochs, or is skipped by name, on however many hosts and after any kill.

    A life is some steps on some hosts, after which the newest state is that of its last step.
    """
    long, epochs = 99999999999999999999999999999999, 3  # has more tokens than its row
    numbers = [*A[:-1], long]
    stages = (Stage(epochs=(1, 1)),)
    alone, steps = make(numbers, B, stages=stages), epochs * 16 // ROWS
    expected = [alone.rows(step, 0, ROWS).tokens for step in range(steps)]
    found: Counter[tuple[str, int, int]] = Counter()
    step, state = 0, state_at(alone, 0)
    for life, hosts in [*lives, (steps, 1)]:
        spans = [range(host * ROWS // hosts, (host + 1) * ROWS // hosts) for host in range(hosts)]
        pipelines = [make(numbers, B, stages=stages) for _ in spans]
        assert [pipeline.restore(state) for pipeline in pipelines] == [step] * hosts
        last = min(step + life, steps)
        while step < last:
            rows = [own.load(step, span.start, span.stop) for own, span in zip(pipelines, spans, strict=True)]
            np.testing.assert_array_equal(np.concatenate([part.batch.tokens for part in rows]), expected[step])
            documents = [skip for part in rows for skip in part.documents]
            planned = [each for row in range(ROWS) for each in alone.plan.row(step, row)]
            for document, skip in zip(planned, documents, strict=True):
                assert (document.source, document.index) == (0, 9) or skip is None
                found["skipped" if skip else "used", document.source, document.index] += 1
            step += 1
            state = state_at(pipelines[-1], step)
    used = {("used", 0, index): epochs for index in range(9)} | {("used", 1, index): epochs for index in range(6)}
    assert found == used | {("skipped", 0, 9): epochs}


def test_another_seed_and_damaged_states_are_refused(make: Callable[..., Pipeline]) -> None:
    state = state_at(make(A, B), 4)
    for name in ("rows", "step", "samples"):
        with pytest.raises(ConfigError, match=f"the checkpoint has no entry {name}: it is damaged; delete"):
            make(A, B).restore({key: value for key, value in state.items() if key != name})
    with pytest.raises(ConfigError, match=r"data\.seed is 1, expected 0 as in the run that was saved"):
        make(A, B, seed=1).restore(state)
    with pytest.raises(ConfigError, match="has version 3, and this release reads up to 2: continue the run with"):
        make(A, B).restore(state | {"version": 3})


CHANGES = {
    "has grown: it holds 12 samples, and 10 in the run": list(range(12)),
    "has shrunk: it holds 7 samples, and 10 in the run": A[:7],
    "holds other records than in the run that was saved, or the same in another order": A[::-1],
}


@pytest.mark.parametrize("says", CHANGES)
def test_a_source_that_has_changed_is_refused_by_name(make: Callable[..., Pipeline], says: str) -> None:
    state = state_at(make(A, B), 4)
    with pytest.raises(ConfigError, match=rf"data\.sources\.0 \(.*\) {says}.*: put the data back as it was, start"):
        make(CHANGES[says], B).restore(state)
    assert make(A, B).restore(state) == 4


@pytest.mark.parametrize("says", CHANGES)
@pytest.mark.parametrize("step", [4, 5, 9])
def test_or_begins_a_new_epoch_and_the_others_go_on(
    make: Callable[..., Pipeline], caplog: pytest.LogCaptureFixture, says: str, step: int
) -> None:
    """The one that has changed gives all that it holds once, the other what it would have given; again and again."""
    alone = make(A, B)
    expected = [name for name in ids(alone, 0, 60) if name[0] == "b"]
    state, numbers = state_at(alone, step), CHANGES[says]
    changed = make(numbers, B, on_change="continue")
    with caplog.at_level(logging.WARNING, "rave_jax"):
        assert changed.restore(state) == step
    epoch = -(-state["taken"][0] // len(A)) + 1
    (line,) = (record.getMessage() for record in caplog.records)
    assert line.startswith(f"after step {step}: data.sources.0 (") and says in line
    assert line.endswith(f": from here on it begins its epoch {epoch} with what it holds")
    drawn = ids(changed, step, 40)
    ours = [name for name in drawn if name[0] == "a"]
    for begin in (0, len(numbers)):
        assert sorted(ours[begin : begin + len(numbers)]) == sorted(f"a{n}" for n in numbers)
    assert [name for name in drawn if name[0] == "b"] == expected[state["taken"][1] :][: len(drawn) - len(ours)]

    later = make(numbers, B)  # goes on from its own state, with nothing to say and nothing to allow
    assert later.restore(state_at(changed, step + 5)) == step + 5
    assert ids(later, step + 5, 40) == drawn[5 * ROWS :]
    third = make(A, B, on_change="continue")
    third.restore(state_at(changed, step + 7))
    ours = [name for name in ids(third, step + 7, 40) if name[0] == "a"]
    assert sorted(ours[: len(A)]) == sorted(f"a{n}" for n in A)


def test_a_packed_plan_goes_on_and_begins_new_epochs_too(make: Callable[..., Pipeline]) -> None:
    """Rows of steps that were planned together with the last one are planned anew."""
    packed = {"packing": Packing(lookahead=2), "tokens": 200}
    alone = make(A, B, **packed)
    expected = ids(alone, 0, 12)
    for step in (0, 3, 5):
        again = make(A, B, **packed)
        assert again.restore(state_at(alone, step)) == step
        assert ids(again, step, 12) == expected[len(ids(alone, 0, step)) :]
        with pytest.raises(ConfigError, match="has grown: it holds 12 samples, and 10 in the run"):
            make(range(12), B, **packed).restore(state_at(alone, step))
        changed = make(range(12), B, on_change="continue", **packed)
        assert changed.restore(state_at(alone, step)) == step
        begin = changed.plan.state(step)["window"]["step"]
        ours = [name for name in ids(changed, begin, 20) if name[0] == "a"]
        counts = Counter(ours)
        assert counts.keys() == {f"a{n}" for n in range(12)}
        assert max(counts.values()) - min(counts.values()) <= 2  # of two epochs that are not over, one waits for rows
        later = make(range(12), B, **packed)
        assert later.restore(state_at(changed, step + 4)) == step + 4
        assert ids(later, step + 4, 20) == ids(changed, step + 4, 20)


def test_epochs_mix_as_when_the_run_began(make: Callable[..., Pipeline]) -> None:
    stages = (Stage(epochs=(1.0, 2.0)),)
    alone = make(A, B, stages=stages)
    changed = make(A * 2, B, stages=stages, on_change="continue")
    changed.restore(state_at(alone, 3))
    assert changed.plan.state(40)["taken"] == alone.plan.state(40)["taken"]


def test_states_of_the_order_before_grain(make: Callable[..., Pipeline], caplog: pytest.LogCaptureFixture) -> None:
    """They have no version, and what they call their order is not this one."""
    old = {"step": 4, "skipped": {}, "seed": 0, "rows": ROWS, "documents_per_row": 1, "samples": [10, 6]}
    for state in (old, old | {"fingerprints": ["x", "y"]}):
        with pytest.raises(ConfigError, match=r"put samples in another order: continue the run with that release, st"):
            make(A, B).restore(state)
        with caplog.at_level(logging.WARNING, "rave_jax"):
            again = make(A, B, on_change="continue")
            assert again.restore(state) == 4
        assert "in the present epoch some come again and others not" in caplog.messages[-1]
        assert ids(again, 4, 8) == ids(make(A, B), 4, 8)

"""Going on from a saved state: the batch that would have come, or one line on what has changed and what to do."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path

import pytest

from rave_jax.config import ConfigError
from rave_jax.data.config import DataConfig, Stage
from rave_jax.data.pipeline import Pipeline
from rave_jax.data.processor import Processor
from rave_jax.data.sources import QaJsonl

ROWS = 4


@pytest.fixture
def make(tmp_path: Path, processor: Processor) -> Callable[..., Pipeline]:
    """Pipelines over two sources of texts: the ids of their records, as they are written just before."""

    def pipeline(a: list[int], b: list[int], **changes: object) -> Pipeline:
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

"""The plan of rows: each draw once, within the row's size, the same for whoever asks; and plans of unequal parts."""

from __future__ import annotations

import itertools
import json
import pickle
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from rave_jax.data.collate import BatchShape
from rave_jax.data.config import DataConfig, Stage
from rave_jax.data.order import Order
from rave_jax.data.pipeline import Pipeline, equal_rows
from rave_jax.data.plan import Budget, EqualRows, PlannedDocument, RowPlan
from rave_jax.data.processor import Processor
from rave_jax.data.skips import Skip
from rave_jax.data.sources import QaJsonl


@given(st.integers(1, 5), st.integers(1, 4), st.integers(0, 9), st.integers(0, 9))
def test_each_draw_stands_once_and_budgets_fit_the_row(rows: int, documents: int, start: int, turn: int) -> None:
    sizes, order = ((0, 50, 16), (turn + 1, 81, 32)), Order((40, 9), 1).then(0, (2, 1))
    plan = EqualRows(rows, sizes, documents, 6, order)
    found = [plan.row(step, row) for step in range(start, start + 3) for row in range(rows)]
    samples = [document[:2] for document in itertools.chain(*found)]
    drawn = order.draws(start * rows * documents, (start + 3) * rows * documents)
    assert samples == list(zip(*(part.tolist() for part in drawn), strict=True))
    for number, row in enumerate(found):
        shape = plan.shape(start + number // rows)
        sums = np.sum([document.budget for document in row], axis=0)
        assert (sums <= (shape.tokens, shape.patches, 6)).all()
    assert pickle.loads(pickle.dumps(plan)) == plan  # as data, so as another process has it


def test_the_plan_of_a_config(processor: Processor) -> None:
    stages, order = (Stage(tokens=96, patches=50), Stage(4)), Order((99,), 0)
    plan = equal_rows(
        DataConfig(rows=6, tokens=192, patches=64, documents_per_row=2, stages=stages), processor, order, [99]
    )
    assert [plan.shape(step) for step in (0, 3, 4)] == [(6, 96, 64), (6, 96, 64), (6, 192, 64)]
    assert [document.index for document in plan.row(1, 2)] == plan.order.draws(16, 18)[1].tolist()
    assert plan.row(1, 2)[0].budget == (48, 32, plan.regions // 2)
    state = json.loads(json.dumps(plan.state(7)))
    assert (state, plan.restore(state)) == ({"step": 7, "taken": [84]}, 7)
    assert plan.facts() == {"rows": 6, "documents_per_row": 2}


@dataclass(frozen=True)
class Unequal:
    """Rows of a long and a short document and rows of three short ones in turn; it counts its draws itself."""

    size: BatchShape
    order: Order

    def shape(self, step: int) -> BatchShape:
        return self.size

    def row(self, step: int, row: int) -> tuple[PlannedDocument, ...]:
        first = self.first_draw(step) + row // 2 * 5 + row % 2 * 2
        parts = (140, 70) if row % 2 == 0 else (70, 70, 70)
        indices = self.order.draws(first, first + len(parts))[1].tolist()
        return tuple(PlannedDocument(0, index, Budget(part, 48, 0)) for index, part in zip(indices, parts, strict=True))

    def first_draw(self, step: int) -> int:
        return step * self.size.rows // 2 * 5

    def left_out(self, step: int) -> tuple[Skip, ...]:
        return ()

    def facts(self) -> dict[str, Any]:
        return {"rows": self.size.rows}

    def state(self, step: int) -> dict[str, Any]:
        return {"step": step, "next_draw": self.first_draw(step)}

    def restore(self, state: Mapping[str, Any], changed: Collection[int] = ()) -> int:
        assert state["next_draw"] == self.first_draw(state["step"])
        return state["step"]


def test_a_plan_may_give_documents_unequal_parts(qa_folder: Path, processor: Processor) -> None:
    """Every second sample fits the long parts alone; elsewhere it leaves a hole, and the others stand as planned."""
    record = json.loads((qa_folder / "qa.jsonl").read_text().splitlines()[0])
    lines = [json.dumps({**record, "id": n, "answers": ["x" * (60 if n % 2 else 1)]}) for n in range(9)]
    (qa_folder / "qa.jsonl").write_text("\n".join(lines))
    config = DataConfig((QaJsonl(str(qa_folder / "qa.jsonl")),), rows=4, tokens=210, patches=144)
    plan: RowPlan = Unequal(BatchShape(4, 210, 144), Order((9,), config.seed).then(0, (1,)))
    pipeline = Pipeline(config, processor, plan=plan)
    long = holes = 0
    for step, row in itertools.product(range(6), range(4)):
        planned = plan.row(step, row)
        expected = [each.index for each in planned if each.index % 2 == 0 or each.budget.tokens == 140]
        loaded = pipeline.load(step, row, row + 1)
        lengths = np.bincount(loaded.batch.info.document[0])[1:].tolist()
        assert [int(sample.id) for sample in pipeline.samples(step, row)] == expected
        assert lengths == [120 if index % 2 else 61 for index in expected]
        assert [skip is None for skip in loaded.documents] == [each.index in expected for each in planned]
        assert {skip.index for skip in loaded.skips} == {each.index for each in planned} - set(expected)
        pipeline.count(loaded)
        long += 120 in lengths
        holes += len(planned) - len(expected)
    assert long > 0
    assert holes > 0
    assert pipeline.skipped == {"over budget": holes}
    state = json.loads(json.dumps(pipeline.state(2)))
    assert (state["next_draw"], pipeline.restore(state)) == (20, 2)

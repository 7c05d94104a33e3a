"""Packed rows of real samples: what the plan says is what is loaded; cuts, filters and weights of samples."""

from __future__ import annotations

import json
import logging
import pickle
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from PIL import Image

from rave_jax.batch import Batch, Kind
from rave_jax.config import ConfigError
from rave_jax.data.config import DataConfig, Stage
from rave_jax.data.filters import SizeFilter
from rave_jax.data.packing.config import Packing
from rave_jax.data.packing.plan import PackedRows
from rave_jax.data.packing.report import PackingMeter
from rave_jax.data.pipeline import Pipeline
from rave_jax.data.processor import Processor
from rave_jax.data.sample import SampleError
from rave_jax.data.sources import LlavaJson, QaJsonl
from rave_jax.data.weighting import weighted
from rave_jax.layout import FixedRegions, VisualLayout
from tests.data.pictures import noise
from tests.data.test_pipeline import assert_same

SHAPE = {"rows": 2, "tokens": 320, "patches": 256, "packing": Packing(lookahead=3)}


def record(number: int, turns: Sequence[tuple[str, str]], pictures: int = 0) -> dict[str, Any]:
    said = [part for ask, reply in turns for part in ({"from": "human", "value": ask}, {"from": "gpt", "value": reply})]
    said[0]["value"] = "<image>" * pictures + said[0]["value"]
    found = {"id": f"c{number}", "conversations": said}
    return found | ({"image": [f"{n}.png" for n in range(pictures)]} if pictures else {})


@pytest.fixture
def chats(tmp_path: Path) -> Path:
    """Thirty conversations: texts, one picture, three pictures; of one to three turns."""
    for number in range(3):
        Image.fromarray(noise(16 + 8 * number, 24, seed=number)).save(tmp_path / f"{number}.png")
    records = [
        record(n, [("Why?" * (1 + n % 3), "So" * (n + 1))] * (1 + n % 3), (0, 1, 0, 3)[n % 4]) for n in range(30)
    ]
    (tmp_path / "chat.json").write_text(json.dumps(records))
    return tmp_path


def data(folder: Path, **changes: Any) -> DataConfig:
    return DataConfig(**{"sources": (LlavaJson(str(folder / "chat.json")),), **SHAPE, **changes})


def plan_of(pipeline: Pipeline) -> PackedRows:
    assert isinstance(pipeline.plan, PackedRows)
    return pipeline.plan


def test_rows_hold_what_is_planned(chats: Path, processor: Processor) -> None:
    layout = VisualLayout(regions=FixedRegions(2, 2), max_regions=20)
    made = Processor(processor.tokenizer, processor.rules, processor.chat._template, layout)
    pipeline = Pipeline(data(chats), made)
    plan = plan_of(pipeline)
    seen: Counter[int] = Counter()
    for step in range(20):
        if sum(seen.values()) >= 60:
            break
        batch = pipeline.rows(step, 0, 2)
        for row in range(2):
            planned = plan.row(step, row)
            seen.update(document.index for document in planned)
            lengths = np.bincount(batch.info.document[row], minlength=len(planned) + 1)[1:]
            assert lengths.tolist() == [document.budget.tokens for document in planned]
            assert (batch.patches.frame[row] > 0).sum() == sum(document.budget.patches for document in planned)
            assert batch.info.region[row].max() == sum(document.budget.regions for document in planned) <= 20
            assert [int(sample.id[1:]) for sample in pipeline.samples(step, row)] == [d.index for d in planned]
    assert set(seen.values()) == {2}
    assert len(seen) == 30
    assert not pipeline.skipped


def test_a_sample_to_a_row_is_no_packing_bit_for_bit(chats: Path, processor: Processor) -> None:
    packed = Pipeline(data(chats, packing=Packing(documents=1)), processor)
    plain = Pipeline(data(chats, packing=None), processor)
    for step in range(16):
        assert_same(packed.rows(step, 0, 2), plain.rows(step, 0, 2))


@pytest.mark.parametrize("stop", [0, 1, 4, 7])
def test_a_run_goes_on_where_it_stopped(stop: int, chats: Path, processor: Processor) -> None:
    config = data(chats, stages=(Stage(), Stage(5, tokens=400)), cache_mb=0)
    whole = Pipeline(config, processor)
    expected = [whole.rows(step, 0, 2) for step in range(10)]
    first = Pipeline(config, processor)
    for step in range(stop):
        first.rows(step, 0, 2)
    state = json.loads(json.dumps(first.state(stop)))
    second = pickle.loads(pickle.dumps(Pipeline(config, processor)))  # as a process that loads has it
    assert second.restore(state) == stop
    for step in range(stop, 10):
        parts = [second.rows(step, row, row + 1) for row in range(2)]
        for row, part in enumerate(parts):
            np.testing.assert_array_equal(part.tokens[0], expected[step].tokens[row])
            np.testing.assert_array_equal(part.patches.pixels[0], expected[step].patches.pixels[row])
    for changes, named in (
        ({"packing": Packing(lookahead=4)}, r"data\.packing\.lookahead is 4, expected 3"),
        ({"packing": Packing(documents=9, lookahead=3)}, r"data\.packing\.documents is 9, expected 256"),
        ({"packing": Packing(lookahead=3, long="cut")}, r"data\.packing\.long is 'cut'"),
        ({"tokens": 512}, r"data\.tokens, data\.patches.*512"),
        ({"filters": (SizeFilter(most_tokens=99),)}, r"data\.filters is "),
        ({"packing": None}, r"documents_per_row"),
    ):
        with pytest.raises(ConfigError, match=named):
            Pipeline(data(chats, **changes), processor).restore(state)
    plain = Pipeline(data(chats, packing=None), processor).state(3)
    with pytest.raises(ConfigError, match=r"packing"):
        Pipeline(data(chats), processor).restore(plain)


def test_what_the_plan_leaves_out_is_counted_once_and_named(
    qa_folder: Path, processor: Processor, caplog: pytest.LogCaptureFixture
) -> None:
    (qa_folder / "images/4.jpg").unlink()
    config = DataConfig((QaJsonl(str(qa_folder / "qa.jsonl")),), **SHAPE)
    pipeline = Pipeline(config, processor)
    meter = PackingMeter(plan_of(pipeline))
    with caplog.at_level(logging.WARNING, "rave_jax"):
        for step in range(2):  # an epoch of ten fills one step
            batch = pipeline.rows(step, 0, 2)
            meter.add(step, int((batch.info.kind != Kind.PAD).sum()))
        pipeline.skip_log.close()
    # The picture that is cut off shows that only when it is read, so it is planned, and leaves a hole.
    assert pipeline.skipped == {"broken image": 4, "empty answer": 2, "over budget": 2}
    said = "\n".join(record.getMessage() for record in caplog.records)
    assert "q7: 1060 tokens and 48 patches, over the budget of 320 tokens and 256 patches" in said
    assert "4.jpg" in said
    assert "q5" in said
    values = meter.take()
    assert values["packing/left_out/over_budget"] == 2
    assert values["packing/documents"] == 7 / 2
    assert values["packing/padding"] == pytest.approx(1 - 6 * 61 / 640, abs=1e-4)
    assert "left out: 2 over budget, 2 broken image, 2 empty answer" in meter.summary()
    with pytest.raises(SampleError, match=r"q\d"):
        Pipeline(DataConfig((QaJsonl(str(qa_folder / "qa.jsonl")),), **SHAPE, on_error="fail"), processor).rows(0, 0, 1)


def test_long_conversations_are_cut_behind_an_answer(
    tmp_path: Path, processor: Processor, caplog: pytest.LogCaptureFixture
) -> None:
    turns = [(f"Question {n}", "word " * 20) for n in range(5)]
    alone = [("Why?", "word " * 200)]
    unlearned = record(2, turns)
    for turn in unlearned["conversations"][1:6:2]:
        turn["weight"] = 0
    records = [record(0, turns), record(1, alone), unlearned, record(3, [("Why?", "So")])]
    (tmp_path / "chat.json").write_text(json.dumps(records))
    config = data(tmp_path, packing=Packing(long="cut"), tokens=400, rows=1)
    pipeline = Pipeline(config, processor)
    with caplog.at_level(logging.WARNING, "rave_jax"):
        found = {each.id: each for step in range(4) for each in pipeline.samples(step, 0)}
    assert set(found) == {"c0", "c3"}
    kept = found["c0"].messages
    assert kept[-1]["role"] == "assistant"
    size, more = (
        len(processor.encode(LlavaJson(str(tmp_path / "chat.json")).build()[0].messages[:n]).tokens)
        for n in (len(kept), len(kept) + 2)
    )
    assert size <= 400 < more
    assert pipeline.plan.left_out(0)[0].reason == "over budget"
    assert sorted(skip.index for skip in pipeline.plan.left_out(0)) == [1, 2]
    assert sum("are kept; further ones are only counted" in r.getMessage() for r in caplog.records) == 1
    assert plan_of(pipeline).report(0).cut + plan_of(pipeline).report(1).cut >= 1
    batch = pipeline.rows(0, 0, 1)
    assert (batch.loss_weights.sum() > 0) and batch.info.document.max() >= 1


@pytest.mark.parametrize("packing", [Packing(lookahead=3), None])
def test_filters_leave_samples_out_by_name(packing: Packing | None, chats: Path, processor: Processor) -> None:
    filters = (SizeFilter(source=0, most_pictures=1), SizeFilter(least_tokens=60, most_patches=100))
    config = data(chats, packing=packing, filters=filters, max_skips=2)
    pipeline = Pipeline(config, processor)
    source = pipeline.sources[0]
    sizes = [processor.size(source[n].messages) for n in range(30)]
    expected = {n for n, s in enumerate(sizes) if s.pictures <= 1 and s.tokens >= 60 and s.patches <= 100}
    assert 5 < len(expected) < 25
    steps = range(15)
    seen = {int(s.id[1:]) for step in steps for row in range(2) for s in pipeline.samples(step, row)}
    assert seen == expected
    for step in steps:
        pipeline.rows(step, 0, 2)
    assert {"over most_pictures", "under least_tokens"} <= set(pipeline.skipped)
    nothing = data(chats, packing=packing, filters=(SizeFilter(least_tokens=10**6),))
    if packing is not None:
        with pytest.raises(SampleError, match=r"no sample is left over by the filters"):
            Pipeline(nothing, processor).rows(0, 0, 1)


def test_samples_weigh_as_asked(chats: Path, processor: Processor) -> None:
    """The formulas of InternVL 2.5: a token, a sample, or the square root of its learned tokens counts the same."""
    mask = np.array([0, 0, 1, 1, 0, 0.5, 0.5], np.float32)
    np.testing.assert_array_equal(weighted(mask, "token"), mask)
    np.testing.assert_allclose(weighted(mask, "sample"), mask / 4)
    np.testing.assert_allclose(weighted(mask, "sqrt"), mask / 2)
    np.testing.assert_array_equal(weighted(np.zeros(3, np.float32), "sample"), np.zeros(3, np.float32))
    for packing in (Packing(lookahead=3), None):
        plain = Pipeline(data(chats, packing=packing), processor).rows(1, 0, 2)
        for weighting, power in (("sample", 1.0), ("sqrt", 0.5)):
            batch = Pipeline(data(chats, packing=packing, weighting=weighting), processor).rows(1, 0, 2)
            for row, document in zip(*np.nonzero(np.ones((2, plain.info.document.max()))), strict=True):
                mine = plain.info.document[row] == document + 1
                learned = int((plain.loss_weights[row] * mine).sum())
                if learned:
                    np.testing.assert_allclose((batch.loss_weights[row] * mine).sum(), learned ** (1 - power), 1e-6)


def test_settings_that_exclude_each_other(chats: Path) -> None:
    with pytest.raises(ConfigError, match=r"documents_per_row is 2, expected 1 with packing"):
        data(chats, documents_per_row=2)
    with pytest.raises(ConfigError, match=r"filters\.0\.source is 3"):
        data(chats, filters=(SizeFilter(source=3),))
    with pytest.raises(ConfigError, match=r"least_tokens is 9, expected a number from 0 to most_tokens 3"):
        SizeFilter(least_tokens=9, most_tokens=3)


def test_fifty_odd_sizes_are_one_program(tmp_path: Path, processor: Processor) -> None:
    """Rows of texts alone beside rows of nine pictures, and the last step of an epoch: all batches have one shape, so a
    jitted function of them is compiled once."""
    pictures = [0, 1, 2, 9, 0]
    records = []
    for n in range(51):
        names = [f"{n}_{k}.png" for k in range(pictures[n % 5])]
        for k, name in enumerate(names):
            Image.fromarray(noise(9 + n % 23, 8 + (n + k) % 31, seed=n)).save(tmp_path / name)
        records.append(record(n, [("Why?", "a" * (n + 1))], len(names)) | ({"image": names} if names else {}))
    (tmp_path / "1_0.png").write_bytes((tmp_path / "1_0.png").read_bytes()[:-60])
    (tmp_path / "chat.json").write_text(json.dumps(records))
    pipeline = Pipeline(data(tmp_path, tokens=700, patches=512), processor)

    @jax.jit
    def program(batch: Batch) -> jax.Array:
        return batch.loss_weights.sum() + batch.patches.frame.max()

    steps = 0
    sizes: set[tuple[int, int]] = set()
    while len(sizes) < 50 and steps < 60:
        assert np.isfinite(program(pipeline.rows(steps, 0, 2)))
        rows = [plan_of(pipeline).row(steps, row) for row in range(2)]
        sizes |= {(document.index, document.budget.tokens) for row in rows for document in row}
        steps += 1
    assert len(sizes) == 50
    assert pipeline.skipped["broken image"] >= 1
    assert program._cache_size() == 1

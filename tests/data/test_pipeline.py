"""Batches of a run: any rows of any step, the same whoever asks, and what happens to samples that cannot be used."""

from __future__ import annotations

import itertools
import json
import logging
import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rave_jax import config as configs
from rave_jax.batch import Batch
from rave_jax.config import ConfigError
from rave_jax.data.config import DataConfig, Stage
from rave_jax.data.packing.config import Packing
from rave_jax.data.pipeline import Pipeline
from rave_jax.data.processor import Processor
from rave_jax.data.sample import EmptyAnswer, ImageError, OverBudget, SampleError
from rave_jax.data.sources import QaJsonl, Synthetic
from tests.data.conftest import TEXT_ALONE

BROKEN = {"broken image", "empty answer", "over budget"}


def arrays(batch: Batch) -> list[np.ndarray]:
    """Every array of a batch, rows first."""
    return jax.tree.leaves(batch._replace(positions=np.moveaxis(batch.positions, 1, 0)))


def assert_same(first: Batch, second: Batch) -> None:
    for a, b in zip(arrays(first), arrays(second), strict=True):
        np.testing.assert_array_equal(a, b)


def data(folder: Path, **changes: object) -> DataConfig:
    source = QaJsonl(str(folder / "qa.jsonl"))
    values = {"sources": (source,), "rows": 6, "tokens": 192, "patches": 64, "prefetch": 0, **changes}
    return DataConfig(**values)


@given(st.integers(0, 40), st.lists(st.integers(1, 5), max_size=3), st.sampled_from([1, 2]))
def test_rows_do_not_depend_on_who_loads_them(processor: Processor, step: int, cuts: list[int], documents: int) -> None:
    config = DataConfig(
        sources=(Synthetic(length=1000), Synthetic(length=500, seed=1)),
        stages=(Stage(), Stage(20, (3.0, 1.0))),
        rows=6,
        tokens=400 * documents,
        patches=144 * documents,
        documents_per_row=documents,
        max_pixels=48 * 48,
    )
    small = Processor(processor.tokenizer, _limited(processor, config), processor.chat._template)
    whole = Pipeline(config, small).rows(step, 0, 6)
    assert whole.info.document.max() == documents
    other = Pipeline(config, small)
    bounds = [0, *sorted(set(cuts)), 6]
    parts = [other.rows(step, a, b) for a, b in itertools.pairwise(bounds)]
    for row, pieces in zip(arrays(whole), zip(*map(arrays, parts), strict=True), strict=True):
        np.testing.assert_array_equal(row, np.concatenate(pieces))


def _limited(processor: Processor, config: DataConfig):
    from dataclasses import replace

    return replace(processor.rules, max_pixels=config.max_pixels)


def test_bad_samples_are_skipped_named_and_counted(
    qa_folder: Path, processor: Processor, caplog: pytest.LogCaptureFixture
) -> None:
    pipeline = Pipeline(data(qa_folder), processor)
    with caplog.at_level(logging.WARNING, "rave_jax"):
        batches = [pipeline.rows(step, 0, 6) for step in range(10)]
    assert sum((batch.loss_weights.sum(1) > 0).sum() for batch in batches) == 60 - 18
    assert pipeline.skipped == dict.fromkeys(BROKEN, 6)  # 60 draws take each of the 10 records 6 times
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 3  # one line each, however often they come up
    assert any("3.jpg" in line and "broken image" in line for line in lines)
    assert any("q5" in line and "5.jpg" in line and "an answer is empty" in line for line in lines)
    assert any("q7" in line and "tokens and 48 patches" in line for line in lines)


def test_each_sample_comes_once_in_an_epoch_and_those_that_are_skipped_leave_holes(
    qa_folder: Path, processor: Processor
) -> None:
    pipeline = Pipeline(data(qa_folder), processor)
    for epoch in range(3):
        draws = [divmod(draw, 6) for draw in range(epoch * 10, epoch * 10 + 10)]
        assert sorted(sample.id for place in draws for sample in pipeline.samples(*place)) == [
            f"q{number}" for number in range(10) if number not in (3, 5, 7)
        ]
        skips = [skip for step, row in draws for skip in pipeline.load(step, row, row + 1).skips]
        assert sorted(skip.index for skip in skips) == [3, 5, 7]
        for step, row in draws:
            loaded = pipeline.load(step, row, row + 1)
            assert (loaded.batch.info.document.max() == 0) == bool(loaded.skips)
            assert (loaded.batch.loss_weights.sum() == 0) == bool(loaded.skips)


@pytest.mark.parametrize(("record", "error"), [(3, ImageError), (5, EmptyAnswer), (7, OverBudget)])
def test_bad_samples_can_be_fatal(record: int, error: type, qa_folder: Path, processor: Processor) -> None:
    lines = (qa_folder / "qa.jsonl").read_text().splitlines()
    (qa_folder / "qa.jsonl").write_text(lines[record] + "\n")
    with pytest.raises(error, match=f"q{record}"):
        Pipeline(data(qa_folder, on_error="fail"), processor).rows(0, 0, 1)
    with pytest.raises(SampleError, match=rf"5 consecutive samples.*q{record}"):
        Pipeline(data(qa_folder, max_skips=4), processor).rows(0, 0, 6)
    with pytest.raises(SampleError, match=rf"5 consecutive samples.*q{record}"):
        Pipeline(data(qa_folder, max_skips=4), processor).check_samples()
    Pipeline(data(qa_folder, max_skips=6), processor).rows(0, 0, 6)


def test_threads_may_load_ahead_and_what_is_not_used_is_not_counted(qa_folder: Path, processor: Processor) -> None:
    plain, ahead = Pipeline(data(qa_folder), processor), Pipeline(data(qa_folder), processor)
    with ThreadPoolExecutor(4) as pool:
        loaded = list(pool.map(lambda step: ahead.load(step, 1, 4), range(5, 12)))
    for step, rows in zip(range(5, 12), loaded, strict=True):
        assert_same(rows.batch, plain.rows(step, 1, 4))
        assert ahead.skipped != plain.skipped or not rows.skips
        ahead.count(rows)
        assert ahead.state(step + 1) == plain.state(step + 1)


@pytest.mark.parametrize("packing", [None, Packing(lookahead=2)])
def test_it_can_be_sent_to_a_process_that_loads(qa_folder: Path, processor: Processor, packing: Packing | None) -> None:
    """Which gets what was planned, but neither what was counted nor what is kept of samples."""
    sources = (QaJsonl(str(qa_folder / "qa.jsonl")), Synthetic(length=20))
    config = data(qa_folder, sources=sources, packing=packing, tokens=400, patches=144, max_pixels=48 * 48)
    first = Pipeline(config, Processor(processor.tokenizer, _limited(processor, config), processor.chat._template))
    expected = [first.rows(step, 0, 6) for step in range(4)]
    second = pickle.loads(pickle.dumps(first))
    assert sum(first.skipped.values()) > 0
    assert not second.skip_log.summary()
    for step in (3, 1):
        assert_same(second.load(step, 0, 6).batch, expected[step])


def test_state_is_json_and_restores(qa_folder: Path, processor: Processor) -> None:
    first = Pipeline(data(qa_folder), processor)
    for step in range(4):
        first.rows(step, 0, 6)
    state = json.loads(json.dumps(first.state(4)))
    second = Pipeline(data(qa_folder), processor)
    step = second.restore(state)
    assert_same(second.rows(step, 0, 6), first.rows(4, 0, 6))
    assert second.skipped == first.skipped
    with pytest.raises(ConfigError, match="the checkpoint has no entry rows: it is damaged; delete"):
        second.restore({name: value for name, value in state.items() if name != "rows"})
    with pytest.raises(ConfigError, match=r"data\.seed is 1"):
        Pipeline(data(qa_folder, seed=1), processor).restore(state)


def test_skips_are_summed_up(qa_folder: Path, processor: Processor, caplog: pytest.LogCaptureFixture) -> None:
    """One line when a kind of skip first comes up, then a summary at the 10th, the 100th ... and at the end."""
    records = [json.loads(line) for line in (qa_folder / "qa.jsonl").read_text().splitlines()]
    good, long = records[0], {**records[0], "answers": ["long " * 200]}
    many = [good, *({**long, "id": n} for n in range(30)), *({**good, "note": "x"} for _ in range(5))]
    (qa_folder / "qa.jsonl").write_text("\n".join(map(json.dumps, many)))
    pipeline = Pipeline(data(qa_folder), processor)
    with caplog.at_level(logging.WARNING, "rave_jax"):
        for step in range(10):
            pipeline.rows(step, 0, 6)
        pipeline.skip_log.close()
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 4
    assert [line.split(" ")[0] for line in lines] == ["skipped"] * 4
    assert "skipped 10 samples so far" in "".join(lines)
    assert lines[-1].startswith("skipped 35 samples so far: 30 over budget in ")
    assert "(they need up to 1060 tokens and 48 patches; `rave-jax data CONFIG`" in lines[-1]
    assert "; 5 unread key in" in lines[-1] and "'note'" in lines[-1]


def test_a_source_of_which_nothing_can_be_read_is_refused_at_once(qa_folder: Path, processor: Processor) -> None:
    good = (qa_folder / "qa.jsonl").read_text()
    (qa_folder / "qa.jsonl").write_text('{"text": "Q", "label": "A"}\n' * 9 + good)
    says = (
        r"data\.sources\.0 \(.*\): none of its first 8 samples can be read; the first: .*no question: .*'text', 'label'"
    )
    with pytest.raises(ConfigError, match=says):
        Pipeline(data(qa_folder), processor)
    (qa_folder / "qa.jsonl").write_text('{"text": "Q"}\n' * 7 + good)
    Pipeline(data(qa_folder), processor).rows(0, 0, 6)


def test_pictures_for_a_text_model_are_refused_at_once(qa_folder: Path, processor: Processor) -> None:
    text = Processor(processor.tokenizer, TEXT_ALONE, processor.chat._template)
    says = r"data\.sources\.0 \(.*\): its samples have pictures, but \w+ is a text model; choose a source of texts"
    with pytest.raises(ConfigError, match=says):
        Pipeline(data(qa_folder, patches=0), text)
    lines = (qa_folder / "qa.jsonl").read_text()
    (qa_folder / "qa.jsonl").write_text('{"question": "one", "answers": ["two"]}\n' + lines)
    Pipeline(data(qa_folder, patches=0), text)


def test_too_many_skips_say_what_they_were(qa_folder: Path, processor: Processor) -> None:
    pipeline = Pipeline(data(qa_folder, tokens=30, max_skips=8), processor)
    says = r"9 consecutive samples cannot be used: \d over budget \(they need up to 1060 tokens and 48 patches"
    with pytest.raises(SampleError, match=says):
        pipeline.check_samples()
    pipeline.rows(0, 0, 6)
    with pytest.raises(SampleError, match=says):
        pipeline.rows(1, 0, 6)
    assert sum(pipeline.skipped.values()) == 12  # all of these rows


def test_skips_that_are_not_one_after_another_do_not_end_the_run(qa_folder: Path, processor: Processor) -> None:
    pipeline = Pipeline(data(qa_folder, max_skips=6), processor)
    for step in range(10):
        pipeline.rows(step, 0, 6)
    assert sum(pipeline.skipped.values()) == 18


def test_the_cache_changes_nothing_but_time(qa_folder: Path, processor: Processor) -> None:
    cached, plain = Pipeline(data(qa_folder), processor), Pipeline(data(qa_folder, cache_mb=0), processor)
    for step in range(6):
        assert_same(cached.rows(step, 0, 6), plain.rows(step, 0, 6))
    assert cached.skipped == plain.skipped
    assert len(cached._loader._cache._items) == 7
    assert not plain._loader._cache._items


def test_the_curriculum_goes_by_step(qa_folder: Path, processor: Processor) -> None:
    (qa_folder / "b").mkdir()
    lines = [line.replace("images/", "../images/") for line in (qa_folder / "qa.jsonl").read_text().splitlines()]
    (qa_folder / "b" / "qa.jsonl").write_text("\n".join([*lines[:3], lines[4]]))
    sources = (QaJsonl(str(qa_folder / "qa.jsonl"), name="a"), QaJsonl(str(qa_folder / "b/qa.jsonl"), name="b"))
    config = data(qa_folder, sources=sources, stages=(Stage(0, (1.0, 0.0)), Stage(3, (0.0, 1.0))))
    pipeline = Pipeline(config, processor)
    names = [{sample.source for row in range(6) for sample in pipeline.samples(step, row)} for step in range(6)]
    assert names == [{"a"}] * 3 + [{"b"}] * 3


def test_a_stage_may_have_rows_of_its_own_size(qa_folder: Path, processor: Processor) -> None:
    stages = (Stage(tokens=96, patches=48), Stage(4), Stage(8, tokens=1600, patches=1600))
    cached, plain = (Pipeline(data(qa_folder, stages=stages, cache_mb=mb), processor) for mb in (8, 0))
    sizes, reasons = [], []
    for step in range(12):
        batch = cached.rows(step, 0, 6)
        assert_same(batch, plain.rows(step, 0, 6))
        sizes.append((*batch.tokens.shape, batch.patches.length))
        reasons.append({skip.reason for skip in plain.load(step, 0, 6).skips})
    assert sizes == [(6, 96, 48)] * 4 + [(6, 192, 64)] * 4 + [(6, 1600, 1600)] * 4
    # The largest picture, cached or not, fits the last rows alone.
    assert ["over budget" in set.union(*reasons[n : n + 4]) for n in (0, 4, 8)] == [True, True, False]


def test_configs(qa_folder: Path, processor: Processor) -> None:
    config = data(qa_folder, stages=(Stage(), Stage(9, (1.0,))))
    assert configs.loads(DataConfig, configs.dumps(config)) == config
    assert data(qa_folder, stages=()) == data(qa_folder, stages=(Stage(),))
    for changes, says in (
        ({"stages": (Stage(1),)}, "a first stage at step 0"),
        ({"stages": (Stage(), Stage(5), Stage(5))}, "ascending"),
        ({"stages": (Stage(0, (1.0, 2.0)),)}, "one weight for each of 1 source; --data.stages \\[\\] makes one stage"),
        ({"stages": (Stage(0, epochs=(1.0, 2.0)),)}, "0.epochs is .* one number of epochs for each of 1 source; "),
        ({"sources": ()}, "at least one source"),
        ({"rows": 0}, "rows is 0"),
        ({"workers": 0}, "workers is 0"),
    ):
        with pytest.raises(ConfigError, match=says):
            data(qa_folder, **changes)
    with pytest.raises(ConfigError, match="not all 0"):
        Stage(0, (0.0,))
    with pytest.raises(ConfigError, match=r"epochs is .*, expected numbers of 0 or more"):
        Stage(epochs=(float("inf"),))
    with pytest.raises(ConfigError, match=r"epochs is .*, expected empty where weights are given"):
        Stage(weights=(1.0,), epochs=(1.0,))
    with pytest.raises(ConfigError, match="tokens is 0, expected a number from 1 to 4194304"):
        Stage(tokens=0)
    with pytest.raises(ConfigError, match="patches is -1, expected a number from 0 to 16777216"):
        Stage(patches=-1)
    (qa_folder / "empty.jsonl").write_text("\n")
    with pytest.raises(ConfigError, match="at least one sample"):
        Pipeline(data(qa_folder, sources=(QaJsonl(str(qa_folder / "empty.jsonl")),)), processor)
    with pytest.raises(ConfigError, match="a range within 6 rows"):
        Pipeline(config, processor).rows(0, 3, 7)


def test_patch_budgets_are_whole_windows(qa_folder: Path, processor: Processor) -> None:
    assert Pipeline(data(qa_folder, patches=50), processor).shape(0) == (6, 192, 64)

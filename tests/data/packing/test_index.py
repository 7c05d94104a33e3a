"""The index of sizes: what encoding gives, measured once, kept beside the data, and never wrong."""

from __future__ import annotations

import dataclasses
import json
import os
import pickle
from collections.abc import Sized
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rave_jax.data.beside import FOLDER
from rave_jax.data.loading import check_answers
from rave_jax.data.packing import index as indexing
from rave_jax.data.packing.index import USABLE, SizeIndex
from rave_jax.data.packing.measuring import Measured, measure
from rave_jax.data.packing.shared import SharedTables
from rave_jax.data.processor import Processor
from rave_jax.data.sample import Message, OverBudget, Sample, SampleError, Source
from rave_jax.data.sources import QaJsonl
from rave_jax.families.shared.grids.video import VideoLimits
from rave_jax.layout import AdaptiveRegions, ContextTokens, FixedRegions, VisualLayout
from tests.data.conftest import TEXT_ALONE
from tests.data.pictures import noise

WORDS = ("<|im_end|>", "<|image_pad|>", " ", "a\n")
TEXTS = st.text(st.characters(codec="utf-8"), max_size=12) | st.sampled_from(WORDS)
PICTURES = st.tuples(st.integers(3, 60), st.integers(3, 60)).map(lambda size: {"type": "image", "image": noise(*size)})
VIDEOS = st.tuples(st.integers(1, 6), st.integers(8, 30)).map(
    lambda of: {"type": "video", "video": [noise(of[1], 24, seed=n) for n in range(of[0])], "fps": 2.0}
)
PARTS = st.lists(TEXTS.map(lambda text: {"type": "text", "text": text}) | PICTURES | VIDEOS, min_size=1, max_size=3)
TURNS = st.lists(st.tuples(PARTS, TEXTS, st.sampled_from((0, 1, 0.5))), min_size=1, max_size=3)
LAYOUTS = (
    VisualLayout(),
    VisualLayout(context=ContextTokens(3), regions=FixedRegions(2, 3), max_regions=40),
    VisualLayout(context=ContextTokens(2, "image"), regions=AdaptiveRegions(2, 2, tokens=12), max_regions=12),
)


def sample_of(turns: list) -> Sample:
    messages: list[Message] = []
    for parts, answer, weight in turns:
        messages += [{"role": "user", "content": parts}, {"role": "assistant", "content": answer, "weight": weight}]
    return Sample("s", tuple(messages), ())


class Listed(list):
    """A source of samples in a list."""

    name, fingerprint, parts = "listed", "", ()


@given(TURNS, st.sampled_from(LAYOUTS), st.booleans())
def test_sizes_are_what_encoding_gives(processor: Processor, turns: list, layout: VisualLayout, short: bool) -> None:
    """Pictures, videos, context tokens, regions and all that is refused: the same from headers as from pixels."""
    rules = dataclasses.replace(processor.rules, video=VideoLimits(64, 1024))
    made = Processor(processor.tokenizer, rules, processor.chat._template, layout)
    if short:
        vars(made)["_check_longest"] = lambda tokens: _refuse(tokens, 150)
    sample = sample_of(turns)
    found = measure(Listed([sample]), 0, made)
    try:
        check_answers(sample, sample.called)
        example = made.encode(sample.messages, name=sample.called)
    except SampleError as error:
        assert found.reason == error.reason
        return
    visuals = sum(part["type"] != "text" for parts, _, _ in turns for part in parts)
    size = len(example.tokens), example.patches.length, int(example.info.region.max()), visuals
    assert (found.reason, found.size) == ("", size)


def _refuse(tokens: int, most: int) -> None:
    if tokens > most:
        raise OverBudget(f"{tokens} tokens")


def everything(source: Sized) -> tuple[np.ndarray, np.ndarray]:
    count = len(source)
    return np.zeros(count, np.int64), np.arange(count)


@pytest.fixture
def count(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Indices of the samples that are measured from here on."""
    found: list[int] = []

    def counted(source: Source, index: int, processor: Processor) -> Measured:
        found.append(index)
        return measure(source, index, processor)

    monkeypatch.setattr(indexing, "measure", counted)
    return found


def opened(folder: Path, processor: Processor, **settings: object) -> SizeIndex:
    config = QaJsonl(str(folder / "qa.jsonl"), **settings)
    return SizeIndex([config.build()], [config], processor)


def test_what_was_measured_is_kept(qa_folder: Path, processor: Processor, count: list[int]) -> None:
    (qa_folder / "images/3.jpg").write_bytes(b"no picture")
    index = opened(qa_folder, processor)
    sources, indices = everything(range(10))
    index.known(sources[:4], indices[:4])
    index.close()  # as a run that ends early
    assert sorted(count) == [0, 1, 2, 3]
    again = opened(qa_folder, processor)
    found = again.known(sources, indices)
    again.close()
    assert sorted(count) == list(range(10))
    third = opened(qa_folder, processor)
    for mine, other in zip(third.known(sources, indices).sizes, found.sizes, strict=True):
        np.testing.assert_array_equal(mine, other)
    assert len(count) == 10
    bad = np.flatnonzero(found.status != USABLE).tolist()
    assert [(n, third.reason(found.status[n])) for n in bad] == [(3, "broken image"), (5, "empty answer")]
    assert "3.jpg" in third.what_is_wrong(0, 3).message
    lengths = [len(processor.encode(QaJsonl(str(qa_folder / "qa.jsonl")).build()[n].messages).tokens) for n in (0, 7)]
    assert found.sizes.tokens[[0, 7]].tolist() == lengths


@pytest.mark.parametrize("change", ["records", "settings", "processor", "damage", "cut off", "of another"])
def test_an_index_of_something_else_is_made_anew(
    change: str, qa_folder: Path, processor: Processor, count: list[int], tmp_path: Path
) -> None:
    first = opened(qa_folder, processor)
    first.known(*everything(range(10)))
    first.close()
    (kept,) = (qa_folder / FOLDER).glob("sizes-*")
    count.clear()
    settings = {}
    made = processor
    match change:
        case "records":
            lines = (qa_folder / "qa.jsonl").read_text().splitlines()
            record = json.loads(lines[0]) | {"question": "Why is it so?"}
            (qa_folder / "qa.jsonl").write_text("\n".join([json.dumps(record), *lines[1:]]))
        case "settings":
            settings = {"ignored": ("split",)}
        case "processor":
            rules = dataclasses.replace(processor.rules, max_pixels=1024)
            made = Processor(processor.tokenizer, rules, processor.chat._template)
        case "damage":
            data = bytearray(kept.read_bytes())
            data[-3] ^= 1
            kept.write_bytes(bytes(data))
        case "cut off":
            kept.write_bytes(kept.read_bytes()[:-5])
        case "of another":
            kept.write_bytes(b'{"settings": "x"}\n')
    index = opened(qa_folder, made, **settings)
    found = index.known(*everything(range(10)))
    assert len(count) == 10
    direct = [measure(index._sources[0], n, made).size.tokens for n in range(10)]
    assert found.sizes.tokens.tolist() == direct
    index.close()
    count.clear()
    opened(qa_folder, made, **settings).known(*everything(range(10)))
    assert count == []


def test_a_second_process_writes_nothing(qa_folder: Path, processor: Processor) -> None:
    config = QaJsonl(str(qa_folder / "qa.jsonl"))
    index = SizeIndex([config.build()], [config], processor, writes=False)
    index.known(*everything(range(10)))
    index.close()
    assert not list((qa_folder / FOLDER).glob("sizes-*"))


def test_processes_of_a_host_share_what_is_measured(qa_folder: Path, processor: Processor, count: list[int]) -> None:
    index = opened(qa_folder, processor)
    index.known(*everything(range(4)))
    copy = pickle.loads(pickle.dumps(index))
    copy.known(*everything(range(10)))
    assert sorted(count) == list(range(10))
    index.known(*everything(range(10)))
    assert len(count) == 10
    copy.close()
    assert not list((qa_folder / FOLDER).glob("sizes-*"))  # its process keeps nothing
    index.close()
    opened(qa_folder, processor).known(*everything(range(10)))
    assert len(count) == 10


def test_memory_that_is_gone_is_begun_anew(tmp_path: Path) -> None:
    """Its file may be another one by then, of which nothing is read or written."""
    made = SharedTables(3)
    made.tables()[1][:] = 7
    same = pickle.loads(pickle.dumps(made))
    assert same.tables()[1].tolist() == [7, 7, 7]
    state, file = made.__getstate__(), made._file
    del made, same
    other = tmp_path / "other"
    other.write_bytes(b"\1" * 100)
    taken = os.open(other, os.O_RDWR)
    os.dup2(taken, file)
    again = SharedTables.__new__(SharedTables)
    again.__setstate__(state)
    for each in {taken, file}:
        os.close(each)
    assert again.tables()[1].tolist() == [0, 0, 0]
    again.tables()[1][:] = 5
    assert other.read_bytes() == b"\1" * 100


def test_measuring_says_how_far_it_is(qa_folder: Path, processor: Processor) -> None:
    index = opened(qa_folder, processor)
    said: list[tuple[int, int]] = []
    index.progress = lambda done, total: said.append((done, total))
    index.ahead(*everything(range(3)))
    index.known(*everything(range(10)))
    assert said[-1] == (10, 10)


def test_fingerprints_of_processors(processor: Processor) -> None:
    """Whatever changes sizes changes the fingerprint, and nothing else does."""

    def made(rules=processor.rules, template=processor.chat._template, **settings) -> str:
        return Processor(processor.tokenizer, rules, template, **settings).fingerprint

    others = [
        made(dataclasses.replace(processor.rules, min_pixels=256)),
        made(TEXT_ALONE),
        made(template=processor.chat._template.replace("Be brief", "Be kind")),
        made(layout=VisualLayout(context=ContextTokens(1))),
        made(special_tokens_in_text="tokens"),
    ]
    assert len({made(), *others}) == 6
    assert made() == processor.fingerprint

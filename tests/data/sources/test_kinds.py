"""What holds of every kind of source: URLs, filters by field, copies in other processes, pictures that vanish."""

from __future__ import annotations

import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import fsspec
import pytest

from rave_jax.config import ConfigError, check_paths
from rave_jax.data import beside, flat
from rave_jax.data.config import DataConfig
from rave_jax.data.images import image_size, read_image
from rave_jax.data.places import Url, place
from rave_jax.data.sample import ImageError, Sample, Source
from rave_jax.data.sources import FieldIs, HfParquet, ImageFolder, LlavaJson, QaJsonl, SourceConfig, blocks, filters
from tests.data.sources.kinds import COUNT, KINDS
from tests.data.test_sources import png

every_kind = pytest.mark.parametrize("kind", KINDS)


def read(source: Source) -> list[tuple[str, tuple[str, ...], Any]]:
    samples: list[Sample] = [source[n] for n in range(len(source))]
    return [(s.question, s.answers, [read_image(image).tobytes() for image in s.images]) for s in samples]


EXPECTED = [(f"Q{n}", (str(n),), [read_image(png(n)).tobytes()]) for n in range(COUNT)]


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Any]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    system = fsspec.filesystem("memory")
    yield system
    system.rm("/bucket", recursive=True)


@every_kind
def test_samples_are_read_in_order(kind: str, tmp_path: Path) -> None:
    source = KINDS[kind](tmp_path).build()
    assert read(source) == EXPECTED
    assert sum(part.length for part in source.parts) == COUNT
    with pytest.raises(IndexError):
        source[COUNT]


@every_kind
def test_files_by_url_give_what_local_ones_give(kind: str, tmp_path: Path, memory: Any) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    config: Any = KINDS[kind](folder)
    local = config.build()
    memory.put(f"{folder}/", "/bucket/x/", recursive=True)
    for name in memory.find("/bucket/x"):
        if beside.FOLDER in name:
            memory.rm(name)
    remote = replace(config, path=config.path.replace(str(folder), "memory://bucket/x"))
    check_paths(DataConfig((remote,)))
    source = remote.build()
    shutil.rmtree(folder)
    assert read(source) == EXPECTED
    assert [part.fingerprint for part in source.parts] == [part.fingerprint for part in local.parts]
    assert source.fingerprint == local.fingerprint
    kept = [*(tmp_path / "cache/rave_jax").rglob("*.index")]
    assert kept
    before = {path: path.stat().st_mtime_ns for path in kept}
    assert read(remote.build()) == EXPECTED
    assert {path: path.stat().st_mtime_ns for path in kept} == before


@every_kind
def test_file_urls_are_local_paths(kind: str, tmp_path: Path) -> None:
    config: Any = KINDS[kind](tmp_path)
    assert read(replace(config, path=f"file://{config.path}").build()) == EXPECTED


@every_kind
def test_records_are_chosen_by_a_field(kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config: Any = KINDS[kind](tmp_path)
    whole = config.build()
    caplog.clear()
    source = replace(config, where=(FieldIs("language", ("de",)),)).build()
    said = [record.getMessage() for record in caplog.records if "`where`" in record.getMessage()]
    assert [line.partition(": ")[2] for line in said] == ["`where` keeps 3 of 6 records (language is de)"]
    assert read(source) == EXPECTED[1::2]
    assert source.fingerprint != whole.fingerprint
    assert sum(part.length for part in source.parts) == 3
    other = replace(config, where=(FieldIs("language", ("de",), keep=False),)).build()
    assert read(other) == EXPECTED[::2]
    assert not {part.fingerprint for part in other.parts} & {part.fingerprint for part in source.parts}


@every_kind
def test_filters_that_choose_nothing_are_refused(kind: str, tmp_path: Path) -> None:
    config: Any = KINDS[kind](tmp_path)
    with pytest.raises(
        ConfigError, match="no record has the field 'lang', which `where` names; the first records have"
    ):
        replace(config, where=(FieldIs("lang", ("de",)),)).build()
    with pytest.raises(ConfigError, match=r"keeps none of 6 records \(language is fr or it\).*language (en|de), lang"):
        replace(config, where=(FieldIs("language", ("fr", "it")),)).build()


@every_kind
def test_a_copy_in_another_process_reads_the_same(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    config: Any = KINDS[kind](tmp_path)
    source = replace(config, where=(FieldIs("language", ("de",)),)).build()
    source[0]
    caplog.clear()
    data = pickle.dumps(source)
    assert len(data) < 2000
    monkeypatch.setattr(flat, "keep", None)  # the copy maps the indices that are there
    assert read(pickle.loads(data)) == EXPECTED[1::2]
    assert not caplog.records  # what there is to say was said
    monkeypatch.undo()
    if kind == "parquet":
        shutil.copy(tmp_path / "1.parquet", tmp_path / "0.parquet")
    else:
        names = {"lines": "qa.jsonl", "listed": "talk.json", "tars": "0.tar", "pictures": "metadata.jsonl"}
        file = tmp_path / names.get(kind, "set/data-00000-of-00002.arrow")
        file.write_bytes(file.read_bytes().replace(b"Q1", b"R1"))
    with pytest.raises(ConfigError, match="changed while a run reads them"):
        pickle.loads(data)


def test_a_process_of_its_own_opens_a_copy(tmp_path: Path) -> None:
    source = KINDS["lines"](tmp_path).build()
    (tmp_path / "copy").write_bytes(pickle.dumps(source))
    code = (
        "import pickle, sys; source = pickle.load(open(sys.argv[1], 'rb'));"
        "print(len(source), source[5].question, 'jax' in sys.modules)"
    )
    found = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "copy")], capture_output=True, text=True, env={**os.environ}
    )
    assert (found.stdout, found.returncode) == ("6 Q5 False\n", 0), found.stderr


@pytest.mark.parametrize("kind", ["lines", "listed", "pictures"])
def test_a_picture_that_vanishes_is_one_bad_sample(kind: str, tmp_path: Path) -> None:
    source = KINDS[kind](tmp_path).build()
    (tmp_path / "3.png").unlink()
    found = [source[n] for n in range(COUNT)]
    with pytest.raises(ImageError, match=r"/3\.png: No such file or directory$"):
        image_size(found[3].images[0])
    assert [image_size(found[n].images[0]) for n in (2, 4)] == [(20, 30)] * 2


def test_a_picture_by_url_that_vanishes_is_one_bad_sample(memory: Any) -> None:
    memory.pipe("/bucket/1.png", png(1))
    memory.pipe("/bucket/qa.jsonl", b'{"question": "Q", "answer": "A", "image": "1.png"}\n' * 2)
    source = QaJsonl("memory://bucket/qa.jsonl", image_dir="memory://bucket").build()
    (image,) = source[0].images
    assert image == "memory://bucket/1.png" and image_size(image) == (20, 30)
    memory.rm("/bucket/1.png")
    with pytest.raises(ImageError, match=r"^memory://bucket/1\.png: No such file or directory$"):
        image_size(image)


def test_a_file_by_url_that_changes_is_read_anew(memory: Any) -> None:
    memory.pipe("/bucket/qa.jsonl", b'{"question": "Q", "answer": "A"}\n')
    assert QaJsonl("memory://bucket/qa.jsonl").build()[0].question == "Q"
    memory.pipe("/bucket/qa.jsonl", b'{"question": "R", "answer": "A"}\n')
    assert QaJsonl("memory://bucket/qa.jsonl").build()[0].question == "R"


@pytest.mark.parametrize("config", [QaJsonl, LlavaJson, HfParquet, ImageFolder])
def test_urls_that_cannot_be_read_say_why(
    config: type[SourceConfig], memory: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory.pipe("/bucket/other.txt", b"x")
    with pytest.raises(ConfigError, match=r"memory://bucket/gone.*(No such file|no parquet file|no folder)"):
        config(path="memory://bucket/gone").build()
    with pytest.raises(ConfigError, match=r"path is 'https://.*', expected a path of a file system"):
        check_paths(config(path="https://here/x.jsonl"))
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(ConfigError, match=r"gs:// needs a package that is missing: pip install 'rave-jax\[gcs\]'"):
        config(path="gs://bucket/x.jsonl").build()


def test_places() -> None:
    url = place("gs://bucket/a/b.jsonl")
    assert (str(url), url.name, url.stem, url.suffix) == ("gs://bucket/a/b.jsonl", "b.jsonl", "b", ".jsonl")
    assert (str(url.parent / "../c.png"), url.parent) == ("gs://bucket/c.png", Url("gs://bucket/a"))
    assert place("file:///a/b") == Path("/a/b") and place("a/b") == Path("a/b")


def test_only_parts_that_are_new_are_looked_at_by_a_filter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "BLOCK", 2)
    config = replace(KINDS["lines"](tmp_path), where=(FieldIs("language", ("de",)),))
    config.build()
    looked = []
    look = filters._look
    monkeypatch.setattr(filters, "_look", lambda *given: looked.append(given[2]) or look(*given))
    config.build()
    assert looked == []
    (tmp_path / "qa.jsonl").open("a").write('{"question": "Q6", "answer": "6", "language": "de"}\n')
    assert [config.build()[n].question for n in range(4)] == ["Q1", "Q3", "Q5", "Q6"]
    assert looked == [6]


def test_values_of_filters_are_those_of_json(tmp_path: Path) -> None:
    rows = ['"tags": ["a", "b"]', '"n": 3, "ok": true', '"n": 3.5, "meta": {"license": "cc"}', '"n": null', "{"]
    (tmp_path / "x.jsonl").write_text(
        "".join(f'{{"question": "{i}", "answer": "A", {row}}}\n' for i, row in enumerate(rows))
    )

    def kept(field: str, *values: str, keep: bool = True) -> list[int]:
        source = QaJsonl(str(tmp_path / "x.jsonl"), where=(FieldIs(field, values, keep),)).build()
        numbers = source._chosen.indices
        assert numbers is not None
        return numbers.tolist()

    assert kept("tags", "b", "c") == [0, 4]  # a record that cannot be read is kept: it is counted when it is loaded
    assert kept("n", "3") == [1, 4]
    assert kept("n", "null", keep=False) == [1, 2, 4]
    assert kept("ok", "true") == [1, 4]
    assert kept("meta.license", "cc") == [2, 4]


def test_a_field_of_records_that_another_filter_leaves_out_is_known(tmp_path: Path) -> None:
    filters_of = (FieldIs("language", ("fr",)), FieldIs("answer", ("1",)))
    with pytest.raises(ConfigError, match="keeps none of 6 records"):
        replace(KINDS["lines"](tmp_path), where=filters_of).build()


def test_of_a_table_all_columns_are_listed_where_a_field_is_unknown(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="the first records have id, image, question, answer, language"):
        replace(KINDS["parquet"](tmp_path), where=(FieldIs("lang", ("de",)),)).build()

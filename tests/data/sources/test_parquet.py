"""Parquet in several files: one schema, footers read once, rows that are damaged named with their file."""

from __future__ import annotations

import threading
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rave_jax.config import ConfigError
from rave_jax.data.sample import SampleError
from rave_jax.data.sources import HfParquet, parquet, tables
from tests.data.test_sources import png


def write(path: Path, first: int, count: int, rows: int = 3, **columns: object) -> None:
    numbers = range(first, first + count)
    made = {"question": [f"Q{n}" for n in numbers], "answer": [str(n) for n in numbers], **columns}
    pq.write_table(pa.table(made), path, row_group_size=rows)


def test_a_part_is_a_file_and_files_that_are_known_are_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "a.parquet", 0, 5)
    write(tmp_path / "b.parquet", 5, 7)
    first = HfParquet(str(tmp_path)).build()
    assert [(part.length, Path(part.data).name) for part in first.parts] == [(5, "a.parquet"), (7, "b.parquet")]
    footers = []
    footer = parquet._footer
    monkeypatch.setattr(parquet, "_footer", lambda where: footers.append(where.name) or footer(where))
    again = HfParquet(str(tmp_path)).build()
    assert (footers, again.parts, again.fingerprint) == ([], first.parts, first.fingerprint)
    write(tmp_path / "c.parquet", 12, 2)
    grown = HfParquet(str(tmp_path)).build()
    assert (footers, grown.parts[:2], grown[13].answers) == (["c.parquet"], first.parts, ("13",))
    assert grown.fingerprint != first.fingerprint
    write(tmp_path / "a.parquet", 1, 5)
    assert HfParquet(str(tmp_path)).build().parts[0] != first.parts[0]
    assert footers == ["c.parquet", "a.parquet"]
    with pytest.raises(SampleError, match=r"a\.parquet:0: .*No such file"):
        (tmp_path / "a.parquet").unlink()
        again[0]


@pytest.mark.parametrize(
    ("first", "other", "says"),
    [
        (pa.array(["A"]), pa.array([1]), "the column 'answer' holds int64, and in .*a.parquet it holds string"),
        (pa.array([["A"]]), pa.array([[1]]), "'answer' holds list<element: int64>, and in"),
        (pa.array(["A"]), pa.array(["A"], pa.large_string()), ""),
        (pa.array(["A"]), pa.array(["A"]).dictionary_encode(), ""),
        (pa.array(["A"]), pa.nulls(1), ""),
        (pa.array([1], pa.int8()), pa.array([1.5]), ""),
    ],
)
def test_files_have_one_kind_of_values_in_a_column(first: pa.Array, other: pa.Array, says: str, tmp_path: Path) -> None:
    for name, answer in (("a", first), ("b", other)):
        pq.write_table(pa.table({"question": ["Q"], "answer": answer}), tmp_path / f"{name}.parquet")
    if says:
        with pytest.raises(ConfigError, match=rf"b\.parquet: .*{says}"):
            HfParquet(str(tmp_path)).build()
    else:
        assert HfParquet(str(tmp_path)).build()[0].question == "Q"


def test_a_damaged_group_costs_its_own_rows_alone(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", 0, 4)
    path = tmp_path / "b.parquet"
    write(path, 4, 9)
    place = pq.read_metadata(path).row_group(1).column(0)
    data = bytearray(path.read_bytes())
    start = place.dictionary_page_offset or place.data_page_offset
    data[start : start + 40] = b"\xff" * 40
    path.write_bytes(data)
    source = HfParquet(str(tmp_path)).build()
    bad = []
    for n in range(len(source)):
        try:
            assert source[n].answers == (str(n),)
        except SampleError as error:
            assert f"b.parquet:{n - 4}: " in str(error) and "\n" not in str(error)
            bad.append(n)
    assert bad == [7, 8, 9]


def test_a_row_of_another_kind_far_down_is_one_bad_record(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", 0, 4)
    write(tmp_path / "b.parquet", 4, 9, image=[{"bytes": png(n), "path": None} for n in range(9)])
    questions = [f"Q{n}" for n in range(7)] + [None, "Q8"]
    write(tmp_path / "b.parquet", 4, 9, question=questions)
    source = HfParquet(str(tmp_path)).build()
    assert [source[n].question for n in (10, 12)] == ["Q6", "Q8"]
    with pytest.raises(SampleError, match=r"b\.parquet:7: no question"):
        source[11]


def test_groups_are_kept_up_to_a_number_and_a_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "a.parquet", 0, 12, rows=2)
    read: list[int] = []
    plain = parquet.ParquetFile.read
    monkeypatch.setattr(parquet.ParquetFile, "read", lambda file, *given: read.append(given[0]) or plain(file, *given))
    source = HfParquet(str(tmp_path), cached_groups=2).build()
    for n in (0, 1, 2, 0, 4, 2, 0):
        source[n]
    assert read == [0, 1, 2, 1, 0]
    monkeypatch.setattr(tables, "MOST_CACHED", 1)
    read.clear()
    source = HfParquet(str(tmp_path), cached_groups=6).build()
    for n in (0, 2, 0):
        source[n]
    assert read == [0, 1, 0]


def test_threads_read_a_group_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "a.parquet", 0, 6)
    source = HfParquet(str(tmp_path)).build()
    read, gate = [], threading.Barrier(4)
    plain = parquet.ParquetFile.read
    monkeypatch.setattr(parquet.ParquetFile, "read", lambda file, *given: read.append(given[0]) or plain(file, *given))

    def ask() -> None:
        gate.wait()
        assert [source[n].answers[0] for n in range(6)] == [*"012345"]

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(read) == [0, 1]


def test_a_file_that_is_replaced_while_it_is_used_is_named(tmp_path: Path) -> None:
    """Even by one with as many groups and rows."""
    write(tmp_path / "x.parquet", 0, 6)
    source = HfParquet(str(tmp_path / "x.parquet")).build()
    write(tmp_path / "x.parquet", 100, 6)
    with pytest.raises(SampleError, match="has changed since it was opened: put it back as it was"):
        source[0]

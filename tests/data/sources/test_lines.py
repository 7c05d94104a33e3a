"""JSON Lines: what the index says is what reading the file line by line gives, and it is made once."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rave_jax.config import ConfigError
from rave_jax.data import beside, flat, places
from rave_jax.data.sample import SampleError
from rave_jax.data.sources import QaJsonl, blocks, lines
from rave_jax.data.sources.blocks import digest, together
from rave_jax.data.sources.lines import JsonLines


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few bytes and records to a piece and a block, so that small files have many."""
    monkeypatch.setattr(lines, "CHUNK", 64)
    monkeypatch.setattr(blocks, "BLOCK", 4)
    monkeypatch.setattr(blocks, "LONGEST", 200)


def write(path: Path, numbers: range, mode: str = "a") -> None:
    with path.open(mode) as file:
        file.writelines(json.dumps({"question": f"Q{n}", "answer": str(n), "id": n}) + "\n" for n in numbers)


class Reads:
    """Counts the bytes that are read of files of data."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.bytes = 0
        plain = places._Local.read

        def read(file: places.File, start: int, length: int) -> bytes:
            found = plain(file, start, length)
            self.bytes += len(found)
            return found

        monkeypatch.setattr(places._Local, "read", read)


BLANK_OR_RECORD = st.sampled_from(
    ["", " ", "\t\r", '{"a": 1}', ' {"b": "\u00e4\u2028"} \r', '{"c": [' + "1, " * 90 + "1]}", "{"]
)


@given(st.lists(BLANK_OR_RECORD), st.booleans(), st.integers(1, 90))
def test_the_index_is_what_reading_line_by_line_gives(
    tmp_path_factory: pytest.TempPathFactory, rows: list[str], ended: bool, chunk: int
) -> None:
    path = tmp_path_factory.mktemp("lines") / "x.jsonl"
    data = "\n".join(rows).encode() + b"\n" * ended
    path.write_bytes(data)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lines, "CHUNK", chunk)
        found = JsonLines(path)
    expected = [(n, line.strip()) for n, line in enumerate(data.split(b"\n"), 1) if line.strip()]
    assert len(found) == len(expected)
    groups = [expected[n : n + 4] for n in range(0, max(1, len(expected)), 4)]
    prints = [digest(b"".join(line + b"\n" for _, line in group)).hexdigest() for group in groups]
    assert [part.fingerprint for part in found.parts] == prints
    assert (found.fingerprint, [part.length for part in found.parts]) == (together(prints), [*map(len, groups)])
    for index, (number, line) in enumerate(expected):
        assert found.where(index) == f"{path}:{number}"
        if line == b"{" or len(line) > 200:
            with pytest.raises(SampleError, match=rf"x\.jsonl:{number}: (not JSON|the record has)"):
                found[index]
        else:
            assert found[index] == json.loads(line)


def test_a_second_opening_reads_the_ends_of_the_file_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.jsonl"
    write(path, range(3000))
    first = JsonLines(path)
    reads = Reads(monkeypatch)
    again = JsonLines(path)
    assert reads.bytes < 4 * flat.END < path.stat().st_size
    assert (again.fingerprint, again.parts, len(again)) == (first.fingerprint, first.parts, 3000)
    assert again[2999] == first[2999]


def test_what_a_file_grew_by_is_read_and_the_old_parts_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.jsonl"
    write(path, range(2001))
    path.open("a").write("\n \n")
    before = JsonLines(path).parts
    write(path, range(2001, 2011))
    reads = Reads(monkeypatch)
    found = JsonLines(path)
    assert reads.bytes < path.stat().st_size / 4
    assert found.parts[:500] == before[:500] and found.parts[500] != before[500]
    (tmp_path / "whole.jsonl").write_bytes(path.read_bytes())
    whole = JsonLines(tmp_path / "whole.jsonl")
    assert found.fingerprint == whole.fingerprint
    assert [found[n]["id"] for n in range(2011)] == [*range(2011)]
    assert [found.where(n).rpartition(":")[2] for n in (2000, 2001, 2010)] == ["2001", "2004", "2013"]


def test_a_last_line_that_is_written_on_is_read_anew(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text('{"a": 1}\n' * 7 + '{"a": 2')
    assert len(JsonLines(path)) == 8
    path.open("a").write("3}\n{}\n")
    assert [JsonLines(path)[n] for n in (7, 8)] == [{"a": 23}, {}]


@pytest.mark.parametrize(
    "change", ["shorter", "other records and longer", "same size", "index", "no index", "other", "kind"]
)
def test_an_index_that_is_not_of_the_file_is_made_again(change: str, tmp_path: Path) -> None:
    path, index = tmp_path / "x.jsonl", tmp_path / beside.FOLDER / "x.jsonl.lines.index"
    write(path, range(100))
    JsonLines(path)
    old = index.read_bytes()
    if change == "shorter":
        write(path, range(50), "w")
    elif change == "other records and longer":
        write(path, range(100, 250), "w")
    elif change == "same size":
        write(path, range(1100, 1200), "w")
        write(path, range(100), "w")
        path.write_text(path.read_text().replace("Q1", "R1"))
    elif change == "index":
        index.write_bytes(old[:400] + bytes([old[400] ^ 1]) + old[401:])
    elif change == "kind":
        flat.keep(str(path), "tar", {"size": 1}, {})
        index.write_bytes((index.parent / "x.jsonl.tar.index").read_bytes())
    elif change == "no index":
        index.write_bytes(b"")
    else:
        write(tmp_path / "y.jsonl", range(7))
        JsonLines(tmp_path / "y.jsonl")
        index.write_bytes((index.parent / "y.jsonl.lines.index").read_bytes())
    expected = [json.loads(line) for line in path.read_text().splitlines()]
    found = JsonLines(path)
    assert [found[n] for n in range(len(found))] == expected
    (tmp_path / "z.jsonl").write_bytes(path.read_bytes())
    assert found.fingerprint == JsonLines(tmp_path / "z.jsonl").fingerprint
    assert index.read_bytes() == old or change not in ("index", "no index", "kind")


def test_a_file_of_the_same_size_and_time_is_told_by_its_ends(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text('{"a": 1}\n')
    time = path.stat().st_mtime_ns
    JsonLines(path)
    path.write_text('{"b": 2}\n')
    os.utime(path, ns=(time, time))
    assert JsonLines(path)[0] == {"b": 2}


def test_without_a_place_for_the_index_it_stays_in_memory_and_one_line_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def none(data: str) -> Path:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(flat, "folder_beside", none)
    write(tmp_path / "x.jsonl", range(9))
    assert JsonLines(tmp_path / "x.jsonl")[8]["id"] == 8
    assert [record.getMessage().partition(": ")[2] for record in caplog.records] == [
        "its index is not kept (Permission denied) and is made again by each run"
    ]


def test_a_line_that_is_far_too_long_is_one_bad_sample(tmp_path: Path) -> None:
    path = tmp_path / "qa.jsonl"
    write(path, range(5))
    path.open("a").write('{"question": "' + "x" * 5000 + '", "answer": "A"}\n')
    write(path, range(5, 9))
    source = QaJsonl(str(path)).build()
    assert [source[n].id for n in (4, 6, 9)] == ["4", "5", "8"] and len(source) == 10
    with pytest.raises(SampleError, match=r"qa\.jsonl:6: the record has 5,\d+ bytes, expected at most 200: give pict"):
        source[5]


def test_a_file_that_is_cut_while_it_is_used_is_named(tmp_path: Path) -> None:
    path = tmp_path / "qa.jsonl"
    write(path, range(50))
    source = QaJsonl(str(path)).build()
    os.truncate(path, 300)
    assert source[1].id == "1"
    with pytest.raises(SampleError, match=r"qa\.jsonl:50: the file became shorter while it was in use"):
        source[49]


@pytest.mark.parametrize(
    ("data", "says"),
    [
        ('[\n {"question": "Q"}\n]', "this is a JSON list: give its name the ending .json"),
        ('[{"question": "Q"},\n{"question": "R"}]', "this is a JSON list"),
        ('{"question": "Q"}\n{"question": "R"}\n', "this is UTF-16: save it as UTF-8"),
    ],
)
def test_what_is_no_json_lines_says_so(data: str, says: str, tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(data.encode("utf-16" if "UTF-16" in says else "utf-8"))
    with pytest.raises(ConfigError, match=rf"x\.jsonl: expected JSON Lines.*{says}"):
        JsonLines(path)


def test_an_empty_path_is_called_empty() -> None:
    with pytest.raises(ConfigError, match="path is empty, expected a file of records"):
        JsonLines("")

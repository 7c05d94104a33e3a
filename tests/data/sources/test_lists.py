"""A JSON list that is read by an index gives what `json.loads` gives, and is refused where that refuses it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from rave_jax.config import ConfigError
from rave_jax.data.sample import SampleError
from rave_jax.data.sources import LlavaJson, blocks, lists
from rave_jax.data.sources.blocks import digest
from rave_jax.data.sources.lists import JsonList, open_list

TEXTS = st.text(st.sampled_from('ab"\\[]{},:\n\u00e4\U0001f600')) | st.text(max_size=20)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | TEXTS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXTS, inner, max_size=4),
    max_leaves=20,
)


@pytest.fixture
def pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lists, "CHUNK", 16)
    monkeypatch.setattr(blocks, "BLOCK", 4)


def opened(data: bytes, folder: Path, chunk: int) -> Any:
    path = folder / "x.json"
    path.write_bytes(data)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lists, "CHUNK", chunk)
        patch.setattr(blocks, "BLOCK", 4)
        found = open_list(path)
        return found, found.parts


@given(
    st.lists(st.dictionaries(TEXTS, VALUES, max_size=3)), st.booleans(), st.sampled_from([None, 1]), st.integers(1, 40)
)
def test_records_are_those_of_json(
    tmp_path_factory: pytest.TempPathFactory, records: list[dict], ascii: bool, indent: int | None, chunk: int
) -> None:
    text = json.dumps(records, ensure_ascii=ascii, indent=indent)
    data = text.encode("utf-8", "surrogatepass")
    found, parts = opened(data, tmp_path_factory.mktemp("x"), chunk)
    assert [found[n] for n in range(len(found))] == records
    assert found.fingerprint == digest(data).hexdigest()
    assert sum(part.length for part in parts) == len(records)


@given(st.text(st.sampled_from('[]{},:"\\ 1a\n'), max_size=12).map(lambda t: f"[{t}"), st.integers(1, 5))
@example("[,]", 5)
@example("[{]}", 1)
@example('["\\\\", "\\""]', 1)
@example("[1] 2", 2)
def test_a_text_is_a_list_where_json_says_so(tmp_path_factory: pytest.TempPathFactory, text: str, chunk: int) -> None:
    try:
        expected = json.loads(text)
    except ValueError:
        with pytest.raises(ConfigError, match=r"x\.json: not JSON"):
            opened(text.encode(), tmp_path_factory.mktemp("x"), chunk)
        return
    try:
        found, _ = opened(text.encode(), tmp_path_factory.mktemp("x"), chunk)
    except ConfigError as error:
        assert "twice" in str(error)
        return
    assert len(found) == len(expected)


@pytest.mark.usefixtures("pieces")
@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "not JSON: Expecting value"),
        ('{"a": 1}\n{"a": 2}\n', "not JSON: Extra data.*JSON Lines, an object a line, belong in a file"),
        ('{"a": 1}', "holds dict, expected a list of records"),
        ('[{"a": 1}, {"a": 2', "not JSON: "),
        ('[{"a": 1, "a": 2}]', "not JSON: an object has the key 'a' twice"),
    ],
)
def test_what_is_no_list_says_so(text: str, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(ConfigError, match=rf"x\.json: {says}"):
        LlavaJson(str(tmp_path / "x.json")).build()
    monkeypatch.setattr(blocks, "LONGEST", len(text) - 1)  # a file that is too large to be parsed as a whole
    with pytest.raises(ConfigError, match=r"x\.json: not JSON: (expected a list|it is cut|the file is|record \d)"):
        LlavaJson(str(tmp_path / "x.json")).build()


@pytest.mark.usefixtures("pieces")
@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
def test_other_encodings_are_read(encoding: str, tmp_path: Path) -> None:
    (tmp_path / "x.json").write_bytes(json.dumps([{"a": "\u00e4"}, {}], ensure_ascii=False).encode(encoding))
    found = open_list(tmp_path / "x.json")
    assert [found[0], found[1], len(found)] == [{"a": "\u00e4"}, {}, 2]


@pytest.mark.usefixtures("pieces")
def test_a_record_that_is_far_too_long_is_one_bad_sample(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "LONGEST", 100)
    (tmp_path / "x.json").write_text(json.dumps([{"a": 1}, {"b": "[{" * 500}, {"c": 3}]))
    found = open_list(tmp_path / "x.json")
    assert (found[0], found[2], len(found)) == ({"a": 1}, {"c": 3}, 3)
    with pytest.raises(SampleError, match=r"x\.json\[1\]: the record has 1,0\d+ bytes, expected at most 100"):
        found[1]


def test_the_second_opening_parses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "x.json").write_text(json.dumps([{"a": n} for n in range(3000)]))
    first = open_list(tmp_path / "x.json")
    monkeypatch.setattr(lists, "_Scan", None)
    again = open_list(tmp_path / "x.json")
    assert isinstance(again, JsonList) and again.parts == first.parts and again[2999] == {"a": 2999}

"""Folders of `datasets`: rows of Arrow streams, read a batch at a time."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from rave_jax.config import ConfigError
from rave_jax.data.sample import SampleError
from rave_jax.data.sources import FieldIs, HfDataset, arrow
from tests.data.test_sources import png


def save(folder: Path, tables: Sequence[Any], batch: int = 3, **state: Any) -> str:
    """As `save_to_disk` of datasets lays a folder out."""
    folder.mkdir(parents=True)
    names = [f"data-{n:05}-of-{len(tables):05}.arrow" for n in range(len(tables))]
    for name, columns in zip(names, tables, strict=True):
        table = columns if isinstance(columns, pa.Table) else pa.table(columns)
        with pa.OSFile(str(folder / name), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table, max_chunksize=batch)
    files = [{"filename": name} for name in names]
    (folder / "state.json").write_text(json.dumps({"_data_files": files, "_split": "train", **state}))
    (folder / "dataset_info.json").write_text("{}")
    return str(folder)


def questions(first: int, count: int) -> dict[str, Any]:
    numbers = range(first, first + count)
    images = [{"bytes": png(n), "path": None} for n in numbers]
    return {"image": images, "question": [f"Q{n}" for n in numbers], "answer": [str(n) for n in numbers]}


def test_rows_are_those_of_the_files_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save(tmp_path / "set", [questions(0, 7), questions(7, 4)])
    source = HfDataset(path, cached_groups=2).build()
    assert (source.name, len(source), [part.length for part in source.parts]) == ("set", 11, [7, 4])
    for n in (10, 0, 6, 7, 3):
        assert (source[n].question, source[n].answers, source[n].images) == (f"Q{n}", (str(n),), (png(n),))
    monkeypatch.setattr(arrow, "_batches", None)
    again = HfDataset(path).build()
    assert (again.fingerprint, again.parts) == (source.fingerprint, source.parts)


@pytest.mark.parametrize("compression", ["lz4", "zstd"])
def test_compressed_batches_and_empty_ones_are_read(compression: str, tmp_path: Path) -> None:
    path = save(tmp_path / "set", [{"question": ["Q"], "answer": ["A"]}])
    table = pa.table({"question": ["Q" * 500] * 5, "answer": ["A"] * 5})
    options = pa.ipc.IpcWriteOptions(compression=compression)
    (file,) = (tmp_path / "set").glob("*.arrow")
    with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_stream(sink, table.schema, options=options) as writer:
        writer.write_batch(pa.RecordBatch.from_pylist([], table.schema))
        writer.write_table(table, max_chunksize=2)
    source = HfDataset(path).build()
    assert (len(source), source[4].question) == (5, "Q" * 500)


def test_the_number_of_a_class_is_read_as_its_name(tmp_path: Path) -> None:
    features = {"info": {"features": {"label": {"names": ["cat", "dog"], "_type": "ClassLabel"}}}}
    table = pa.table({"question": ["Q"] * 2, "label": [1, 0]}).replace_schema_metadata(
        {"huggingface": json.dumps(features)}
    )
    source = HfDataset(save(tmp_path / "set", [table])).build()
    assert [source[n].answers for n in range(2)] == [("dog",), ("cat",)]


def test_a_split_of_several(tmp_path: Path) -> None:
    save(tmp_path / "all/train", [questions(0, 2)])
    save(tmp_path / "all/test", [questions(5, 3)])
    (tmp_path / "all/dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    path = str(tmp_path / "all")
    assert len(HfDataset(path, split="test").build()) == 3
    with pytest.raises(ConfigError, match="split is '', expected one of train, test"):
        HfDataset(path).build()
    with pytest.raises(ConfigError, match=r"has no dataset_dict\.json: leave the split out"):
        HfDataset(f"{path}/train", split="train").build()


def test_rows_are_chosen_by_the_values_of_a_column(tmp_path: Path) -> None:
    columns = {**questions(0, 8), "kind": ["a", "b"] * 4}
    source = HfDataset(save(tmp_path / "set", [columns]), where=(FieldIs("kind", ("b",)),)).build()
    assert [source[n].id for n in range(len(source))] == ["1", "3", "5", "7"]


def test_folders_that_cannot_be_read_say_why(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no state\.json and no dataset_dict\.json there"):
        HfDataset(str(tmp_path / "nothing")).build()
    path = save(tmp_path / "chosen", [questions(0, 2)], _indices_data_files=[{"filename": "i.arrow"}])
    with pytest.raises(ConfigError, match=r"call flatten_indices\(\)"):
        HfDataset(path).build()
    encoded = {"question": pa.array(["Q"]).dictionary_encode(), "answer": ["A"]}
    with pytest.raises(ConfigError, match=r"data-.*arrow: .*it has columns of dictionaries"):
        HfDataset(save(tmp_path / "encoded", [encoded])).build()


@pytest.mark.parametrize("left", [0, 3, 100, -1, -300])
def test_a_truncated_file_is_refused_by_its_name(left: int, tmp_path: Path) -> None:
    path = save(tmp_path / "set", [questions(0, 4)])
    (file,) = (tmp_path / "set").glob("*.arrow")
    data = file.read_bytes()
    file.write_bytes(data[:left] if left >= 0 else data[: len(data) + left - 8])
    with pytest.raises(ConfigError, match=r"data-00000-of-00001\.arrow: expected an Arrow stream"):
        HfDataset(path).build()


def test_a_file_that_is_cut_while_it_is_used_is_one_bad_record(tmp_path: Path) -> None:
    path = save(tmp_path / "set", [questions(0, 9)])
    source = HfDataset(path, cached_groups=1).build()
    assert source[0].answers == ("0",)
    (file,) = (tmp_path / "set").glob("*.arrow")
    file.write_bytes(file.read_bytes()[:2000])
    with pytest.raises(SampleError, match=r"arrow:8: .*the file (became shorter|has changed)"):
        source[8]


def test_offsets_that_lead_out_of_a_batch_are_bad_records(tmp_path: Path) -> None:
    """Unseen they end the process."""
    path = save(tmp_path / "set", [pa.table({"question": ["A" * 9, "B" * 9], "answer": ["a", "b"]})])
    (file,) = Path(path).glob("*.arrow")
    offsets = np.array([0, 9, 18], np.int32).tobytes()
    data = file.read_bytes()
    assert data.count(offsets) == 1
    file.write_bytes(data.replace(offsets, np.array([0, 2**30, 18], np.int32).tobytes()))
    source = HfDataset(path).build()
    with pytest.raises(SampleError, match=r"\.arrow:0: "):
        source[0]


@pytest.mark.parametrize("rows", [-7, 2**40])
def test_a_batch_with_an_impossible_number_of_rows_is_damage(rows: int, tmp_path: Path) -> None:
    path = save(tmp_path / "set", [{"question": ["Q"] * 7919, "answer": ["A"] * 7919}], batch=7919)
    (file,) = Path(path).glob("*.arrow")
    found = np.array([7919], "<i8").tobytes()
    file.write_bytes(file.read_bytes().replace(found, np.array([rows], "<i8").tobytes()))
    with pytest.raises(ConfigError, match=r"\.arrow: .*it is damaged: the batch at byte [\d,]+ says that it has"):
        HfDataset(path).build()

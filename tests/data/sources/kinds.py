"""Each kind of source with six questions about pictures, for what has to hold of all of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from rave_jax.data.sources import HfDataset, HfParquet, ImageFolder, LlavaJson, QaJsonl, SourceConfig, WebDataset
from tests.data.sources.test_hf_dataset import save
from tests.data.sources.test_webdataset import write as write_tar
from tests.data.test_sources import png

COUNT = 6


def _records(folder: Path) -> list[dict[str, Any]]:
    for n in range(COUNT):
        (folder / f"{n}.png").write_bytes(png(n))
    return [
        {"id": n, "image": f"{n}.png", "question": f"Q{n}", "answer": str(n), "language": "de" if n % 2 else "en"}
        for n in range(COUNT)
    ]


def _talk(record: dict[str, Any]) -> dict[str, Any]:
    turns = [{"from": "human", "value": record["question"]}, {"from": "gpt", "value": record["answer"]}]
    return {"id": record["id"], "image": record["image"], "language": record["language"], "conversations": turns}


def lines(folder: Path) -> QaJsonl:
    (folder / "qa.jsonl").write_text("".join(json.dumps(record) + "\n" for record in _records(folder)))
    return QaJsonl(str(folder / "qa.jsonl"))


def listed(folder: Path) -> LlavaJson:
    (folder / "talk.json").write_text(json.dumps([_talk(record) for record in _records(folder)]))
    return LlavaJson(str(folder / "talk.json"))


def _columns(folder: Path) -> list[dict[str, Any]]:
    return [{**record, "image": {"bytes": png(record["id"]), "path": None}} for record in _records(folder)]


def parquet(folder: Path) -> HfParquet:
    rows = _columns(folder)
    for shard in range(2):
        pq.write_table(pa.Table.from_pylist(rows[3 * shard :][:3]), folder / f"{shard}.parquet", row_group_size=2)
    return HfParquet(str(folder))


def tars(folder: Path) -> WebDataset:
    for shard in range(2):
        members: dict[str, Any] = {}
        for record in _records(folder)[3 * shard :][:3]:
            n = record.pop("id")
            members |= {f"{n}.png": png(n), f"{n}.json": {**record, "image": "png"}}
        write_tar(folder / f"{shard}.tar", members)
    return WebDataset(str(folder / "{0,1}.tar"))


def dataset(folder: Path) -> HfDataset:
    rows = _columns(folder)
    return HfDataset(save(folder / "set", [pa.Table.from_pylist(rows[:3]), pa.Table.from_pylist(rows[3:])], batch=2))


def pictures(folder: Path) -> ImageFolder:
    rows = [{"file_name": record.pop("image"), **record} for record in _records(folder)]
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return ImageFolder(str(folder))


KINDS: dict[str, Callable[[Path], SourceConfig]] = {
    made.__name__: made for made in (lines, listed, parquet, tars, dataset, pictures)
}

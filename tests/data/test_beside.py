"""What is made from data lies beside it, or in the user's cache, and is whole or absent."""

from __future__ import annotations

from pathlib import Path
from typing import BinaryIO

import pytest

from rave_jax.data.beside import FOLDER, folder_beside, write_whole


def test_it_lies_in_a_folder_beside_the_data(tmp_path: Path) -> None:
    assert folder_beside(tmp_path / "train.jsonl") == tmp_path / FOLDER
    assert (tmp_path / FOLDER).is_dir()


@pytest.mark.parametrize("data", ["{tmp}/no/such/folder/train.jsonl", "gs://bucket/folder/train.jsonl"])
def test_where_nothing_can_be_written_it_lies_in_the_users_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, data: str
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    data = data.format(tmp=tmp_path)
    folder = folder_beside(data)
    assert folder.is_dir() and folder.parent == tmp_path / "cache" / "rave_jax"
    assert folder_beside(data.replace("train", "other")) == folder
    assert folder_beside(data.replace("folder/", "another/")) != folder


def test_a_file_that_is_not_written_to_its_end_is_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "index"
    write_whole(path, lambda file: file.write(b"first"))

    def fails(file: BinaryIO) -> None:
        file.write(b"half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_whole(path, fails)
    assert path.read_bytes() == b"first"
    assert list(tmp_path.iterdir()) == [path]

"""Folders that `datasets` saves with `save_to_disk`, read without that package."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, ClassVar

from rave_jax.config import ConfigError, require
from rave_jax.data.places import SCHEMES, Place, open_place, place
from rave_jax.data.sample import METRICS
from rave_jax.data.sources.arrow import ArrowFile
from rave_jax.data.sources.blocks import digest
from rave_jax.data.sources.filters import FieldIs
from rave_jax.data.sources.tables import TableSource


@dataclass(frozen=True)
class HfDataset:
    """Samples of a folder that `datasets` saved with `save_to_disk`."""

    path: str = ""
    """The folder, with a state.json or a dataset_dict.json. It may be a URL, gs://... or s3://..."""
    split: str = ""
    """Which split of a folder with several; empty where it has one."""
    image_column: str = ""
    """Column of an image or a list of images; empty to look for `images`, then `image`, then a column of pictures."""
    turns_column: str = ""
    """Column of a conversation; empty to look for `messages`, `conversations`, `texts`."""
    question_column: str = ""
    """Column of the question; empty to look for `question`, then `query`."""
    answer_column: str = ""
    """Column of the answer or answers; empty to look for `answers`, `answer`, `label`."""
    suffix: str = ""
    """Text added after every question of a question column."""
    metric: str = "exact_match"
    """How predictions are scored: exact_match, relaxed_accuracy or anls."""
    cached_groups: int = 8
    """Batches of rows kept in memory; `datasets` writes a thousand rows to a batch, and fewer with pictures."""
    name: str = ""
    """Name in tables; empty for the folder's name."""
    ignored: tuple[str, ...] = ()
    """Columns, and keys of turns and parts, that are left out: nothing is learned from them."""
    where: tuple[FieldIs, ...] = ()
    """Which rows are used; all of these hold. Empty for every row."""

    url_schemes: ClassVar = tuple(SCHEMES)

    def __post_init__(self) -> None:
        require(self.cached_groups >= 1, "cached_groups", self.cached_groups, "at least 1")
        require(self.metric in METRICS, "metric", self.metric, f"one of {', '.join(METRICS)}")

    def build(self) -> TableSource:
        """The source.

        Raises:
            ConfigError: no such folder or split, a file of it that is damaged, no known set of columns, or a column
                that would pass unread.
        """
        if not self.path:
            raise ConfigError("path is empty, expected a folder that `datasets` saved with save_to_disk")
        folder = _split(place(self.path), self.split)
        files = [ArrowFile(folder / name) for name in _names(folder)]
        fingerprint = digest("\n".join(file.fingerprint for file in files).encode()).hexdigest()
        return TableSource(self, files, fingerprint, place(self.path).resolve().name)


def _split(folder: Place, split: str) -> Place:
    """The folder of a split."""
    found = _json(folder / "dataset_dict.json")
    if found is None:
        if split:
            raise ConfigError(f"split is {split!r}, but {folder} has no dataset_dict.json: leave the split out")
        return folder
    splits = found.get("splits") or []
    if not split and len(splits) == 1:
        return folder / splits[0]
    if split not in splits:
        raise ConfigError(f"split is {split!r}, expected one of {', '.join(splits)}, which {folder} has")
    return folder / split


def _names(folder: Place) -> list[str]:
    """Names of the files of a data set, in order."""
    state = _json(folder / "state.json")
    if state is None:
        raise ConfigError(
            f"{str(folder)!r}: no state.json and no dataset_dict.json there: expected a folder that `datasets` saved "
            "with save_to_disk (HfParquet reads folders of parquet files)"
        )
    if state.get("_indices_files") or state.get("_indices_data_files"):
        raise ConfigError(
            f"{folder}: rows are chosen by a file of indices, which is not read: call flatten_indices() and save "
            "it again"
        )
    try:
        names = [str(each["filename"]) for each in state["_data_files"]]
    except (KeyError, TypeError) as error:
        raise ConfigError(f"{folder / 'state.json'}: no list of files under '_data_files'") from error
    if not names:
        raise ConfigError(f"{folder}: the data set has no file, so no row")
    return names


def _json(path: Place) -> dict[str, Any] | None:
    """The object in a small file; None where there is no such file."""
    try:
        file = open_place(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from error
    try:
        found = json.loads(b"".join(file.chunks()))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: not JSON: {error}") from error
    finally:
        file.close()
    if not isinstance(found, dict):
        raise ConfigError(f"{path}: holds {type(found).__name__}, expected an object")
    return found

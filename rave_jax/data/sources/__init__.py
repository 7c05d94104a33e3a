"""Where samples come from. A source config says where; its `build()` gives a `Source`, samples by index."""

from __future__ import annotations

from rave_jax.data.sources.filters import FieldIs
from rave_jax.data.sources.hf_dataset import HfDataset
from rave_jax.data.sources.image_folder import ImageFolder
from rave_jax.data.sources.llava import LlavaJson
from rave_jax.data.sources.parquet import HfParquet
from rave_jax.data.sources.qa import QaJsonl
from rave_jax.data.sources.webdataset import WebDataset
from rave_jax.data.synthetic import Synthetic

SourceConfig = LlavaJson | HfParquet | QaJsonl | WebDataset | HfDataset | ImageFolder | Synthetic
"""Any source a config may name."""

__all__ = [
    "FieldIs",
    "HfDataset",
    "HfParquet",
    "ImageFolder",
    "LlavaJson",
    "QaJsonl",
    "SourceConfig",
    "Synthetic",
    "WebDataset",
]

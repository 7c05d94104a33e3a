"""Where samples come from. A source config says where; its `build()` gives a `Source`, samples by index."""

from __future__ import annotations

from rave_jax.data.sources.filters import FieldIs
from rave_jax.data.sources.llava import LlavaJson
from rave_jax.data.sources.parquet import HfParquet
from rave_jax.data.sources.qa import QaJsonl
from rave_jax.data.synthetic import Synthetic

SourceConfig = LlavaJson | HfParquet | QaJsonl | Synthetic
"""Any source a config may name."""

__all__ = ["FieldIs", "HfParquet", "LlavaJson", "QaJsonl", "SourceConfig", "Synthetic"]

"""Configs that docs/data.md shows can be made, saved and read back."""

from __future__ import annotations

import re
from pathlib import Path

from rave_jax.config import check_paths, dumps, loads
from rave_jax.data import config, sources
from rave_jax.data.config import DataConfig
from rave_jax.data.sources import SourceConfig

PAGE = Path(__file__).parents[3] / "docs/data.md"


def test_configs_of_the_page_can_be_made_and_saved() -> None:
    blocks = re.findall(r"```python\n(DataConfig.*?)```", PAGE.read_text(), re.DOTALL)
    assert len(blocks) >= 2
    for block in blocks:
        made = eval(block, {**vars(sources), **vars(config)})
        check_paths(made)
        assert loads(DataConfig, dumps(made)) == made


def test_every_source_is_in_the_table() -> None:
    table = PAGE.read_text().partition("## Shapes of records")[0]
    for kind in SourceConfig.__args__:
        assert f"| `{kind.__name__}(" in table

"""The Python of the pages runs as it stands, block after block, on a tiny model."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from PIL import Image

from rave_jax.checkpoint.tiny import write_tiny
from tests.tools.test_cli import SMALL

REPO = Path(__file__).resolve().parents[2]
PAGES = ("api.md", "generation.md")
BLOCK = re.compile(r"^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the model and the picture that the pages name."""
    folder = tmp_path_factory.mktemp("pages")
    write_tiny(folder / "exported", SMALL)
    Image.new("RGB", (84, 56), (200, 30, 30)).save(folder / "cell.png")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES)
def test_the_blocks_of_a_page_run(
    page: str, home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(home)
    text = (REPO / "docs" / page).read_text()
    names: dict[str, object] = {"__name__": "__main__"}
    blocks = list(BLOCK.finditer(text))
    for block in blocks:
        line = text[: block.start(1)].count("\n")
        # Errors then name the page and its line.
        exec(compile("\n" * line + block[1], str(REPO / "docs" / page), "exec"), names)
        assert capsys.readouterr().out, f"{page}:{line}: the block prints nothing"
    assert blocks

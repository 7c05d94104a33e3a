"""What linters do not count: how often they are told to look away."""

from __future__ import annotations

import io
import re
import tokenize
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[2]
FILES = [p for d in ("rave_jax", "configs", "tests", "benchmarks") for p in (REPO / d).rglob("*.py")]
FILES += list(REPO.glob("*.py"))
PACKAGE = [p for p in FILES if p.is_relative_to(REPO / "rave_jax")]
IGNORE = re.compile(r"#\s*(noqa|ty:\s*ignore|type:\s*ignore|ruff:\s*noqa|pyright:)")


def comments(path: Path) -> list[str]:
    with io.StringIO(path.read_text(encoding="utf-8")) as lines:
        return [t.string for t in tokenize.generate_tokens(lines.readline) if t.type == tokenize.COMMENT]


def test_linters_are_told_to_look_away_at_most_five_times() -> None:
    ignores = [f"{p.relative_to(REPO)}: {c}" for p in FILES for c in comments(p) if IGNORE.search(c)]
    assert len(ignores) <= 5, "\n".join(ignores)
    assert [line for line in ignores if "noqa" in line and "noqa:" not in line] == [], "an ignore names its rule"


def test_nothing_is_left_to_do() -> None:
    marker = re.compile(r"\b(TODO|FIXME|XXX|HACK)\b")
    assert [f"{p.relative_to(REPO)}: {c}" for p in FILES for c in comments(p) if marker.search(c)] == []


def test_parity_has_a_folder() -> None:
    """CI looks nowhere else for it."""
    marked = [p for p in FILES if re.search(r"mark\.parity\b", p.read_text(encoding="utf-8"))]
    assert marked and all(p.is_relative_to(REPO / "tests" / "parity") for p in marked)


@pytest.mark.parametrize("path", PACKAGE, ids=lambda p: str(p.relative_to(REPO)))
def test_a_module_says_what_it_is_and_stays_short(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert text.startswith('"""'), "a module starts with a sentence about what it is"
    assert len(text.splitlines()) <= 500
    assert "utils" not in path.stem and "helpers" not in path.stem

"""No file names a model family but those of its own folder, the registry and what is not of the package."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

from rave_jax.families import FAMILIES
from tests.contracts.test_imports import imports

PACKAGE = Path(__file__).resolve().parents[2] / "rave_jax"
REGISTRY = PACKAGE / "families/__init__.py"
SHARED = {"shared"}  # what several families share, and no family itself
FOLDERS = [path.parent for path in (PACKAGE / "families").glob("*/__init__.py") if path.parent.name not in SHARED]
# Beginnings of names: of folders, of `model_type`s and of classes in transformers.
NAMES = sorted({re.split(r"[\d_]", name.lower())[0] for name in (*FAMILIES, *(folder.name for folder in FOLDERS))})


def words(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, text) of every name and string of a program. Comments and docstrings may cite."""
    documents = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        line = getattr(node, "lineno", 0)
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in documents:
            yield line, node.value
        for name in ("id", "attr", "name", "module", "arg", "asname"):
            if isinstance(value := getattr(node, name, None), str):
                yield line, value


FORMAT = re.compile("LlavaJson|LlavaSource|data.sources.llava")
"""A format of conversations has the name of the first model that read it."""


def naming(path: Path) -> list[str]:
    """Where a file names a family."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found = [(line, FORMAT.sub("", text)) for line, text in words(tree)]
    return [f"{path.name}:{line}: {text:.60}" for line, text in found if any(name in text.lower() for name in NAMES)]


def test_no_other_file_names_a_family() -> None:
    others = [p for p in PACKAGE.rglob("*.py") if p != REGISTRY and not any(p.is_relative_to(f) for f in FOLDERS)]
    assert len(others) > 100
    assert [line for path in others for line in naming(path)] == []


def test_the_check_sees_what_it_should(tmp_path: Path) -> None:
    path = tmp_path / "a.py"
    path.write_text('"""As in Qwen."""\nfrom x import qwen3\nb = c.Qwen2Tower  # Qwen\nd = {"qwen2_5_vl": 1}\n')
    assert [line.split(":")[1] for line in naming(path)] == ["2", "3", "4"]


def test_no_family_imports_another() -> None:
    """What two of them share stands outside both."""
    for folder in FOLDERS:
        others = [f"rave_jax.families.{other.name}" for other in FOLDERS if other != folder]
        named = [
            f"{path.relative_to(PACKAGE)}:{line}: {module}"
            for path in folder.rglob("*.py")
            for line, module in imports(path)
            if any(module == other or module.startswith(f"{other}.") for other in others)
        ]
        assert named == []


def test_every_folder_is_registered_under_its_name() -> None:
    assert sorted(folder.name for folder in FOLDERS) == sorted(FAMILIES)

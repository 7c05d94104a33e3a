"""Imports go one way. The table below is the map of the house; the syntax trees of all files are held to it."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[2]
PACKAGE = REPO / "rave_jax"
GROUND = {"typing", "open_union", "config", "files", "batch", "layout"}
MODEL = GROUND | {"families", "parallel", "kernels", "attention", "models"}
AFTER_MODEL = MODEL | {"checkpoint", "inference", "data"}

# Part of rave_jax -> the other parts it may import. A family's `tower` is a part of its own, "towers": it imports jax.
PARTS: dict[str, set[str]] = {
    "__init__": {"api", "config", "data", "inference"},  # for the type checker; a name is imported at its first use
    "typing": set(),
    "open_union": set(),
    "config": {"open_union"},
    "files": set(),
    "command_line": {"open_union", "config"},
    "batch": {"typing"},
    "layout": {"typing", "config"},
    "observe": set(),
    "families": GROUND,
    "data": GROUND | {"families"},
    "parallel": GROUND,
    "kernels": GROUND | {"parallel"},
    "attention": GROUND | {"parallel", "kernels"},
    "models": GROUND | {"families", "parallel", "kernels", "attention"},
    "towers": MODEL,
    "checkpoint": MODEL | {"observe", "data"},
    "inference": MODEL | {"data"},
    "look": AFTER_MODEL | {"observe"},
    "evaluation": AFTER_MODEL | {"look", "observe"},
    "training": AFTER_MODEL | {"look", "evaluation", "observe"},
    "api": AFTER_MODEL | {"look", "tools"},
    "study": AFTER_MODEL | {"look", "evaluation", "training", "observe"},
    "plan": AFTER_MODEL | {"training", "observe"},
    "tools": AFTER_MODEL | {"command_line", "look", "evaluation", "training", "study", "observe", "plan"},
}

# Libraries that only these parts may import. What is not named here and declared in pyproject.toml is free.
# Paths with a dot name one library module and whatever lies below it.
ONLY: dict[str, set[str]] = {
    # typing: for the type checker alone
    "jax": {*PARTS} - GROUND - {"__init__", "command_line", "families", "data", "observe"} | {"typing"},
    "flax": {
        "parallel",
        "attention",
        "models",
        "towers",
        "checkpoint",
        "inference",
        "evaluation",
        "look",
        "training",
        "study",
        "tools",
    },
    "optax": {"training"},
    "orbax": {"checkpoint", "parallel"},
    "transformers": {"data"},
    "tokenizers": {"data", "checkpoint"},
    "safetensors": set(),  # we read and write the format ourselves, straight into shards
    "pyarrow": {"data"},
    "PIL": {"families", "data", "look", "evaluation", "tools"},
    "sklearn": {"data"},
    "tyro": {"command_line"},
    "grain": {"data"},
    "absl": {"data"},
    "jaxtyping": {"typing"},
    "tensorboardX": {"observe"},
    "matplotlib": {"look"},
    "rich": {"observe", "training", "tools", "evaluation"},
    "scipy": {"evaluation"},
    "torch": set(),
    "tokamax": set(),
}

# Import name -> distribution, where they differ.
DISTRIBUTIONS = {"absl": "absl-py", "PIL": "pillow", "sklearn": "scikit-learn", "orbax": "orbax-checkpoint"}


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """(line, module) of every import in a file, wherever it stands. `from a import b` gives `a` and `a.b`."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = "." * node.level + (node.module or "")
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)


def part_of(path: Path) -> str:
    return part_named(list(path.relative_to(PACKAGE).with_suffix("").parts))


def part_named(names: list[str]) -> str:
    """The part that a module belongs to, from its names behind `rave_jax`."""
    if not names:
        return "__init__"
    return "towers" if names[0] == "families" and "tower" in names[2:4] else names[0]


def faults_of_file(path: Path, part: str) -> Iterator[str]:
    """What a file of `part` imports and may not."""
    for line, module in imports(path):
        where = f"{path.name}:{line}"
        names = module.split(".")
        if module.startswith("."):
            yield f"{where}: {module} is relative; imports are absolute"
        elif names[0] == "rave_jax":
            target = part_named(names[1:])
            if target != part and target in PARTS and target not in PARTS[part]:
                yield f"{where}: {part} must not import rave_jax.{target}"
        elif names[0] in ONLY and part not in ONLY[names[0]]:
            yield f"{where}: {part} must not import {names[0]}"


SOURCES = sorted(PACKAGE.rglob("*.py"))


def test_every_part_is_on_the_map() -> None:
    assert {part_of(path) for path in SOURCES} <= set(PARTS)


def test_the_map_has_no_circle() -> None:
    order: list[str] = []
    while len(order) < len(PARTS):
        free = [part for part in PARTS if part not in order and PARTS[part] <= set(order)]
        assert free, f"a circle among {set(PARTS) - set(order)}"
        order += free


@pytest.mark.parametrize("part", sorted(PARTS))
def test_imports_go_one_way(part: str) -> None:
    files = [path for path in SOURCES if part_of(path) == part]
    assert [fault for path in files for fault in faults_of_file(path, part)] == []


def test_the_check_sees_what_it_should(tmp_path: Path) -> None:
    wrong = tmp_path / "wrong.py"
    wrong.write_text(
        "def f():\n    import jax.numpy as jnp\nfrom rave_jax.models.vlm import Vlm\nfrom rave_jax import training\n"
        "from . import x\nimport torch\nfrom rave_jax.batch import Batch\nimport numpy\n"
    )
    assert list(faults_of_file(wrong, "data")) == [
        "wrong.py:3: data must not import rave_jax.models",
        "wrong.py:4: data must not import rave_jax.training",
        "wrong.py:5: ..x is relative; imports are absolute",
        "wrong.py:6: data must not import torch",
        "wrong.py:2: data must not import jax",
    ]


def test_torch_is_imported_by_reference_scripts_alone() -> None:
    files = [p for folder in ("tests", "benchmarks", "configs") for p in (REPO / folder).rglob("*.py")]
    files += [*REPO.glob("*.py"), *SOURCES]
    having = [p for p in files if any(module.split(".")[0] == "torch" for _, module in imports(p))]
    allowed = [p for p in having if p.name.endswith("_torch.py") and REPO / "rave_jax" not in p.parents]
    assert having == allowed


def test_programs_and_configs_import_the_package_downward() -> None:
    """configs/ and the two programs may use any part; the package never imports them."""
    outside = {"configs", "tests", "benchmarks", "train", "eval", "bootstrap"}
    assert [f"{p}:{line}" for p in SOURCES for line, module in imports(p) if module.split(".")[0] in outside] == []


def test_every_library_is_declared_and_every_declared_one_is_used() -> None:
    project = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]
    declared = {re.split(r"[^\w-]", requirement, maxsplit=1)[0].lower() for requirement in project["dependencies"]}
    used = {module.split(".")[0] for p in SOURCES for _, module in imports(p) if not module.startswith(".")}
    used -= {*sys.stdlib_module_names, "rave_jax"}
    assert {DISTRIBUTIONS.get(name, name).lower() for name in used} == declared


def test_data_and_families_do_not_bring_jax_in() -> None:
    """A loader worker that forks after jax has started threads can hang; importing what it reads with must not start
    any."""
    import subprocess

    names = [
        ".".join(("rave_jax", *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__")
        for path in SOURCES
        if part_of(path) in ("data", "families")
    ]
    assert "rave_jax.families" in names
    code = f"import importlib, sys\nfor name in {names}: importlib.import_module(name)\nsys.exit('jax' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr or "importing rave_jax.data or rave_jax.families imported jax"

"""Parameter names that earlier versions wrote into checkpoints, read as today's.

Runs of equal layers were called segments: `decoder.segments.0.layers...` is `decoder.layer_runs.0.layers...`.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import jax

_OLD = re.compile(r"^(decoder|vision)\.segments\.")
_NEW = re.compile(r"^(decoder|vision)\.layer_runs\.")


def new_name(path: str) -> str:
    """Today's name of a parameter."""
    return _OLD.sub(r"\1.layer_runs.", path)


def old_name(path: str) -> str:
    """The name that earlier versions gave a parameter."""
    return _NEW.sub(r"\1.segments.", path)


def has_old_names(tree: Any) -> bool:
    """Does a tree of a checkpoint hold parameters under the names of earlier versions?"""
    paths = (path for path, _ in jax.tree_util.tree_flatten_with_path(tree)[0])
    return any(_OLD.match(str(getattr(key, "key", ""))) for path in paths for key in path)


def renamed(tree: Any, name: Callable[[str], str]) -> Any:
    """The tree with `name` applied to every key of its dicts."""
    if isinstance(tree, dict):
        return {name(key) if isinstance(key, str) else key: renamed(value, name) for key, value in tree.items()}
    if isinstance(tree, tuple):
        values = [renamed(value, name) for value in tree]
        return type(tree)(*values) if hasattr(tree, "_fields") else tuple(values)
    return [renamed(value, name) for value in tree] if isinstance(tree, list) else tree

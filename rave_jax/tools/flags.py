"""Command-line flags made from dataclasses, so that a default or a help text is written once."""

from __future__ import annotations

import argparse
import dataclasses
import typing
from collections.abc import Iterable, Mapping
from types import NoneType, UnionType
from typing import Any, Literal

from rave_jax.config import field_docs


def add_fields(
    parser: argparse.ArgumentParser,
    cls: Any,
    title: str,
    names: Iterable[str] | None = None,
    notes: Mapping[str, str] | None = None,
) -> None:
    """A flag for each field: a number, a string (or None), one of some; a tuple is a flag that may come several times.

    Args:
        parser: gets the flags.
        cls: a dataclass whose fields have defaults.
        title: over the flags in the help.
        names: the fields to take, in this order; None is all.
        notes: what the help says of a default, where it is not the field's.
    """
    group = parser.add_argument_group(title)
    fields = {f.name: f for f in dataclasses.fields(cls)}
    docs, hints = field_docs(cls), typing.get_type_hints(cls)
    for name in names or fields:
        kind, default = hints[name], fields[name].default
        rest: dict[str, Any] = {"type": kind, "metavar": name.rsplit("_", 1)[-1].upper()}
        note = f"default: {default}"
        if typing.get_origin(kind) is tuple:
            rest |= {"type": typing.get_args(kind)[0], "action": "append"}
            note = "may be given several times"
        elif typing.get_origin(kind) is Literal:
            rest = {"choices": typing.get_args(kind)}
        elif typing.get_origin(kind) is UnionType:
            # A flag that is not given leaves None.
            (rest["type"],) = (part for part in typing.get_args(kind) if part is not NoneType)
        text = f"{docs[name]} ({(notes or {}).get(name, note)})".replace("%", "%%")
        group.add_argument(f"--{name.replace('_', '-')}", dest=name, help=" ".join(text.split()), **rest)


def given_fields(arguments: argparse.Namespace, cls: Any) -> dict[str, Any]:
    """The fields of a dataclass that the command line states."""
    found = {f.name: getattr(arguments, f.name, None) for f in dataclasses.fields(cls)}
    return {name: tuple(x) if isinstance(x, list) else x for name, x in found.items() if x is not None}

"""Configuration machinery: strict JSON in and out, field docs, config files.

A config is a tree of frozen dataclasses. Leaves are bool, int, float, str, None, literals and tuples of
those; a field that may hold one of several dataclasses (a union) carries a `type` tag in JSON. A union may be
open to classes of a user's own (`rave_jax/open_union.py`). Help text is the string literal under a field. What
a config *means* lives beside the code it configures.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import functools
import inspect
import itertools
import json
import re
import reprlib
import sys
import textwrap
import types
import typing
from pathlib import Path
from typing import Any, Literal, Union

from rave_jax import open_union

TAG = "type"


class ConfigError(ValueError):
    """A config that cannot be used. The message names the field, what was given and what was expected."""


def require(condition: bool, field: str, given: object, expected: str) -> None:
    """Raise ConfigError unless `condition` holds; for use in `__post_init__`."""
    if not condition:
        raise ConfigError(f"{field} is {shown(given)}, expected {expected}")


class _Short(reprlib.Repr):
    def repr_bytes(self, value: bytes, level: int) -> str:
        return repr(value) if len(value) <= MOST_BYTES else f"{value[:MOST_BYTES]!r}... of {len(value)} bytes"


MOST_BYTES = 40
MOST_SHOWN = 1500
_short = _Short(maxlevel=6, maxstring=200, maxother=1000, maxlist=40, maxtuple=40, maxdict=40, maxlong=500)


def shown(value: object) -> str:
    """A value as an error shows it: in a line of readable length, however large or deeply nested it is."""
    text = _short.repr(value)
    return text if len(text) <= MOST_SHOWN else f"{text[:MOST_SHOWN]}..."


_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/")


def local_path(path: str | Path, field: str) -> Path:
    """The path, of a file or folder that this machine's file system holds.

    Raises:
        ConfigError: it names a bucket or another place by scheme (`gs://`, `s3://`, ...), which would become a local
            folder called `gs:`.
    """
    found = _SCHEME.match(str(path))
    # `Path("gs://x")` is `gs:/x` already. A folder that is really called so is one.
    if found and ("://" in str(path) or not Path(f"{found[1]}:").is_dir()):
        scheme = found[1]
        hint = "leave file:// away" if scheme.lower() == "file" else f"copy it, or mount the {scheme}:// bucket"
        raise ConfigError(f"{field} is {str(path)!r}, expected a path of a file system; {hint}")
    return Path(path)


def check_paths(config: Any, where: str = "") -> None:
    """Raise ConfigError where a field of a config, or of one inside it, names a place that is not a local path.

    Paths are the texts in fields whose names end in `path` or `dir`. A config whose class has `url_schemes` takes URLs
    of those schemes too.
    """
    schemes = getattr(type(config), "url_schemes", ())
    for f in dataclasses.fields(config):
        value, field = getattr(config, f.name), f"{where}{f.name}"
        items = enumerate(value) if isinstance(value, tuple) else [(None, value)]
        for number, item in items:
            name = field if number is None else f"{field}.{number}"
            if dataclasses.is_dataclass(item) and not isinstance(item, type):
                check_paths(item, f"{name}.")
            elif isinstance(item, str) and f.name.endswith(("path", "dir")) and _scheme(item) not in schemes:
                local_path(item, name)


def _scheme(text: str) -> str:
    return text.partition("://")[0]


def check_ranges(config: Any, **ranges: tuple[float, float]) -> None:
    """Raise ConfigError unless each named field of a dataclass is None or within its (least, most), ends included.

    For sizes and counts: what is far beyond any machine is refused by its field before memory is asked for it.
    """
    for name, (least, most) in ranges.items():
        given = getattr(config, name)
        # A bool is a number to Python, and never a size.
        number = isinstance(given, (int, float)) and not isinstance(given, bool)
        require(given is None or (number and least <= given <= most), name, given, f"a number from {least} to {most}")


def check_fields(config: Any) -> None:
    """Raise ConfigError unless every field of a dataclass holds a value of its declared type, numbers finite.

    For the start of `__post_init__`, so that what follows compares what can be compared. JSON and the command line are
    checked on their way in; this is for configs written in Python, where nothing else reads the annotations.
    """
    hints = _field_types(type(config))
    for f in dataclasses.fields(config):
        given = getattr(config, f.name)
        require(_fits(hints[f.name], given), f.name, given, in_words(hints[f.name]))


@functools.cache
def _field_types(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def _fits(kind: Any, value: Any) -> bool:
    """Is the value one of this type? An integer is a number too, but True is neither."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin in (Union, types.UnionType):
        return any(_fits(option, value) for option in args)
    if origin is Literal:
        return any(type(value) is type(option) and value == option for option in args)
    if origin is tuple:
        if not isinstance(value, tuple):
            return False
        kinds = args[:1] * len(value) if args[1:] == (Ellipsis,) else args
        return len(kinds) == len(value) and all(map(_fits, kinds, value))
    if kind in (int, float):
        number = isinstance(value, int if kind is int else (int, float)) and not isinstance(value, bool)
        return number and (kind is int or abs(value) <= sys.float_info.max)
    return isinstance(value, kind)


def in_words(kind: Any) -> str:
    """What a field of this type takes."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin in (Union, types.UnionType):
        return " or ".join(map(in_words, args))
    if origin is Literal:
        return ("one of " if len(args) > 1 else "") + ", ".join(map(repr, args))
    if origin is tuple:
        items = [in_words(item) for item in args if item is not Ellipsis]
        return f"a tuple, each item {items[0]}" if Ellipsis in args else f"a tuple of {', '.join(items)}"
    if open_union.is_union(kind):
        named = " or ".join(f"a {member.__name__}" for member in open_union.members(kind))
        return f"{named}, or of a class of your own that derives from {kind.__name__}"
    return {int: "an integer", float: "a finite number", type(None): "None"}.get(kind, f"a {kind.__name__}")


def to_json(value: Any) -> Any:
    """A config as JSON-ready data. Every dataclass carries its class name under `type`, one of a user's own where it is
    found again (`open_union.saved_name`).

    Raises:
        ConfigError: a class of a user's own could not be found again.
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: to_json(getattr(value, f.name)) for f in dataclasses.fields(value)}
        return {TAG: _tag(type(value)), **fields}
    if isinstance(value, (tuple, list)):
        return [to_json(item) for item in value]
    return value


def _tag(cls: type) -> str:
    if not issubclass(cls, open_union.OpenUnion):
        return cls.__name__
    against = open_union.against_saving(cls)
    if against is not None:
        raise ConfigError(f"the class {cls.__name__} could not be found again by who reads a saved config: {against}")
    return open_union.saved_name(cls)


def without_folders(data: Any) -> Any:
    """What `to_json` gave, without the folders of files that classes of a user's own are defined in: equal for equal
    configs, wherever a copy of the file lies."""
    if isinstance(data, dict):
        short = {TAG: open_union.without_folder(data[TAG])} if isinstance(data.get(TAG), str) else {}
        return {key: without_folders(value) for key, value in data.items()} | short
    return [without_folders(item) for item in data] if isinstance(data, list) else data


def differing(where: str, old: Any, new: Any, before: str = "was") -> list[str]:
    """Where two values of `to_json` differ, each as `FIELD is NEW, was OLD`.

    Args:
        where: name of the whole.
        old, new: the values.
        before: stands for `was`.
    """
    if old == new:
        return []
    if isinstance(old, dict) and isinstance(new, dict) and old.get(TAG) == new.get(TAG):
        both = [(f"{where}.{key}", old.get(key), new.get(key)) for key in old | new]
        return [line for name, *pair in both for line in differing(name, *pair, before)]
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        pairs = enumerate(zip(old, new, strict=True))
        return [line for number, pair in pairs for line in differing(f"{where}.{number}", *pair, before)]
    return [f"{where} is {_in_brief(new)}, {before} {_in_brief(old)}"]


def _in_brief(value: Any) -> str:
    if isinstance(value, dict) and TAG in value:
        fields = ", ".join(f"{key}={_in_brief(item)}" for key, item in value.items() if key != TAG)
        return f"{value[TAG]}({fields})"
    return f"[{', '.join(map(_in_brief, value))}]" if isinstance(value, list) else repr(value)


def from_json(cls: Any, data: Any, where: str = "config") -> Any:
    """The inverse of `to_json`, strict.

    Args:
        cls: a dataclass or any type a config field may have.
        data: what `json.loads` gave.
        where: path of `data` in the whole config, for messages.

    Raises:
        ConfigError: unknown or missing key, unknown type tag, a class of a user's own that is not found, or a value of
            another type.
    """
    origin, args = typing.get_origin(cls), typing.get_args(cls)
    if origin is typing.Annotated:
        return from_json(args[0], data, where)
    if dataclasses.is_dataclass(cls):
        return _dataclass_from_json(cls, data, where)
    if origin in (Union, types.UnionType):
        return _union_from_json(args, data, where)
    if open_union.is_union(cls):
        return _member_from_json(cls, data, where)
    if origin is Literal:
        same = any(data == arg and type(data) is type(arg) for arg in args)  # True == 1, and is not meant
        require(same, where, data, f"one of {', '.join(map(repr, args))}")
        return data
    if origin is tuple:
        require(isinstance(data, list), where, data, "a list")
        variadic = len(args) == 2 and args[1] is Ellipsis
        kinds = [args[0]] * len(data) if variadic else list(args)
        require(len(kinds) == len(data), where, data, f"{len(kinds)} items")
        return tuple(
            from_json(kind, item, f"{where}.{i}") for i, (kind, item) in enumerate(zip(kinds, data, strict=True))
        )
    if cls is float:
        require(isinstance(data, (int, float)) and not isinstance(data, bool), where, data, "a number")
        try:
            return float(data)
        except OverflowError:
            raise ConfigError(f"{where} is too large an integer, expected a number of at most 1.8e308") from None
    if cls is type(None):
        require(data is None, where, data, "null")
        return None
    require(type(data) is cls, where, data, f"a value of type {cls.__name__}")
    return data


def _dataclass_from_json(cls: Any, data: Any, where: str) -> Any:
    require(isinstance(data, dict), where, data, f"an object with the fields of {cls.__name__}")
    # A class whose fields have had other names reads those too.
    data = dict(cls.from_older(data) if hasattr(cls, "from_older") else data)
    tag = data.pop(TAG, cls.__name__)
    require(tag == cls.__name__, f"{where}.{TAG}", tag, repr(cls.__name__))
    hints = typing.get_type_hints(cls, include_extras=True)
    names = [f.name for f in dataclasses.fields(cls)]
    for key in data:
        if key not in names:
            close = difflib.get_close_matches(key, names, 1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise ConfigError(f"{where}.{key}: {cls.__name__} has no such field{hint}")
    values = {name: from_json(hints[name], data[name], f"{where}.{name}") for name in names if name in data}
    for f in dataclasses.fields(cls):
        optional = f.default is not dataclasses.MISSING or f.default_factory is not dataclasses.MISSING
        if f.name not in values and not optional:
            raise ConfigError(f"{where}.{f.name}: {cls.__name__} needs this field, but it is missing")
    return cls(**values)


def _member_from_json(union: Any, data: Any, where: str) -> Any:
    require(isinstance(data, dict), where, data, f"an object with a {TAG!r} and the fields of that class")
    tag = data.get(TAG)
    known = [open_union.saved_name(member) for member in open_union.members(union)]
    named = isinstance(tag, str) and (tag in known or ":" in tag)
    require(named, f"{where}.{TAG}", tag, f"one of {', '.join(map(repr, known))}, or MODULE:CLASS of your own")
    try:
        cls = open_union.find(union, tag)
    except open_union.NotFound as error:
        raise ConfigError(f"{where}.{TAG} is {tag!r}: {error}") from error
    return from_json(cls, {key: value for key, value in data.items() if key != TAG}, where)


def _union_from_json(options: tuple[Any, ...], data: Any, where: str) -> Any:
    if data is None and type(None) in options:
        return None
    classes = {c.__name__: c for c in options if dataclasses.is_dataclass(c)}
    if isinstance(data, dict) and classes:
        tag = data.get(TAG)
        require(
            isinstance(tag, str) and tag in classes, f"{where}.{TAG}", tag, f"one of {', '.join(map(repr, classes))}"
        )
        return from_json(classes[tag], data, where)
    plain = [c for c in options if not dataclasses.is_dataclass(c) and c is not type(None)]
    for option in plain:
        try:
            return from_json(option, data, where)
        except ConfigError:
            continue
    raise ConfigError(f"{where} is {data!r}, expected one of {', '.join(str(o) for o in options)}")


def dumps(config: Any) -> str:
    """The resolved config as a JSON text that `loads` takes back to an equal config."""
    return json.dumps(to_json(config), indent=2) + "\n"


def loads[T](cls: type[T], text: str, where: str = "config") -> T:
    """A config of class `cls` from the text that `dumps` wrote.

    Raises:
        ConfigError: not JSON, or not a config of this class.
    """
    try:
        data = json.loads(text)
    except ValueError as error:
        raise ConfigError(f"{where} is not JSON: {error}") from error
    except RecursionError as error:
        raise ConfigError(f"{where} cannot be read as JSON: its brackets are nested too deeply") from error
    return from_json(cls, data, where)


@functools.cache
def field_docs(cls: type) -> dict[str, str]:
    """Help text of each field that `cls` itself declares: the string literal under the field."""
    body = typing.cast(ast.ClassDef, ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0]).body
    docs: dict[str, str] = {}
    for statement, following in itertools.pairwise(body):
        if not (isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name)):
            continue
        if isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant):
            docs[statement.target.id] = inspect.cleandoc(str(following.value.value))
    return docs


def load_file(path: str | Path) -> Any:
    """The config that `get_config()` of a Python file returns.

    Raises:
        ConfigError: no such file, one that Python cannot run, or one without `get_config`.
    """
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"{path}: no such config file")
    try:
        # Config files share helpers by plain imports (`from quickstart import ...`) from their own folder.
        module = open_union.run_file(path)
        if hasattr(module, "get_config"):
            return module.get_config()
    except ConfigError:
        raise
    except Exception as error:
        raise ConfigError(open_union.said(error, path)) from error
    raise ConfigError(f"{path}: has no function get_config(); it must return the config")

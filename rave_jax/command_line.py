"""Command lines into configs: a config file, overrides of its fields, and parts of another kind.

Leaves are set by tyro: `--optimizer.learning-rate 1e-4`. What holds dataclasses is set by naming kinds, and that
happens first, so that the fields of the new parts can be set in the same line:

    --init FromHF --init.path DIR               one part
    --model.context None                        no part, where None is allowed
    --model.mechanisms                          a tuple without items
    --model.mechanisms []                       the same; {} and None too
    --model.mechanisms Rave SlidingWindow       a tuple of two; an item that has its kind already keeps its fields
    --data.sources.0 LlavaJson                  one item; the number behind the last item adds one

None is also null, in any case of letters, and leaves take both words too: `--step null`, `--data.stages.0.weights []`.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import difflib
import inspect
import io
import sys
import types
import typing
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Union

import tyro

from rave_jax import open_union
from rave_jax.config import ConfigError, in_words, load_file, loads, require

CONFIGS = (Path(__file__).parent / "configs", Path(__file__).parents[1] / "configs")
"""Where named configs are: inside an installed package, or beside the package in a clone."""
STUDIES = "studies"
"""Folder of studies in that of configs."""
NONE, EMPTY = ("none", "null"), ("[]", "{}", "()")
"""Words for None, in any case of letters, and for a tuple without items."""


class Place(NamedTuple):
    """A field, or an item of a tuple, that holds dataclasses.

    Fields:
        kinds: the dataclasses it may hold, by name.
        many: is it a tuple of them?
        optional: may it be None?
        value: what it holds; None behind the last item of a tuple.
    """

    kinds: dict[str, Any]
    many: bool
    optional: bool
    value: Any


def override[T](config: T, argv: Sequence[str], prog: str | None = None) -> T:
    """`config` with command-line overrides such as `--optimizer.learning_rate 1e-4`.

    A misspelt option ends the program with exit code 2 and a suggestion; `--help` lists every field.

    Raises:
        ConfigError: a part of a kind that its field does not take, a field of a part that is not there, or fields that
            a check of their dataclass refuses.
    """
    config, rest = with_kinds(config, argv)
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            # tyro makes every dataclass again from its fields, so their checks see all overrides together.
            return tyro.cli(
                type(config),
                default=config,
                args=rest,
                prog=prog,
                description=_description(config) if {"-h", "--help"} & set(rest) else None,
                config=(tyro.conf.AvoidSubcommands,),
            )
    except SystemExit as stop:
        if refusal := _refusal(stop):
            # tyro draws a box around it and breaks the line, so that flags in it cannot be copied.
            raise ConfigError(refusal) from None
        print(said.getvalue(), end="", file=sys.stderr)
        raise


def _refusal(stop: SystemExit) -> str:
    """What the check of a dataclass said that ended tyro, behind the flag of the dataclass; "" for another end."""
    where, error = "", stop.__context__
    while error is not None and not isinstance(error, ConfigError):
        where = getattr(error, "arg", where)
        error = error.__context__
    if error is None:
        return ""
    return f"--{where}: {error}" if where and isinstance(where, str) else str(error)


def with_kinds[T](config: T, argv: Sequence[str]) -> tuple[T, list[str]]:
    """Carry out the words that name kinds of parts; returns the config and the other words.

    The checks of the changed dataclasses are not run: fields that the other words set may be missing yet.

    Raises:
        ConfigError: a kind that the field does not take, or a field of a part that is not there.
    """
    others: list[tuple[tuple[str, ...], list[str], list[str]]] = []
    named: list[tuple[tuple[str, ...], list[str]]] = []
    words = list(argv)
    while words:
        word = words.pop(0)
        values = []
        while word.startswith("--") and words and not _is_option(words[0]):
            values.append(words.pop(0))
        option, equals, value = word.partition("=")
        given = [value, *values] if equals else values
        path = _path(option)
        if word.startswith("--") and _names_kinds(type(config), path):
            named.append((path, given))
        else:
            others.append((path, given, [word, *values]))
    # What holds a part comes before the part.
    for path, given in sorted(named, key=lambda item: len(item[0])):
        place = find(config, path)
        if place is None:
            raise ConfigError(f"--{'.'.join(path)}: {_missing(config, path)}")
        config = _with(config, path, _parts(place, ".".join(path), given))
    rest: list[str] = []
    for path, given, words in others:
        if words[0].startswith("--"):
            if reason := _missing(config, path):
                raise ConfigError(f"--{'.'.join(path)}: {reason}")
            words = _as_tyro(_at(config, path), path, given, words)
        rest += words
    return config, rest


def find(config: Any, path: Sequence[str]) -> Place | None:
    """The place at a path; None where the path leads nowhere or to a leaf."""
    found = _at(config, path)
    if found is None or not (kinds := _by_name(_dataclasses(found.hint))):
        return None
    many = typing.get_origin(found.hint) is tuple
    return Place(kinds, many, type(None) in _options(found.hint), found.value)


class _Field(NamedTuple):
    value: Any
    hint: Any


def _at(config: Any, path: Sequence[str]) -> _Field | None:
    """The field or item at a path, with its type; None where the path leads nowhere."""
    value, hint = config, type(config)
    for part in path:
        if dataclasses.is_dataclass(value):
            hints = typing.get_type_hints(type(value))
            if part not in hints:
                return None
            value, hint = getattr(value, part), hints[part]
        elif isinstance(value, tuple) and _is_number(part) and int(part) <= len(value):
            value, hint = value[int(part)] if int(part) < len(value) else None, _item(hint)
        else:
            return None
    return _Field(value, hint)


def _as_tyro(field: _Field | None, path: Sequence[str], given: list[str], words: list[str]) -> list[str]:
    """The words of a leaf as tyro has them.

    Raises:
        ConfigError: None for a leaf that cannot be None.
    """
    if field is None or len(given) != 1:
        return words
    name, value, options = ".".join(path), given[0], _options(field.hint)
    if field.hint is bool and value in ("True", "False", "true", "false"):
        # tyro has two words for a bool: `--tensorboard` and `--no-tensorboard`.
        return [f"--{'.'.join([*path[:-1], 'no_' * (value[0] in 'Ff') + path[-1]])}"]
    if value in EMPTY and any(typing.get_origin(option) is tuple for option in options):
        return [f"--{name}"]
    if value.lower() not in NONE or any(_has_word(option, value) for option in options):
        return words
    if type(None) in options:
        return [f"--{name}", "None"]
    if str in options or any(str in typing.get_args(option) for option in options):
        return words  # a text like any other
    raise ConfigError(f"--{name} is {value}, expected {in_words(field.hint)}")


def _has_word(hint: Any, word: str) -> bool:
    """Is this word one of the values that the type names?"""
    if typing.get_origin(hint) is typing.Literal:
        return word in typing.get_args(hint)
    return typing.get_origin(hint) is tuple and any(_has_word(option, word) for option in typing.get_args(hint))


def _is_option(word: str) -> bool:
    """Is this the next option, rather than a value such as -3?"""
    return word.startswith("-") and not (word[1:2].isdecimal() or word[1:2] in ("", "."))


def _path(option: str) -> tuple[str, ...]:
    return tuple(option.removeprefix("--").replace("-", "_").split("."))


def _is_number(part: str) -> bool:
    return part.isdecimal() and len(part) < 7


def _types_at(cls: type, path: Sequence[str]) -> list[Any]:
    """The types that a path can lead to, whatever kinds its parts have."""
    hints: list[Any] = [cls]
    for part in path:
        step: list[Any] = []
        for hint in hints:
            if _is_number(part):
                step += [_item(option) for option in _options(hint) if typing.get_origin(option) is tuple]
            else:
                step += [
                    typing.get_type_hints(option)[part]
                    for option in _options(hint)
                    if dataclasses.is_dataclass(option) and part in typing.get_type_hints(option)
                ]
        hints = step
    return hints


def _names_kinds(cls: type, path: Sequence[str]) -> bool:
    """Does the path lead to something that holds dataclasses?"""
    return any(True for hint in _types_at(cls, path) for _ in _dataclasses(hint))


def _options(hint: Any) -> tuple[Any, ...]:
    """The types of a union, or the one type."""
    if open_union.is_union(hint):
        return open_union.members(hint)
    return typing.get_args(hint) if typing.get_origin(hint) in (Union, types.UnionType) else (hint,)


def _item(hint: Any) -> Any:
    """The type of the items of a tuple of any length."""
    return typing.get_args(hint)[0]


def _dataclasses(hint: Any) -> Iterator[Any]:
    """The dataclasses that a field of this type holds, itself or in a tuple."""
    for option in _options(hint):
        if typing.get_origin(option) is tuple:
            yield from _dataclasses(_item(option))
        elif dataclasses.is_dataclass(option):
            yield option


def _by_name(kinds: Iterable[Any]) -> dict[str, Any]:
    """Kinds by the name of their class; a class of a user's own whose name is taken, by where it is defined."""
    named: dict[str, Any] = {}
    for kind in kinds:
        named[open_union.saved_name(kind) if kind.__name__ in named else kind.__name__] = kind
    return named


def _parts(place: Place, path: str, given: Sequence[str]) -> Any:
    """What a place holds when these kinds are named."""
    none = len(given) == 1 and given[0].lower() in NONE
    if place.many:
        if none or (len(given) == 1 and given[0] in EMPTY):
            return ()
        old = place.value
        return tuple(
            _part(place.kinds, f"{path}.{i}", word, old[i] if i < len(old) else None) for i, word in enumerate(given)
        )
    expected = " or ".join([*place.kinds, *["None"] * place.optional])
    if len(given) != 1:
        raise ConfigError(f"--{path} has {len(given)} values, expected one: {expected}")
    return None if none and place.optional else _part(place.kinds, path, given[0], place.value, place.optional)


def _part(kinds: dict[str, Any], path: str, word: str, old: Any, optional: bool = False) -> Any:
    """The part of a named kind: the old one where it is of this kind, else one of defaults."""
    plain = {_plain(name): kind for name, kind in kinds.items()}
    if _plain(word) not in plain and ":" in word and any(issubclass(k, open_union.OpenUnion) for k in kinds.values()):
        try:
            # A file is named from the working directory, as on any command line.
            name = str(Path(word).resolve()) if ".py:" in word else word
            plain[_plain(word)] = open_union.find(open_union.OpenUnion, name)
        except open_union.NotFound as error:
            raise ConfigError(f"--{path} is {word!r}: {error}") from error
    if _plain(word) not in plain:
        close = difflib.get_close_matches(_plain(word), plain, 1)
        hint = f"; did you mean {plain[close[0]].__name__}?" if close else ""
        raise ConfigError(f"--{path} is {word!r}, expected one of {', '.join([*kinds, *['None'] * optional])}{hint}")
    kind = plain[_plain(word)]
    return old if type(old) is kind else _defaults(kind)


def _plain(name: str) -> str:
    """LlavaJson, llava-json and llava_json are one name."""
    return name.replace("-", "").replace("_", "").lower()


def _defaults(cls: Any) -> Any:
    """An instance with the default of every field, unchecked."""
    made = object.__new__(cls)
    for f in dataclasses.fields(cls):
        if f.default is f.default_factory is dataclasses.MISSING:
            raise ConfigError(
                f"{cls.__name__}.{f.name} has no default, so the command line cannot make a {cls.__name__}"
            )
        value = f.default if f.default_factory is dataclasses.MISSING else f.default_factory()
        object.__setattr__(made, f.name, value)
    return made


def _with(value: Any, path: Sequence[str], new: Any) -> Any:
    """A copy of a tree of dataclasses and tuples with one place changed, unchecked."""
    if not path:
        return new
    first, rest = path[0], path[1:]
    if isinstance(value, tuple):
        number = int(first)
        old = value[number] if number < len(value) else None
        return (*value[:number], _with(old, rest, new), *value[number + 1 :])
    made = copy.copy(value)
    object.__setattr__(made, first, _with(getattr(value, first), rest, new))
    return made


def _missing(config: Any, path: Sequence[str]) -> str:
    """Why there is no such path of fields, although another kind of part has it; empty where it leads on, or
    where no kind has it (tyro then suggests names)."""
    for end in range(1, len(path)):
        before, part = path[:end], path[end]
        place = find(config, before)
        if place is None:
            continue
        name = ".".join(before)
        if place.many:
            count = len(place.value)
            if _is_number(part) and int(part) > count - (end < len(path) - 1):
                kinds = "|".join(place.kinds)
                items = f"{count} item{'s' * (count != 1)}"
                return f"{name} has {items}; to add one, name its class: --{name}.{count} {kinds}"
            continue
        having = [n for n, kind in place.kinds.items() if part in typing.get_type_hints(kind)]
        if having and type(place.value).__name__ not in having:
            held = "None" if place.value is None else type(place.value).__name__
            return f"{name} is {held}, which has no {part}; {having[0]} has it: add --{name} {having[0]}"
    return ""


def _description(config: Any) -> str:
    """What a config is, and which kinds its parts may have, for --help."""
    lines = [inspect.getdoc(type(config)) or "", "", "Parts are set by naming their classes, before their fields:"]
    for path, place in _places(config, ()):
        kinds = "|".join([*place.kinds, *["None"] * place.optional])
        lines.append(f"  --{'.'.join(path).replace('_', '-')} {f'[{kinds} ...]' if place.many else kinds}")
    return "\n".join(lines)


def _places(value: Any, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Place]]:
    """Every place of a config where there is a choice of kinds or of how many."""
    children = (
        [(f.name, getattr(value, f.name)) for f in dataclasses.fields(value)]
        if dataclasses.is_dataclass(value)
        else [(str(i), item) for i, item in enumerate(value)]
    )
    for name, child in children:
        here = (*path, name)
        # Items of tuples are listed with their tuple.
        place = find(value, (name,)) if dataclasses.is_dataclass(value) else None
        if place and (place.many or place.optional or len(place.kinds) > 1):
            yield here, place
        if dataclasses.is_dataclass(child) or isinstance(child, tuple):
            yield from _places(child, here)


def load_command_line[T](cls: type[T], argv: Sequence[str], prog: str) -> T:
    """The config of `PROG CONFIG [--overrides]`.

    CONFIG is a Python file with `get_config()`, the name of one that comes with the package, or the resolved config of
    a run, a `.json` file. Exits with code 2 and one line when the config cannot be used.
    """
    usage = f"usage: {prog} CONFIG [--field.name value ...]   (CONFIG --help lists the fields)"
    if argv and argv[0] in ("-h", "--help"):
        print(usage)
        print(f"CONFIG is a Python file with get_config(), a run's config.json, or one of: {', '.join(config_names())}")
        raise SystemExit(0)
    try:
        if not argv or argv[0].startswith("-"):
            raise ConfigError(f"the first argument must be a config file or a config's name\n{usage}")
        return override(_load(cls, argv[0]), argv[1:], prog=f"{prog} {argv[0]}")
    except ConfigError as error:
        print(f"{prog}: {error}", file=sys.stderr)
        raise SystemExit(2) from error


def config_names(under: str = "") -> list[str]:
    """Names of the configs that come with the package, or of those in a folder below, as `studies/rave`."""
    folder = next((folder for folder in CONFIGS if folder.is_dir()), None)
    files = [] if folder is None else (folder / under).glob("*.py")
    return sorted((Path(under) / path.stem).as_posix() for path in files if "def get_config(" in path.read_text())


def config_file(given: str, wanted: str = "") -> Path:
    """The file of a config: the path as it is, or the file of a named config.

    Args:
        given: path or name.
        wanted: folder of the configs that an error lists, in that of configs.

    Raises:
        ConfigError: neither is there.
    """
    path = Path(given)
    with contextlib.suppress(OSError):
        if path.is_file():
            return path
        if path.is_dir():
            raise ConfigError(f"{given} is a directory, expected a config file; of a run, {path / 'config.json'}")
    # `configs/quickstart.py` names the same config where only the package is installed.
    name = path.stem if path.suffix == ".py" and path.parent.name == "configs" else given
    if path.suffix == ".py" and path.parts[-3:-1] == ("configs", STUDIES):
        name = f"{STUDIES}/{path.stem}"
    for folder in CONFIGS:
        if name in (*config_names(), *config_names(STUDIES)) and (folder / f"{name}.py").is_file():
            return folder / f"{name}.py"
    names = config_names(wanted)
    close = difflib.get_close_matches(f"{wanted}/{path.stem}" if wanted else path.stem, names, 1)
    hint = f"; did you mean {close[0]}?" if close else ""
    raise ConfigError(
        f"{given}: no such config file, and no config of this name comes with the package "
        f"({', '.join(names) or 'there is none'}){hint}"
    )


def _load[T](cls: type[T], given: str) -> T:
    path = config_file(given)
    if path.suffix != ".json":
        config = load_file(path)
        require(isinstance(config, cls), f"get_config() of {path}", config, f"one of class {cls.__name__}")
        return config
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{given}: cannot be read ({error})") from error
    if '"model_type"' in text and '"type"' not in text:
        raise ConfigError(f"{given} is the config of a model in HuggingFace format, expected that of a run")
    return loads(cls, text, where=given)

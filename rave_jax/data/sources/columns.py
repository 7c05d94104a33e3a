"""Columns of a parquet file: which are read, which key of a record each stands for, and which would pass unread."""

from __future__ import annotations

import json
import logging
from collections.abc import Collection, Sequence
from typing import NamedTuple

import pyarrow as pa

from rave_jax.config import ConfigError
from rave_jax.data.sources.keys import COLUMN, is_content, is_metadata, may_be_picture
from rave_jax.data.sources.qa import KEYS as QUESTION_KEYS
from rave_jax.data.sources.turns import PAIRS, RECORD_KEYS, SYSTEM, TURNS
from rave_jax.data.sources.visuals import VIDEO_KEYS

log = logging.getLogger(__name__)

IMAGES = ("images", "image")
QUESTIONS = ("question", "query")
ANSWERS = ("answers", "answer", "label")
LISTS = (
    pa.types.is_list,
    pa.types.is_large_list,
    pa.types.is_fixed_size_list,
    pa.types.is_list_view,
    pa.types.is_large_list_view,
)
BYTES = (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_fixed_size_binary, pa.types.is_binary_view)


class Named(NamedTuple):
    """Columns as a config names them, "" where it names none, and those that may pass unread."""

    image: str = ""
    turns: str = ""
    question: str = ""
    answer: str = ""
    ignored: tuple[str, ...] = ()


def columns_of(schema: pa.Schema, config: Named, where: str, known: Collection[str] = ()) -> dict[str, str]:
    """The columns that are read, and the key of a record that each stands for.

    Args:
        schema: of the file.
        config: which columns the config names.
        where: what errors call the file.
        known: columns that choose rows, which may pass unread.

    Raises:
        ConfigError: no known set of columns, or a column that would pass unread and could be learned from.
    """
    columns = [name for name in schema.names if name not in config.ignored]

    def named(given: str, usual: Sequence[str]) -> str:
        if given and given not in schema.names:
            raise ConfigError(f"{where}: no column {given!r}; it has {', '.join(schema.names)}")
        return given or next((name for name in usual if name in columns), "")

    image = named(config.image, IMAGES)
    turns = named(config.turns, ("messages", "conversations", "texts"))
    ask, answer = named(config.question, QUESTIONS), named(config.answer, ANSWERS)
    pair = next((key for key in PAIRS if key in columns and PAIRS[key] in columns), "")
    names: dict[str, str] = {}
    if turns:
        names[turns] = turns if turns in TURNS else TURNS[1]
    elif ask and answer:
        names |= {ask: "question", answer: "answers" if _is_list(schema.field(answer).type) else "answer"}
        other = {"answers": "answer", "answer": "answers"}[names[answer]]
        if not config.answer and other in columns and other != answer:
            names[other] = other
    elif pair:
        names |= {name: name for name in (pair, PAIRS[pair], "input", "history") if name in columns}
    else:
        raise ConfigError(
            f"{where}: columns {schema.names}; expected a conversation ({', '.join(TURNS)}), a question "
            f"({', '.join(QUESTIONS)}) with an answer ({', '.join(ANSWERS)}), or instruction with output"
        )
    names |= {name: name for name in ("id", *SYSTEM, *VIDEO_KEYS) if name in columns and name not in names}
    if image := image or _one_of_pictures(schema, columns, names, where):
        names[image] = "image"
    read = QUESTION_KEYS if "question" in names.values() else RECORD_KEYS
    # Who names a column says that the others of its kind are not meant.
    kinds = ((config.image, IMAGES), (config.turns, TURNS), (config.question, QUESTIONS), (config.answer, ANSWERS))
    meant = {name for given, usual in kinds if given for name in usual}
    others = [name for name in columns if name not in names and name not in known]
    names |= _others(schema, others, read, meant, where)
    if twice := [name for name in names if schema.names.count(name) > 1]:
        raise ConfigError(f"{where}: {schema.names.count(twice[0])} columns have the name {twice[0]!r}: rename them")
    return names


KINDS = (
    ("text", (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view)),
    ("bytes", BYTES),
    ("number", (pa.types.is_integer, pa.types.is_floating, pa.types.is_decimal)),
    ("truth value", (pa.types.is_boolean,)),
    ("list", LISTS),
    ("object", (pa.types.is_struct,)),
)


def other_type(kind: pa.DataType, first: pa.DataType) -> bool:
    """Do two columns hold different kinds of values? Widths and views of one kind are the same; a column of nulls is
    of any kind."""
    kind, first = (each.value_type if pa.types.is_dictionary(each) else each for each in (kind, first))
    if kind == first or pa.types.is_null(kind) or pa.types.is_null(first):
        return False
    if _kind(kind) != _kind(first):
        return True
    if _is_list(kind):
        return other_type(kind.value_type, first.value_type)
    if pa.types.is_struct(kind):
        fields = {kind.field(number).name: kind.field(number).type for number in range(kind.num_fields)}
        both = [first.field(number) for number in range(first.num_fields)]
        return any(other_type(fields[field.name], field.type) for field in both if field.name in fields)
    return False


def _kind(kind: pa.DataType) -> str:
    return next((name for name, tests in KINDS if any(test(kind) for test in tests)), str(kind))


def _one_of_pictures(schema: pa.Schema, columns: Sequence[str], names: dict[str, str], where: str) -> str:
    """The one column of pictures under a name of its own; "" where there is none."""
    found = [name for name in columns if name not in names and holds_bytes(schema.field(name).type)]
    found = [name for name in found if may_be_picture(name) and not is_metadata(name)]
    if len(found) > 1:
        raise ConfigError(
            f"{where}: the columns {', '.join(found)} hold bytes: name one as image_column and add the "
            "others to `ignored`"
        )
    return found[0] if found else ""


def _is_list(kind: pa.DataType) -> bool:
    return any(is_kind(kind) for is_kind in LISTS)


def class_names(schema: pa.Schema, column: str) -> tuple[str, ...]:
    """Names of the classes that a column's numbers stand for, which `datasets` keeps beside the schema; () for none."""
    try:
        features = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))["info"]["features"]
        feature = features[column]
        return tuple(map(str, feature["names"])) if feature["_type"] == "ClassLabel" else ()
    except (KeyError, TypeError, ValueError, RecursionError):
        return ()


def holds_bytes(kind: pa.DataType) -> bool:
    """Does this column hold bytes, as encoded files are: alone, or somewhere in lists and structs?"""
    if any(holds_bytes(kind.field(number).type) for number in range(kind.num_fields)):
        return True
    if pa.types.is_dictionary(kind):
        return holds_bytes(kind.value_type)
    return any(is_kind(kind) for is_kind in BYTES)


def _others(
    schema: pa.Schema, columns: Sequence[str], read: Sequence[str], quiet_ones: Collection[str], where: str
) -> dict[str, str]:
    """Columns beside the known ones that are read all the same, to refuse the rows in which they hold something.

    Args:
        schema: of the file.
        columns: beside the known ones.
        read: keys of a record that are read.
        quiet_ones: columns that are named in a line and no more.
        where: what errors call the file.

    Raises:
        ConfigError: one of them holds bytes.
    """
    refused, quiet = {}, []
    for name in columns:
        kind = schema.field(name).type
        if pa.types.is_null(kind) or is_metadata(name):
            continue
        if name in quiet_ones:
            quiet.append(name)
        elif is_content(name, read):
            refused[name] = f"{COLUMN}{name}" if name in read else name
        elif holds_bytes(kind):
            raise ConfigError(
                f"{where}: the column {name!r} holds bytes and is not read: name it as image_column, or add it "
                "to `ignored`"
            )
        else:
            quiet.append(name)
    if quiet:
        log.warning("%s: columns that are not read: %s (add them to `ignored`)", where, ", ".join(quiet))
    return refused

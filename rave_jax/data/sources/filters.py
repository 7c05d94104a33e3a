"""Which records of a source are used, by the values of their fields. Decided once and kept beside the data."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np

from rave_jax.config import ConfigError, require
from rave_jax.data import flat
from rave_jax.data.places import Place
from rave_jax.data.sample import Part
from rave_jax.data.sources.blocks import digest
from rave_jax.typing import Bool, Int, NpArray

log = logging.getLogger(__name__)

SHOWN_VALUES = 10
"""Values of a field that an error lists."""
VERSION = 1


@dataclass(frozen=True)
class FieldIs:
    """Records whose field has one of some values."""

    field: str = ""
    """Name of the field; a.b is the field b of the object in the field a."""
    values: tuple[str, ...] = ()
    """The values, as JSON writes them but texts without quotes: en, 3, true, null. A record without the field has null.
    Of a list, one of its items has to be among the values."""
    keep: bool = True
    """False: records with these values are left out, and all others are kept."""

    def __post_init__(self) -> None:
        require(bool(self.field), "field", self.field, "the name of a field of the records")
        require(len(self.values) > 0, "values", self.values, "at least one value")

    def __str__(self) -> str:
        return f"{self.field} is {'' if self.keep else 'not '}{' or '.join(self.values)}"


class Records(Protocol):
    """Records of files by index."""

    @property
    def fingerprint(self) -> str: ...

    @property
    def parts(self) -> tuple[Part, ...]: ...

    @property
    def path(self) -> Place: ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, Any]:
        """A record.

        Raises:
            SampleError: it cannot be read.
        """
        ...

    def where(self, index: int) -> str:
        """What messages call a record: its file and its place there."""
        ...

    def rows(self, fields: Sequence[str], start: int, stop: int) -> Iterator[dict[str, Any] | None]:
        """At least these fields of the records from `start` to `stop`; None for one that cannot be read."""
        ...


class Chosen(NamedTuple):
    """The records that are used.

    Fields:
        indices: of each among all records; None where all are used.
        parts: as those of the records, with the counts that are used.
        fingerprint: of the records and of what chose them.
    """

    indices: Int[NpArray, "N"] | None
    parts: tuple[Part, ...]
    fingerprint: str


def choose(records: Records, where: Sequence[FieldIs]) -> Chosen:
    """The records that every one of the filters keeps. A record that cannot be read is kept: it is counted when loaded.

    Raises:
        ConfigError: no record has a field that a filter names, or no record is kept.
    """
    if not where:
        return Chosen(None, records.parts, records.fingerprint)
    mark = digest(json.dumps([VERSION, [[f.field, f.values, f.keep] for f in where]]).encode()).hexdigest()
    masks, facts = _masks(records, where, mark)
    for each in where:
        if len(records) and not any(each.field in fact["found"] for fact in facts):
            raise ConfigError(
                f"{records.path}: no record has the field {each.field!r}, which `where` names; the first records have "
                f"{', '.join(getattr(records, 'columns', ()) or facts[0]['keys']) or 'no field'}"
            )
    indices = np.flatnonzero(np.concatenate(masks))
    said = " and ".join(map(str, where))
    if len(records) and not len(indices):
        values = {value: None for fact in facts for value in fact["values"]}
        raise ConfigError(
            f"{records.path}: `where` keeps none of {len(records):,} records ({said}); there are "
            f"{', '.join(list(values)[:SHOWN_VALUES])}"
        )
    log.warning("%s: `where` keeps %s of %s records (%s)", records.path, f"{len(indices):,}", f"{len(records):,}", said)
    parts = tuple(
        Part(int(mask.sum()), digest(f"{part.fingerprint} {mark}".encode()).hexdigest(), part.data)
        for part, mask in zip(records.parts, masks, strict=True)
    )
    return Chosen(indices, parts, digest(f"{records.fingerprint} {mark}".encode()).hexdigest())


def _masks(
    records: Records, where: Sequence[FieldIs], mark: str
) -> tuple[list[Bool[NpArray, "N"]], list[dict[str, Any]]]:
    """Which records of each part are kept, and what was seen of their fields; parts that are known are not read."""
    data, kind = records.parts[0].data, f"kept-{mark[:16]}"
    known: dict[tuple[str, int], tuple[Bool[NpArray, "N"], dict[str, Any]]] = {}
    old = flat.load(data, kind)
    if old is not None and old.facts.get("mark") == mark:
        first = 0
        for fact in old.facts["parts"]:
            size = -(-fact["length"] // 8)
            bits = np.unpackbits(old.arrays["bits"][first : first + size], count=fact["length"]).astype(bool)
            known[fact["fingerprint"], fact["length"]] = (bits, fact)
            first += size
    masks, facts, start, new = [], [], 0, old is None
    for part in records.parts:
        key = (part.fingerprint, part.length)
        if key not in known:
            known[key], new = _look(records, where, start, part), True
        mask, fact = known[key]
        masks.append(mask)
        facts.append(fact)
        start += part.length
    if new:
        bits = np.concatenate([np.packbits(mask) for mask in masks])
        flat.keep(data, kind, {"mark": mark, "parts": facts}, {"bits": bits})
    return masks, facts


def _look(
    records: Records, where: Sequence[FieldIs], start: int, part: Part
) -> tuple[Bool[NpArray, "N"], dict[str, Any]]:
    mask = np.ones(part.length, bool)
    keys: dict[str, None] = {}
    found: set[str] = set()
    values: dict[str, None] = {}
    wanted = [(each, frozenset(each.values)) for each in where]
    rows = records.rows([each.field for each in where], start, start + part.length)
    for number, row in enumerate(rows):
        if row is None:
            continue
        if number < SHOWN_VALUES:
            keys |= dict.fromkeys(row)
        for each, among in wanted:
            has, value = _value(row, each.field)
            if has:
                found.add(each.field)
            texts = _texts(value)
            if len(values) < SHOWN_VALUES:
                values |= dict.fromkeys(f"{each.field} {text:.60}" for text in texts)
            if bool(among.intersection(texts)) != each.keep:
                mask[number] = False
    seen = {"keys": list(keys)[:40], "found": sorted(found), "values": list(values)}
    return mask, {"fingerprint": part.fingerprint, "length": part.length, **seen}


def _value(row: dict[str, Any], field: str) -> tuple[bool, Any]:
    if field in row:
        return True, row[field]
    outer, dot, inner = field.partition(".")
    if dot and isinstance(row.get(outer), dict):
        return _value(row[outer], inner)
    return False, None


def _texts(value: Any) -> list[str]:
    if isinstance(value, list):
        return [text for item in value for text in _texts(item)]
    return [value if isinstance(value, str) else json.dumps(value, default=str)]

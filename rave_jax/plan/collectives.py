"""The collectives of a compiled TPU module: kind, mesh axes, bytes, asynchronous or not, how often.

A TPU module writes an asynchronous collective in one of three ways: as a pair such as `all-gather-start` and
`all-gather-done`; as `async-start`, or `call-start` where sparse cores run it, of a computation that holds it; or as a
fusion that holds it before a call of `AsyncCollectiveStart`, after which fusions of other work repeat it until one
ends in `AsyncCollectiveDone`. Each is counted once. Asynchronous means that the chip may compute meanwhile, not that
it does.

Between slices the compiler leaves a collective to the runtime: the chip sends to its host, which sums or gathers with
the hosts of other slices, and receives. That is asynchronous, of the chips that have one place in each slice.

A reduce-scatter stands as itself, or as a fusion of an all-reduce of which each chip keeps a slice.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

import numpy as np

from rave_jax.plan import hlo
from rave_jax.plan.hlo import Instruction, Module

Kind = Literal["all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute"]
_KINDS: dict[str, Kind] = {
    "all-gather": "all-gather",
    "all-reduce": "all-reduce",
    "reduce-scatter": "reduce-scatter",
    "all-to-all": "all-to-all",
    "ragged-all-to-all": "all-to-all",
    "collective-permute": "collective-permute",
}
_START, _DONE = 'custom_call_target="AsyncCollectiveStart"', 'custom_call_target="AsyncCollectiveDone"'
_BETWEEN_SLICES = re.compile(r'_xla_megascale_transfer_type="(\w+)"')
_IOTA = re.compile(r"^\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
_MESH = re.compile(r"^mesh\[([^\]]*)\] \{([^}]*)\}")
_MESH_AXIS = re.compile(r"'([^']+)'(?::\((\d+)\)(\d+))?")


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective of a module.

    Args:
        kind: what it does.
        size: bytes of the whole array of a group: what an all-gather or an all-to-all gives, what an all-reduce or a
            reduce-scatter takes, what a chip sends in a collective-permute.
        groups: [G,g] numbers of chips, in the order of the mesh's devices; of a collective-permute its pairs, g = 2.
        axes: mesh axes along which chips of a group differ; where a group is a part of an axis, that axis.
        asynchronous: may the chip compute meanwhile?
        times: executions in one run of the module.
        where: the operation of the traced program that it serves, as the compiler names it; may be "".
        shapes: the arrays of `size`, as the module writes them.
    """

    kind: Kind
    size: int
    groups: np.ndarray = dataclasses.field(repr=False, compare=False)
    axes: tuple[str, ...]
    asynchronous: bool
    times: int
    where: str = ""
    shapes: str = ""

    @property
    def members(self) -> int:
        """Chips of a group."""
        return self.groups.shape[1]

    @property
    def sent(self) -> float:
        """Bytes that each chip sends in one execution, by the ring algorithm: the least for the kind."""
        rest = (self.members - 1) / self.members
        return self.size * {"all-reduce": 2 * rest, "collective-permute": 1.0}.get(self.kind, rest)

    @property
    def sent_in_all(self) -> float:
        """Bytes that each chip sends in one run of the module."""
        return self.sent * self.times


@dataclasses.dataclass(frozen=True)
class Traffic:
    """Collectives of one kind over the same axes.

    Args:
        kind, axes, asynchronous: of each.
        members: chips of a group.
        count: instructions of the module.
        times: executions in one run.
        sent: bytes that each chip sends in one run.
    """

    kind: Kind
    axes: tuple[str, ...]
    members: int
    asynchronous: bool
    count: int
    times: int
    sent: float


def traffic(collectives: Iterable[Collective]) -> list[Traffic]:
    """Collectives of one kind over the same axes added up, what sends most first."""
    alike: dict[tuple[Kind, tuple[str, ...], int, bool], list[Collective]] = defaultdict(list)
    for one in collectives:
        alike[one.kind, one.axes, one.members, one.asynchronous].append(one)
    rows = [
        Traffic(*key, len(ones), sum(one.times for one in ones), sum(one.sent_in_all for one in ones))
        for key, ones in alike.items()
    ]
    return sorted(rows, key=lambda row: row.sent, reverse=True)


def read_collectives(text: str, mesh: Mapping[str, int], slices: Sequence[int] = ()) -> list[Collective]:
    """The collectives of a compiled module, without those of a single chip.

    Args:
        text: `compiled.as_text()` of a program for TPUs.
        mesh: axis -> size, in the order of the mesh.
        slices: of each chip, in the order of the mesh; empty where there is one slice.

    Raises:
        ValueError: the text is not in the form known here, or its chips are not those of the mesh.
    """
    return collectives_of(hlo.read(text), mesh, slices)


def collectives_of(module: Module, mesh: Mapping[str, int], slices: Sequence[int] = ()) -> list[Collective]:
    """`read_collectives` of a module that is read already."""
    times = module.times
    started_by = module.with_called(
        name for caller, name in module.calls() if caller.opcode in ("async-start", "call-start")
    )
    starts = {name for name, body in module.computations.items() if any(_START in one.attributes for one in body)}
    started = {_channel(one) for name in starts for one in module.computations[name] if one.opcode in _KINDS}
    fused = {name for caller, name in module.calls() if caller.opcode == "fusion"}
    found = []
    for name, body in module.computations.items():
        for one in body if times[name] else ():
            if one.opcode == "send" and (transfer := one.attribute(_BETWEEN_SLICES.pattern)) is not None:
                found.append(_between_slices(one, transfer, slices, mesh, times[name]))
                continue
            opcode = one.opcode.removesuffix("-start")
            if opcode not in _KINDS:
                continue
            repeated = name not in starts and name in fused and _channel(one) in started
            if repeated or any(_DONE in other.attributes for other in body):
                continue
            asynchronous = one.opcode.endswith("-start") or name in starts or name in started_by
            kind = _KINDS[opcode]
            if kind == "all-reduce" and name in fused and _sliced(one, body):
                kind = "reduce-scatter"
            groups = _groups(one, math.prod(mesh.values()))
            if groups.size == 0 or groups.shape[1] == 1:
                continue
            found.append(
                Collective(
                    kind=kind,
                    size=_size(one, groups.shape[1]),
                    groups=groups,
                    axes=axes_of(groups, mesh),
                    asynchronous=asynchronous,
                    times=times[name],
                    where=one.attribute(r'op_name="((?:[^"\\]|\\.)*)"') or "",
                    shapes=re.sub(r"\{[^}]*\}", "", one.type),
                )
            )
    return found


def _between_slices(
    one: Instruction, transfer: str, slices: Sequence[int], mesh: Mapping[str, int], times: int
) -> Collective:
    if (kind := _KINDS.get(transfer.lower().replace("_", "-"))) is None:
        raise ValueError(f"{one.name}: a transfer between slices of a kind not known here: {transfer}")
    numbers = np.asarray(slices)
    groups = np.stack([np.flatnonzero(numbers == number) for number in np.unique(numbers)], axis=1)
    # The operand stands first in the type, beside two of the transfer's own.
    size = hlo.array_bytes(one.type)[0] * (groups.shape[1] if kind in ("all-gather", "reduce-scatter") else 1)
    return Collective(kind, size, groups, axes_of(groups, mesh), True, times, shapes=one.type)


def axes_of(groups: np.ndarray, mesh: Mapping[str, int]) -> tuple[str, ...]:
    """The mesh axes along which chips of a group differ, in the order of the mesh.

    Args:
        groups: [G,g] numbers of chips, in the order of the mesh's devices.
        mesh: axis -> size.
    """
    places = np.unravel_index(groups, tuple(mesh.values()))
    return tuple(axis for axis, place in zip(mesh, places, strict=True) if (place != place[:, :1]).any())


def _channel(one: Instruction) -> str | None:
    return one.attribute(r"channel_id=(\d+)")


def _sliced(one: Instruction, body: Sequence[Instruction]) -> bool:
    """Is only a slice of the sum used?"""
    users = [other for other in body if one.name in other.operands]
    while len(users) == 1 and users[0].opcode in ("bitcast", "reshape", "copy", "convert", "get-tuple-element"):
        users = [other for other in body if users[0].name in other.operands]
    return bool(users) and all(user.opcode == "dynamic-slice" for user in users)


def _size(one: Instruction, members: int) -> int:
    sizes = hlo.array_bytes(one.type)
    match one.opcode:
        case "all-gather-start":  # (what goes in, what comes out)
            return sum(sizes[len(sizes) // 2 :])
        case "collective-permute-start":  # (what goes in, what comes out, two numbers)
            return sizes[0]
        case "reduce-scatter":
            return sum(sizes) * members
    return sum(sizes)


def _groups(one: Instruction, chips: int) -> np.ndarray:
    """[G,g] numbers of chips."""
    if one.opcode.startswith("collective-permute"):
        pairs = re.search(r"source_target_pairs=\{(\{[^=]*\})\}", one.attributes)
        found = _lists(pairs[1]) if pairs else []
        moving = [pair for pair in found if pair[0] != pair[1]]
        return _checked(np.array(moving, int).reshape(-1, 2), one, chips)
    match = re.search(r"replica_groups=(.*?)(?:, [a-z_]+=|$)", one.attributes)
    if match is None or match[1] in ("{}", "{{}}"):
        return np.arange(chips)[None]
    written = match[1]
    if written.startswith("{{"):
        lists = _lists(written)
        if len({len(group) for group in lists}) != 1:
            raise ValueError(f"{one.name}: groups of unequal size: {written[:200]}")
        return _checked(np.array(lists), one, chips)
    if iota := _IOTA.match(written):
        shape, dims, order = ([int(n) for n in (part or "").split(",") if n] for part in iota.groups())
        numbers = np.arange(math.prod(dims)).reshape(dims).transpose(order or None)
        return _checked(numbers.reshape(shape), one, chips)
    if named := _MESH.match(written):
        return _checked(_along(named[1], named[2]), one, chips)
    raise ValueError(f"{one.name}: replica groups in a form not known here: {written[:200]}")


def _along(axes: str, names: str) -> np.ndarray:
    """Groups of a mesh that the module names by its own axes; an axis may be cut, as in `'x':(2)4`."""
    sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", axes)}
    chosen = [(name, int(before or 1), int(size or sizes[name])) for name, before, size in _MESH_AXIS.findall(names)]
    shape, place = [], {}
    for name, size in sizes.items():
        cuts = sorted((before, width) for axis, before, width in chosen if axis == name)
        at = 1
        for before, width in cuts:
            shape += [before // at, width]
            place[name, before] = len(shape) - 1
            at = before * width
        shape.append(size // at)
    numbers = np.arange(math.prod(sizes.values())).reshape(shape)
    last = [place[name, before] for name, before, _ in chosen]
    first = [axis for axis in range(numbers.ndim) if axis not in last]
    return numbers.transpose(first + last).reshape(-1, math.prod(width for _, _, width in chosen))


def _lists(written: str) -> list[list[int]]:
    return [[int(n) for n in group.split(",")] for group in re.findall(r"\{([\d,]+)\}", written)]


def _checked(groups: np.ndarray, one: Instruction, chips: int) -> np.ndarray:
    if groups.size and groups.max() >= chips:
        raise ValueError(f"{one.name}: it names chip {groups.max()}, and the mesh has {chips}")
    return groups

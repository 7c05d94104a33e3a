"""Reads the text of a compiled module: its computations, their instructions, and how often each is executed.

Only what `Compiled.as_text` of a scheduled TPU module writes is understood, and what the compiler dumps, where
`%name#1` stands for an instruction that takes part 1 of a tuple: it gets one of its own here. Times are counted from
the loops that contain a computation; each branch of a conditional counts as taken. Jax counts its loops in steps of 1.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Iterable, Iterator

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*?) ([a-z][a-z0-9\-]*)\((.*)$")
_CALLED = re.compile(
    r"\b(calls|to_apply|body|condition|true_computation|false_computation|branch_computations|called_computations)="
    r"(?:\{([^}]*)\}|%?([\w.\-]+))"
)
_NAME = re.compile(r"%([\w.\-]+(?:#\d+)*)")
_ARRAY = re.compile(r"\b(pred|bf16|[csuf]\d+\w*)\[([\d,]*)\]")
_BITS = {"pred": 8, "bf16": 16}


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation.

    Args:
        name: unique in its module.
        type: of the result, as written: an array or a tuple of arrays.
        opcode: such as `all-gather`.
        operands: names of instructions of the same computation.
        argument: what stands between the parentheses, as written: the value of a constant.
        attributes: what follows them, as written.
        root: is it the result of its computation?
    """

    name: str
    type: str
    opcode: str
    operands: tuple[str, ...]
    argument: str
    attributes: str
    root: bool

    @property
    def called(self) -> dict[str, list[str]]:
        """Attribute -> the computations it names."""
        found: dict[str, list[str]] = {}
        for key, several, one in _CALLED.findall(self.attributes):
            found[key] = [one] if one else _NAME.findall(several)
        return found

    def attribute(self, pattern: str) -> str | None:
        """The first group of a regular expression that is searched in the attributes."""
        match = re.search(pattern, self.attributes)
        return match[1] if match else None


@dataclasses.dataclass(frozen=True)
class Module:
    """A compiled module.

    Args:
        computations: in the order of the text, in which what is called stands before what calls it.
        entry: the computation that runs first.
    """

    computations: dict[str, list[Instruction]]
    entry: str

    @functools.cached_property
    def times(self) -> dict[str, int]:
        """Computation -> how often one execution of the module executes it."""
        times = dict.fromkeys(self.computations, 0)
        times[self.entry] = 1
        for name in reversed(self.computations):
            for instruction in self.computations[name] if times[name] else ():
                trips = (self.trips(name, instruction) or 1) if instruction.opcode == "while" else 1
                for key, called in instruction.called.items():
                    for callee in called:
                        if callee in times:
                            times[callee] += times[name] * (trips + (key == "condition"))
        return times

    def calls(self) -> Iterator[tuple[Instruction, str]]:
        """Every call of a computation: the instruction, and the name of what it calls."""
        for instructions in self.computations.values():
            for instruction in instructions:
                for called in instruction.called.values():
                    for name in called:
                        yield instruction, name

    def with_called(self, names: Iterable[str]) -> set[str]:
        """These computations and all that they call, and so on."""
        found = set(names)
        # What is called stands before what calls it.
        for name in reversed(self.computations):
            if name in found:
                found |= {
                    callee for one in self.computations[name] for called in one.called.values() for callee in called
                }
        return found

    @functools.cached_property
    def uncounted(self) -> list[str]:
        """Loops whose end is known only at run time; what is in them counts once."""
        return [
            one.name
            for name, body in self.computations.items()
            for one in body
            if self.times[name] and one.opcode == "while" and self.trips(name, one) is None
        ]

    def trips(self, computation: str, loop: Instruction) -> int | None:
        """How often a loop runs, which counts in steps of 1 from a constant (0, where it is none) to below a constant.

        Returns:
            None for a loop that ends otherwise.
        """
        known = loop.attribute(r'known_trip_count"?[:=]\{"?n"?:"(\d+)"')
        if known is not None:
            return int(known)
        condition = {one.name: one for one in self.computations[loop.called["condition"][0]]}
        root = next(one for one in condition.values() if one.root)
        counted = self._compared(root, condition)
        if counted is None:
            return None
        place, end = counted
        return max(0, end - self._start(computation, loop, place))

    def _compared(self, root: Instruction, condition: dict[str, Instruction]) -> tuple[int, int] | None:
        """(place of the counter in the loop's tuple, the constant it stays below)."""
        operands = [condition[name] for name in root.operands]
        if root.opcode == "fusion":
            inside = {one.name: one for one in self.computations[root.called["calls"][0]]}
            compare = next(one for one in inside.values() if one.root)
            of = {str(n): operand for n, operand in enumerate(operands)}
            operands = [
                of[inside[name].argument] if inside[name].opcode == "parameter" else inside[name]
                for name in compare.operands
            ]
        else:
            compare = root
        if compare.opcode != "compare" or "direction=LT" not in compare.attributes:
            return None
        counter, end = operands
        place = counter.attribute(r"index=(\d+)")
        if counter.opcode != "get-tuple-element" or place is None or end.opcode != "constant":
            return None
        return int(place), int(end.argument)

    def _start(self, computation: str, loop: Instruction, place: int) -> int:
        here = {one.name: one for one in self.computations[computation]}
        given = here.get(loop.operands[0])
        while given is not None and given.opcode != "constant":
            if given.opcode == "tuple":
                given = here[given.operands[place]]
            elif given.opcode in ("copy", "bitcast"):
                given = here[given.operands[0]]
            else:
                given = None
        return 0 if given is None else int(given.argument)


def read(text: str) -> Module:
    """The module that a compiled program's text describes.

    Raises:
        ValueError: the text has no entry computation.
    """
    computations: dict[str, dict[str, Instruction]] = {}
    entry, current = None, None
    for line in text.splitlines():
        if current is not None and line.startswith("}"):
            current = None
        elif current is not None:
            if match := _INSTRUCTION.match(line):
                one = _instruction(match)
                for name in one.operands:
                    _take_part(name, current)
                current[one.name] = one
        elif match := _COMPUTATION.match(line):
            current = computations.setdefault(match[2], {})
            entry = match[2] if match[1] else entry
    if entry is None:
        raise ValueError("no text of a compiled module: it has no ENTRY computation")
    return Module({name: list(body.values()) for name, body in computations.items()}, entry)


def _instruction(match: re.Match[str]) -> Instruction:
    root, name, kind, opcode, rest = match.groups()
    depth, end = 1, len(rest)
    for place, letter in enumerate(rest):
        depth += (letter in "({") - (letter in ")}")
        if depth == 0:
            end = place
            break
    argument = rest[:end]
    return Instruction(name, kind, opcode, tuple(_NAME.findall(argument)), argument, rest[end + 1 :], root is not None)


def _take_part(name: str, body: dict[str, Instruction]) -> None:
    """Add the instruction that a name such as `loop#2` stands for to its computation, where it is not there."""
    if "#" in name and name not in body:
        whole, _, place = name.rpartition("#")
        _take_part(whole, body)
        kind = tuple_parts(body[whole].type)[int(place)]
        body[name] = Instruction(name, kind, "get-tuple-element", (whole,), f"%{whole}", f", index={place}", False)


def tuple_parts(kind: str) -> list[str]:
    """Types of the parts of a tuple type, as written."""
    parts, depth, start = [], 0, 1
    for place, letter in enumerate(kind):
        depth += (letter in "({[") - (letter in ")}]")
        if (letter == "," and depth == 1) or (letter == ")" and depth == 0):
            parts.append(kind[start:place].strip())
            start = place + 1
    return parts


def array_bytes(kind: str) -> list[int]:
    """Bytes of each array of a type, in order, without padding of its layout."""
    return [
        math.prod(int(n) for n in shape.split(",") if n) * bits(dtype) // 8 for dtype, shape in _ARRAY.findall(kind)
    ]


def bits(dtype: str) -> int:
    """Of one number."""
    return _BITS.get(dtype) or int(re.findall(r"\d+", dtype)[0])

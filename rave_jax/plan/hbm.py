"""Bytes that a compiled TPU module moves between a chip and its HBM, at the least.

Every scheduled instruction reads its operands once and writes its result once. A slice counts with what it takes, an
update in place with what it changes, and arrays that the compiler keeps in vector memory count nothing. What a Pallas
kernel reads more than once is not seen.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator

from rave_jax.plan.hlo import Instruction, Module, bits

_ARRAY = re.compile(r"\b(pred|bf16|[csuf]\d+\w*)\[([\d,]*)\](?:\{([^}]*)\})?")
_SPACE = re.compile(r"S\((\d+)\)")
_HOST = "5"
"""The space of the host's memory, as modules number it."""
_FREE = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call", "after-all",
    "partition-id", "replica-id", "opt-barrier", "custom-call-done",
}  # fmt: skip
_THROUGH = ("bitcast", "reshape", "copy", "convert", "transpose")
_SLICES = ("dynamic-slice", "slice", "gather")


def hbm_bytes(module: Module) -> int:
    """Bytes read and written by one chip in one run of the module."""
    return sum(times * _moved(one, here, module) for times, one, here in _run(module))


def host_bytes(module: Module) -> int:
    """Bytes that go between one chip and its host in one run of the module, both ways together: of an instruction that
    has arrays here and there, the fewer of the two."""
    total = 0
    for times, one, here in _run(module):
        if _is_free(one):
            continue
        # The type of what is started holds its operands too.
        operands = () if one.opcode.endswith("-start") else one.operands
        kinds = [one.type, *(here[name].type for name in operands if name in here)]
        there, present = (sum(_in_space(kind, host) for kind in kinds) for host in (True, False))
        total += times * min(there, present)
    return total


def _run(module: Module) -> Iterator[tuple[int, Instruction, dict[str, Instruction]]]:
    """(how often it runs, instruction, all of its computation by name), without what is part of an instruction."""
    inside = _inside(module)
    for name, body in module.computations.items():
        if name in inside or not module.times[name]:
            continue
        here = {one.name: one for one in body}
        for one in body:
            yield module.times[name], one, here


def _is_free(one: Instruction) -> bool:
    """Does it move nothing? What is asynchronous counts where it starts."""
    return one.opcode in _FREE or one.opcode == "async-update" or one.opcode.endswith("-done")


def _in_space(kind: str, host: bool) -> int:
    """Bytes of the arrays of a type that lie in the host's memory, or that lie elsewhere; of numbers alone, none."""
    total = 0
    for dtype, shape, layout in _ARRAY.findall(kind):
        space = _SPACE.search(layout)
        if shape and (space is not None and space[1] == _HOST) == host:
            total += math.prod(int(n) for n in shape.split(",") if n) * bits(dtype) // 8
    return total


def _inside(module: Module) -> set[str]:
    """Computations that are part of an instruction, such as a fusion's or one that is started."""
    return module.with_called(
        name for caller, name in module.calls() if caller.opcode not in ("while", "conditional", "call")
    )


def in_hbm(kind: str) -> int:
    """Bytes of the arrays of a type that lie in HBM."""
    total = 0
    for dtype, shape, layout in _ARRAY.findall(kind):
        if not _SPACE.search(layout):
            total += math.prod(int(n) for n in shape.split(",") if n) * bits(dtype) // 8
    return total


def _moved(one: Instruction, here: dict[str, Instruction], module: Module) -> int:
    operands = [here[name].type for name in one.operands if name in here]
    if _is_free(one):
        return 0
    if one.opcode in _SLICES:
        return 2 * in_hbm(one.type)
    if one.opcode == "dynamic-update-slice":
        return 2 * in_hbm(operands[1])
    if one.opcode.endswith(("-start", "call-update")):  # the type holds what goes in and what comes out
        return in_hbm(one.type)
    if (fusion := _called(one, module)) is not None:
        return _of_fusion(one, operands, fusion)
    return in_hbm(one.type) + sum(map(in_hbm, operands))


class _Fusion:
    """A fused computation: what it reads of each parameter, and what it writes of each result."""

    def __init__(self, module: Module, name: str):
        self._module = module
        self._inside = {each.name: each for each in module.computations[name]}
        self._users: dict[str, list[Instruction]] = {}
        for each in self._inside.values():
            for operand in dict.fromkeys(each.operands):
                self._users.setdefault(operand, []).append(each)
        self.parameters = {int(each.argument): each for each in self._inside.values() if each.opcode == "parameter"}
        root = next(each for each in self._inside.values() if each.root)
        self.results = [self._inside[name] for name in root.operands] if root.opcode == "tuple" else [root]

    def read(self, value: Instruction, whole: int) -> int:
        """Bytes of a value that are read: those of its slices, where it is only sliced."""
        total = 0
        for user in self._users.get(value.name, []):
            place = user.operands.index(value.name)
            if user.opcode in _SLICES and place == 0:
                total += _bytes(user.type)
            elif user.opcode == "tuple" or (user.opcode == "dynamic-update-slice" and place == 0):
                continue
            elif user.opcode in _THROUGH:
                total += self.read(user, whole)
            elif (nested := _called(user, self._module)) is not None:
                total += nested.read(nested.parameters[place], whole)
            else:
                return whole
        return min(total, whole)

    def written(self, result: Instruction) -> int | None:
        """Bytes of a result that are written: of one that is changed in place what changes; None for all of it."""
        while result.opcode in _THROUGH and result.operands[0] in self._inside:
            result = self._inside[result.operands[0]]
        if result.opcode == "parameter":
            return 0
        if result.opcode == "dynamic-update-slice" and result.operands[1] in self._inside:
            return _bytes(self._inside[result.operands[1]].type)
        if result.opcode == "get-tuple-element" and result.operands[0] in self._inside:
            source, place = self._inside[result.operands[0]], int(result.attribute(r"index=(\d+)") or 0)
        else:
            source, place = result, 0
        nested = _called(source, self._module)
        return None if nested is None or place >= len(nested.results) else nested.written(nested.results[place])


def _called(one: Instruction, module: Module) -> _Fusion | None:
    names = one.called.get("calls", []) if one.opcode == "fusion" else []
    return _Fusion(module, names[0]) if names and names[0] in module.computations else None


def _of_fusion(one: Instruction, operands: list[str], fusion: _Fusion) -> int:
    total = 0
    for place, kind in enumerate(operands):
        if (whole := in_hbm(kind)) and place in fusion.parameters:
            total += fusion.read(fusion.parameters[place], whole)
    kinds = [match[0] for match in _ARRAY.finditer(one.type)]
    if len(kinds) != len(fusion.results):
        return total + in_hbm(one.type)
    for result, kind in zip(fusion.results, kinds, strict=True):
        whole, changed = in_hbm(kind), fusion.written(result)
        total += whole if changed is None else min(whole, changed)
    return total


def _bytes(kind: str) -> int:
    """Of the arrays of a type inside a fusion, which have no place in memory of their own."""
    return sum(
        math.prod(int(n) for n in shape.split(",") if n) * bits(dtype) // 8 for dtype, shape, _ in _ARRAY.findall(kind)
    )

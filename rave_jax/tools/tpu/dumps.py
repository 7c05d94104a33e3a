"""Reads what libtpu's compiler dumps beside a program: cycle estimates and instruction bundles.

The flags and formats are libtpu's own and may change without notice; 0.0.48 to 0.0.51 have these.
"""

from __future__ import annotations

import re
from itertools import pairwise
from pathlib import Path

from rave_jax.tools.tpu.result import Bundles, Stretch

_USE = "final_hlo-static-per-bundle-utilization"
_TEXT = "final_bundles"
_CYCLES = re.compile(r'hlo_op_name: "([^"]+)"\s+estimated_cycles: (\d+)')
_NAME = re.compile(rf"^(\d+-.+)-\d+-{_USE}\.txt$")
_BUNDLE = re.compile(r"^\s*(0x[0-9a-f]+|0)\s+([A-Z]{2})?\s*:(.*)$")
_NOT_OPS = ("TLP", "<late-")  # the program around the ops: its start, its end


def flags(folder: Path, *, cycles: bool, bundles: bool) -> str:
    """LIBTPU_INIT_ARGS that make the compiler write what `read_cycles` and `read_bundles` read.

    Args:
        folder: exists; gets the files of every program compiled, under names that the next program overwrites.
        cycles: estimate cycles. Takes seconds for grids of hundreds of steps, and can kill the compiler.
        bundles: dump instruction bundles.
    """
    parts = []
    if cycles:
        parts.append(f"--xla_jf_dump_static_llo_profile_to={folder}")
    if bundles:
        parts += [f"--xla_jf_dump_to={folder}", "--xla_jf_dump_llo_text=true"]
        parts.append(f"--xla_jf_dump_llo_pass_label_regex={_USE}|{_TEXT}")
    return " ".join(parts)


def read_cycles(folder: Path) -> dict[str, int]:
    """HLO op -> estimated cycles."""
    texts = [path.read_text() for path in folder.glob("*static_llo_profile.textproto")]
    return {op: int(count) for text in texts for op, count in _CYCLES.findall(text)}


def read_bundles(folder: Path) -> dict[str, Bundles]:
    """HLO op -> its bundles.

    Raises:
        ValueError: the files are not in the form known here.
    """
    found = {}
    for path in sorted(folder.iterdir()):
        if match := _NAME.match(path.name):
            op = match[1].split("-", 1)[1]
            if not op.startswith(_NOT_OPS):
                texts = [p for p in folder.glob(f"{match[1]}-*-{_TEXT}.txt") if "schedule-analysis" not in p.name]
                if len(texts) != 1:
                    raise ValueError(f"{op}: {len(texts)} dumps of its bundles, expected one")
                found[op] = _bundles(path.read_text(), texts[0].read_text())
    return found


def _bundles(use: str, text: str) -> Bundles:
    lines = use.splitlines()  # a title, the slots, their capacities, a title, then a line per bundle
    slots = [slot.strip() for slot in lines[1].split(",")]
    capacity = [int(n) for n in lines[2].split()]
    rows = [[int(n) for n in line.split()] for line in lines[4:] if line.strip()]
    starts = _starts(text)
    if starts[-1] != len(rows):
        raise ValueError(f"{starts[-1]} bundles in the text, {len(rows)} in the table of their use")

    def stretch(start: int, end: int) -> Stretch:
        sums = [sum(column) for column in zip(*rows[start:end], strict=True)]
        count = end - start
        used = {slot: n / (most * count) for slot, n, most in zip(slots, sums, capacity, strict=True)}
        return Stretch(count, used, sums[slots.index("VSTORE:SPILL")])

    longest = max(pairwise(starts), key=lambda ends: ends[1] - ends[0])
    return Bundles(stretch(0, len(rows)), stretch(*longest))


def _starts(text: str) -> list[int]:
    """Where stretches without a branch begin, and the number of bundles."""
    starts, count = [0], 0
    for line in text.splitlines():
        if match := _BUNDLE.match(line):
            address, target, body = match.groups()
            if int(address, 16) != count:
                raise ValueError(f"bundle {count} is missing before {address}")
            if target and starts[-1] != count:
                starts.append(count)
            count += 1
            if "sbr.rel" in body:
                starts.append(count)
        elif "sbr.rel" in line and starts[-1] != count:  # a bundle may go over several lines
            starts.append(count)
    return starts if starts[-1] == count else [*starts, count]

"""What the compiler writes down of a module, and when it is there to read."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from rave_jax.plan.assigned import Assigned, read_assigned, until_assigned

REPORT = """
Memory Space: default (color=0)
Total bytes: 9299968 (8.87MiB)
  cumulative_size;       size;       offset; used_by_n_values; shapes_list
Memory Space: vmem (color=1)
Total bytes: 33554432 (32.00MiB)
Memory Space: cmem (color=5)
Total bytes: 4096 (4.0KiB)
"""
MODULE = "HloModule jit_step\n\nENTRY %main () -> f32[] {\n}\n"
PART = "module_0000.jit_step.cl_1.after_optimizations"


def write(folder: Path, *endings: str) -> None:
    for ending in endings:
        (folder / f"{PART}{ending}.txt").write_text(REPORT if "report" in ending else MODULE)


def test_nothing_is_read_before_all_of_it_is_there(tmp_path) -> None:
    write(tmp_path, "_before_buffer_assignment", "-memory-usage-report")
    assert read_assigned(tmp_path) is None and read_assigned(tmp_path / "none") is None
    write(tmp_path, "")
    module = tmp_path / f"{PART}.txt"
    assert read_assigned(tmp_path) is None, "it was written just now, and there may be more"
    os.utime(module, (0, 0))
    assert read_assigned(tmp_path) == Assigned(MODULE, 9299968, 4096)
    module.write_text(MODULE[:30])
    os.utime(module, (0, 0))
    assert read_assigned(tmp_path) is None, "a half"


def test_a_compile_is_not_waited_for_once_arrays_have_their_places(tmp_path) -> None:
    ends = threading.Event()

    def compile_it() -> None:
        write(tmp_path, "-memory-usage-report", "")
        ends.wait(60)

    assert until_assigned(compile_it, tmp_path).hbm == 9299968
    ends.set()


def test_what_the_compiler_raises_before_is_raised(tmp_path) -> None:
    def refuse() -> None:
        raise MemoryError("too large")

    with pytest.raises(MemoryError, match="too large"):
        until_assigned(refuse, tmp_path)
    with pytest.raises(RuntimeError, match="has written no module"):
        until_assigned(lambda: None, tmp_path)

"""A job that fails ends with one line."""

from __future__ import annotations

import jax
import pytest

from rave_jax.parallel.hosts import HostsConfig
from rave_jax.tools.job import EXIT_FAILED, run_job


def test_devices_without_memory_are_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    def work(_: object) -> None:
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 8 bytes.\nand a stack")

    assert run_job("train.py", HostsConfig(), 0, work) == EXIT_FAILED
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(
        "train.py: the memory of the devices ran out: RESOURCE_EXHAUSTED: Out of memory allocating 8"
    )
    assert "docs/troubleshooting.md" in line


def test_a_fault_of_the_program_keeps_its_stack() -> None:
    def work(_: object) -> None:
        raise jax.errors.JaxRuntimeError("INTERNAL: a fault")

    with pytest.raises(jax.errors.JaxRuntimeError, match="a fault"):
        run_job("train.py", HostsConfig(), 0, work)

"""What the compiler says of a step that it refuses."""

from __future__ import annotations

from rave_jax.plan.compile import why
from rave_jax.plan.worker import wanted_bytes


def test_a_step_that_is_too_large_says_what_it_wants() -> None:
    said = (
        "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total memory required for HLO "
        "temporaries (16.12G) exceeds available HBM (15.75G). HLO module: jit_step."
    )
    assert wanted_bytes(said) == int(16.12 * 2**30)
    older = "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 62.31G of 15.75G hbm. Exceeded by 46.56G."
    assert wanted_bytes(older) == int(62.31 * 2**30)


def test_another_refusal_is_none_of_size() -> None:
    assert wanted_bytes("INTERNAL: Mosaic failed to compile TPU kernel: reshape not supported") is None
    vector = "RESOURCE_EXHAUSTED: Ran out of memory in memory space vmem. 17.0M of 16.0M, exceeded by 1.0M."
    assert wanted_bytes(vector) is None


def test_the_line_that_says_why_is_that_of_the_exception() -> None:
    """Jax writes of its traceback behind it."""
    assert why("Traceback:\n  File x\njax.errors.JaxRuntimeError: INTERNAL: no\n\nFor simplicity, ...\n") == (
        "jax.errors.JaxRuntimeError: INTERNAL: no"
    )
    assert why("F1130 check failed\n") == "F1130 check failed" and why("") == "it said nothing"

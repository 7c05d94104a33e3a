"""The TPU compiler takes the kernels of routed attention, and no map of all pairs is in what they compile to."""

from __future__ import annotations

from typing import Any

import pytest

from rave_jax.tools.tpu import TOPOLOGIES, Case, compile_cases
from tests.kernels.test_tpu_compile import KINDS

LONG = 2048
SMALLEST = "v5p"
"""The chip with the least memory beside its units. What a chip decides are the sizes, which `training` has on all."""
CASES: dict[str, dict[str, Any]] = {
    "training": {"tokens": LONG, "regions": 8, "most_keys": 128, "group": 7, "terms": "log_gate"},
    "what is left over": {
        "tokens": 300,
        "regions": 12,
        "most_keys": 36,
        "group": 2,
        "head_dim": 64,
        "dtype": "float32",
        "share": "head",
        "terms": "bent_score+distance",
        "rank": 4,
    },
}


@pytest.mark.slow
@pytest.mark.tpu_compiler
@pytest.mark.parametrize(
    ("chip", "name"), [*((chip, "training") for chip in TOPOLOGIES), (SMALLEST, "what is left over")]
)
def test_the_kernels_compile(chip: str, name: str) -> None:
    """A minute or two each: the work of an item is one long program. A test each, so that two workers share them."""
    case = Case(name, "tests.kernels.routed_programs:step", {"kind": KINDS[chip], **CASES[name]})
    result = compile_cases(chip, [case], hlo=True)[name]
    assert result.error is None
    assert "routed_forward" in result.hlo and "routed_backward" in result.hlo
    assert {x for x in result.arrays if sum(n >= LONG for n in x.shape) > 1} == set()

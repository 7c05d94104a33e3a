"""The Pallas kernels compile for every TPU we know, and no map of all pairs is in what they compile to."""

from __future__ import annotations

from typing import Any

import pytest

from rave_jax.kernels.attention.tuning import BY_DEVICE_KIND
from rave_jax.tools.tpu import TOPOLOGIES, Case, compile_cases

KINDS = {"v5e": "TPU v5 lite", "v5p": "TPU v5", "v6e": "TPU v6 lite", "tpu7x": "TPU7x"}
LONG, LONGEST = 2048, 131072
CASES: dict[str, dict[str, Any]] = {
    "training": {"queries": LONG, "keys": LONG, "group": 2},
    "the longest row": {"queries": LONGEST, "keys": LONGEST, "group": 1},
    "decoding": {"queries": 1, "keys": LONG, "group": 7, "form": "tanh", "rank": 8, "forward_only": True},
    "a gradient through few queries": {"queries": 8, "keys": 200, "group": 1, "form": "linear", "head_dim": 64},
    "linear": {"queries": 200, "keys": 200, "group": 7, "form": "linear", "rank": 64, "key_bias": True},
    "gain": {"queries": 200, "keys": 200, "group": 2, "form": "centered_sigmoid+distance", "rank": 24, "head_dim": 80},
    "float32": {"queries": 200, "keys": 200, "group": 1, "dtype": "float32", "head_dim": 256, "rank": 32},
    "float32 linear": {"queries": 200, "keys": 8, "group": 1, "dtype": "float32", "form": "linear", "kv_heads": 2},
    "no gate": {"queries": 200, "keys": 200, "group": 8, "form": None, "head_dim": 96, "rows": 2},
    "a user's functions": {"queries": 200, "keys": 200, "group": 2, "form": "bent_score+distance", "rank": 5},
    "key bias alone": {"queries": 8, "keys": 200, "group": 7, "form": None, "key_bias": True, "forward_only": True},
    "tanh": {"queries": 8, "keys": 8, "group": 7, "form": "tanh+soft_cap", "kv_heads": 2},
}


def test_every_chip_has_a_name_here() -> None:
    assert set(KINDS) == set(TOPOLOGIES) and set(KINDS.values()) <= set(BY_DEVICE_KIND)


@pytest.mark.tpu_compiler
@pytest.mark.parametrize("chip", TOPOLOGIES)
def test_the_kernels_compile(chip: str) -> None:
    make = "tests.kernels.tpu_programs:step"
    cases = [Case(name, make, {"kind": KINDS[chip], **arguments}) for name, arguments in CASES.items()]
    found = compile_cases(chip, cases, hlo=True)
    assert {name: result.error for name, result in found.items() if result.error} == {}
    for name, result in found.items():
        queries, keys = CASES[name]["queries"], CASES[name]["keys"]
        if min(queries, keys) >= LONG:
            maps = {x for x in result.arrays if sum(n >= LONG for n in x.shape) > 1}
            assert maps == set(), name
            assert result.memory is not None
            operands = result.memory.arguments + result.memory.outputs
            assert result.memory.temporaries <= 2 * operands, name
            assert "attention_forward" in result.hlo and "attention_backward" in result.hlo

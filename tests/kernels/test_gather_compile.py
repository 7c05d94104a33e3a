"""The TPU compiler takes the kernel for chosen regions, and the compiled program copies no cache."""

from __future__ import annotations

import re
from typing import Any

import pytest

from rave_jax.tools.tpu import TOPOLOGIES, Case, compile_cases

LONG = 2048
CASES: dict[str, dict[str, Any]] = {
    "per group": {"regions": LONG, "entries": 40, "most": 64},
    "per head": {"regions": LONG, "entries": 40, "most": 64, "apart": True, "form": "log_gate"},
    "one region": {"regions": 1, "entries": 8, "most": 1, "group": 1, "kv_heads": 1},
    "large regions": {"regions": 16, "entries": 1024, "most": 4, "form": "tanh+soft_cap"},
    "largest regions": {"regions": 4, "entries": 4096, "most": 2, "dtype": "float32"},
    "longest list": {"regions": 256, "entries": 8, "most": 256, "rows": 64, "kv_heads": 4, "group": 1},
    "small regions": {"regions": 64, "entries": 8, "most": 40, "form": "linear", "rank": 8, "rows": 2},
    "wide values": {"regions": 64, "entries": 48, "most": 8, "value_dim": 256, "group": 3},
    "float32": {
        **{"regions": 64, "entries": 40, "most": 8, "dtype": "float32", "apart": True},
        "form": "centered_sigmoid+bent_score",
    },
}


@pytest.mark.tpu_compiler
@pytest.mark.parametrize("chip", TOPOLOGIES)
def test_the_kernel_compiles(chip: str) -> None:
    cases = [Case(name, "tests.kernels.gather_programs:decode", arguments) for name, arguments in CASES.items()]
    found = compile_cases(chip, cases, hlo=True)
    assert {name: result.error for name, result in found.items() if result.error} == {}
    for name, result in found.items():
        assert "gather_attention" in result.hlo
        if CASES[name]["regions"] == LONG:
            # Neither into other memory nor into another layout.
            assert not re.search(rf"bf16\[1,2,{LONG},40,128\]\S*( copy|.* copy-start)", result.hlo), name
            # With terms, what is gathered of them is there beside, its lanes padded, and on v5p a second time for the
            # product of float32 numbers: 47.1 MB.
            keys, share = 2 * LONG * 40 * 128 * 2, 1.2 if chip == "v5p" and "form" in CASES[name] else 0.75
            assert result.memory is not None and result.memory.temporaries < share * keys, name

"""The TPU compiler takes regions in host memory: chosen ones are copied from there, and the rest is never brought."""

from __future__ import annotations

import re
from typing import Any

import pytest

from rave_jax.tools.tpu import Case, compile_cases

MANY = 2048
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "bfloat16": ("decode_from_host", {"regions": MANY, "entries": 36, "most": 16}),
    # Arrays of int8 whose tiles are not 8 x 128 would be reordered on the device.
    "int8": ("decode_from_host", {"regions": MANY, "entries": 32, "most": 16, "dtype": "int8"}),
    "a prompt": ("read_from_host", {"regions": MANY, "entries": 36, "reach": 64}),
}


@pytest.mark.tpu_compiler
def test_only_what_is_read_is_copied_from_the_host() -> None:
    cases = [Case(name, f"tests.kernels.gather_programs:{make}", given) for name, (make, given) in CASES.items()]
    found = compile_cases("v5e", cases, hlo=True)
    assert {name: result.error for name, result in found.items() if result.error} == {}
    for name, result in found.items():
        assert "dynamic-slice-start" in result.hlo, name
        # Arrays with all regions of a layer or of all layers. Memory space 5 is the host's; what has no tiles stands in
        # a computation of the host.
        sizes = "|".join(str(n * MANY) for n in (1, 4, 8, 12, 24))
        whole = rf"\w+\[[\d,]*\b({sizes}),(\d+,)+128\]{{[^}}]*:T[^}}]*}}"
        kept = {match[0] for match in re.finditer(whole, result.hlo)}
        assert kept and all("S(5)" in array for array in kept), (name, kept)

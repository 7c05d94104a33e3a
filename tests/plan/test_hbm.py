"""Bytes between a chip and its HBM, counted from the text of a compiled module."""

from __future__ import annotations

from rave_jax.plan import hlo
from rave_jax.plan.hbm import hbm_bytes, host_bytes, in_hbm

MODULE = """
%slice_of_stack (p.0: f32[8,64], p.1: s32[]) -> f32[1,64] {
  %p.0 = f32[8,64]{1,0} parameter(0)
  %p.1 = s32[]{:S(2)} parameter(1)
  ROOT %cut = f32[1,64]{1,0} dynamic-slice(%p.0, %p.1, %p.1), dynamic_slice_sizes={1,64}
}

%write_to_stack (p.2: f32[8,64], p.3: f32[1,64], p.4: s32[]) -> f32[8,64] {
  %p.2 = f32[8,64]{1,0} parameter(0)
  %p.3 = f32[1,64]{1,0} parameter(1)
  %p.4 = s32[]{:S(2)} parameter(2)
  ROOT %put = f32[8,64]{1,0} dynamic-update-slice(%p.2, %p.3, %p.4, %p.4)
}

%outer (p.5: f32[8,64], p.6: f32[1,64], p.7: s32[]) -> (f32[8,64], f32[1,64]) {
  %p.5 = f32[8,64]{1,0} parameter(0)
  %p.6 = f32[1,64]{1,0} parameter(1)
  %p.7 = s32[]{:S(2)} parameter(2)
  %nested = f32[8,64]{1,0} fusion(%p.5, %p.6, %p.7), kind=kLoop, calls=%write_to_stack
  %twice = f32[1,64]{1,0} add(%p.6, %p.6)
  ROOT %both = (f32[8,64]{1,0}, f32[1,64]{1,0}) tuple(%nested, %twice)
}

ENTRY %main (a: f32[8,64], b: f32[1,64], i: s32[]) -> f32[1,64] {
  %a = f32[8,64]{1,0} parameter(0)
  %b = f32[1,64]{1,0} parameter(1)
  %i = s32[]{:S(2)} parameter(2)
  BODY
}
"""
ROW, STACK = 64 * 4, 8 * 64 * 4


def moved(body: str) -> int:
    return hbm_bytes(hlo.read(MODULE.replace("BODY", body)))


def test_an_instruction_reads_its_operands_and_writes_its_result() -> None:
    assert moved("ROOT %sum = f32[1,64]{1,0} add(%b, %b)") == 3 * ROW
    assert moved("ROOT %dot = f32[1,8]{1,0} custom-call(%b, %a)") == ROW + STACK + 8 * 4


def test_a_slice_of_a_stack_counts_with_what_it_takes() -> None:
    assert moved("ROOT %one = f32[1,64]{1,0} fusion(%a, %i), kind=kLoop, calls=%slice_of_stack") == 2 * ROW


def test_an_update_in_place_counts_with_what_it_changes() -> None:
    assert moved("ROOT %one = f32[8,64]{1,0} fusion(%a, %b, %i), kind=kLoop, calls=%write_to_stack") == 2 * ROW
    nested = "ROOT %one = (f32[8,64]{1,0}, f32[1,64]{1,0}) fusion(%a, %b, %i), kind=kLoop, calls=%outer"
    assert moved(nested) == 3 * ROW, "inside a fusion of a fusion too"


def test_vector_memory_counts_nothing() -> None:
    assert moved("ROOT %sum = f32[1,64]{1,0:T(8,128)S(1)} add(%b, %b)") == 2 * ROW
    assert in_hbm("(bf16[4,8]{1,0:T(8,128)(2,1)}, bf16[4,8]{1,0:T(8,128)(2,1)S(1)}, u32[]{:S(2)})") == 64


def test_what_goes_to_the_host_and_back_counts_once() -> None:
    """Space 5 is the memory of the host: a copy counts with its array, a slice of a stack there with the slice."""
    there = "f32[1,64]{1,0:S(5)}"
    away = f"%away = ({there}, f32[1,64]{{1,0}}, u32[]) copy-start(%b)"
    ended = f"%there = {there} copy-done(%away)"
    back = "ROOT %back = f32[1,64]{1,0} copy(%there)"
    module = MODULE.replace("BODY", "\n  ".join([away, ended, back]))
    assert host_bytes(hlo.read(module)) == 2 * ROW
    stack = MODULE.replace("%a = f32[8,64]{1,0} parameter(0)", "%a = f32[8,64]{1,0:S(5)} parameter(0)")
    cut = "ROOT %one = f32[1,64]{1,0} fusion(%a, %i), kind=kLoop, calls=%slice_of_stack"
    assert host_bytes(hlo.read(stack.replace("BODY", cut))) == ROW
    assert host_bytes(hlo.read(MODULE.replace("BODY", cut))) == 0

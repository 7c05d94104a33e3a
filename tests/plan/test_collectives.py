"""Collectives are read from the text of a compiled module: kind, axes, bytes, asynchronous or not, how often."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from rave_jax.plan import hlo
from rave_jax.plan.collectives import Collective, axes_of, read_collectives, traffic
from rave_jax.plan.hbm import hbm_bytes

MESH = {"data": 1, "fsdp": 2, "tensor": 2}
MODULE = (Path(__file__).parent / "module.hlo").read_text()
"""Shortened from what libtpu writes: loops, and a collective in each form."""


@pytest.fixture(scope="module")
def found() -> list[Collective]:
    return read_collectives(MODULE, MESH)


def the(found: list[Collective], kind: str, *axes: str) -> Collective:
    (one,) = [one for one in found if one.kind == kind and one.axes == axes]
    return one


def test_every_collective_is_found_once(found: list[Collective]) -> None:
    """That of an asynchronous fusion, which the module writes three times, and none of a single chip."""
    assert sorted((one.kind, one.axes, one.asynchronous, one.times) for one in found) == [
        ("all-gather", ("fsdp",), True, 27),
        ("all-reduce", ("fsdp", "tensor"), False, 1),
        ("all-reduce", ("tensor",), False, 27),
        ("collective-permute", ("fsdp", "tensor"), True, 1),
        ("reduce-scatter", ("fsdp",), False, 1),
    ]
    assert the(found, "all-gather", "fsdp").where == "layer/mlp"


SPARSE_CORES = """
%gather (x: bf16[16,8]) -> bf16[32,8] {
  %x = bf16[16,8]{1,0} parameter(0)
  ROOT %all-gather = bf16[32,8]{1,0} all-gather(%x), channel_id=1, replica_groups={{0,2},{1,3}}, dimensions={0}
}, execution_thread="sparsecore"

ENTRY %main (weight: bf16[16,8]) -> bf16[32,8] {
  %weight = bf16[16,8]{1,0} parameter(0)
  %start = ((), (), (s32[1]{0})) call-start(), async_execution_thread="sparsecore", to_apply=%gather
  %update = ((bf16[16,8]{1,0}), bf16[32,8]{1,0}) call-update(%start, %weight)
  ROOT %done = bf16[32,8]{1,0} call-done(%update)
}
"""


def test_what_sparse_cores_run_is_asynchronous() -> None:
    (one,) = read_collectives(SPARSE_CORES, MESH)
    assert (one.kind, one.axes, one.asynchronous, one.times) == ("all-gather", ("fsdp",), True, 1)


def test_bytes_are_those_that_a_chip_sends_round_a_ring(found: list[Collective]) -> None:
    gather = the(found, "all-gather", "fsdp")
    assert (gather.size, gather.sent, gather.sent_in_all) == (128 * 8 * 2, 128 * 8, 27 * 128 * 8)
    scatter = the(found, "reduce-scatter", "fsdp")
    assert (scatter.size, scatter.sent) == (128 * 8 * 4, 64 * 8 * 4)
    several = the(found, "all-reduce", "tensor")
    assert (several.size, several.sent) == ((64 + 4) * 4, (64 + 4) * 4)
    assert the(found, "all-reduce", "fsdp", "tensor").sent == 2 * 256 * 3 / 4
    assert the(found, "collective-permute", "fsdp", "tensor").sent == 256


def test_collectives_that_are_alike_are_added_up(found: list[Collective]) -> None:
    rows = traffic([*found, *found])
    assert [row.kind for row in rows][:2] == ["all-gather", "all-reduce"], "what sends most comes first"
    assert (rows[0].count, rows[0].times, rows[0].sent) == (2, 54, 54 * 1024)


@pytest.mark.parametrize(
    ("written", "groups"),
    [
        ("[2,2]<=[4]", [[0, 1], [2, 3]]),
        ("[2,2]<=[2,2]T(1,0)", [[0, 2], [1, 3]]),
        ("mesh['a'=2,'b'=2] {'a'}", [[0, 2], [1, 3]]),
        ("mesh['a'=2,'b'=2] {'b','a'}", [[0, 2, 1, 3]]),
        ("mesh['a'=4] {'a':(1)2}", [[0, 2], [1, 3]]),
        ("mesh['a'=4] {'a':(2)2}", [[0, 1], [2, 3]]),
        ("{{0,3},{1,2}}", [[0, 3], [1, 2]]),
    ],
)
def test_groups_are_read_in_every_form(written: str, groups: list[list[int]]) -> None:
    text = (
        "ENTRY %main (p: f32[8]) -> f32[8] {\n"
        "  %p = f32[8]{0} parameter(0)\n"
        f"  ROOT %sum = f32[8]{{0}} all-reduce(%p), channel_id=1, replica_groups={written}, to_apply=%add\n"
        "}\n"
    )
    (one,) = read_collectives(text, MESH)
    assert one.groups.tolist() == groups
    with pytest.raises(ValueError, match="it names chip 3, and the mesh has 2"):
        read_collectives(text, {"data": 1, "fsdp": 2, "tensor": 1})
    with pytest.raises(ValueError, match="sum: replica groups in a form not known here: "):
        read_collectives(text.replace(written, "?"), MESH)


def test_axes_are_those_along_which_members_differ() -> None:
    mesh = {"data": 2, "fsdp": 4, "tensor": 2}
    chips = np.arange(16).reshape(2, 4, 2)
    assert axes_of(chips.transpose(0, 2, 1).reshape(-1, 4), mesh) == ("fsdp",)
    assert axes_of(chips.transpose(1, 0, 2).reshape(4, 4), mesh) == ("data", "tensor")
    assert axes_of(chips[:, :2].transpose(0, 2, 1).reshape(-1, 2), mesh) == ("fsdp",), "half of an axis"


def test_a_loop_whose_end_is_not_a_constant_counts_once_and_is_named() -> None:
    unknown = MODULE.replace("%end = s32[]{:T(128)} constant(28)", "%end = s32[] get-tuple-element(%s.1), index=0")
    module = hlo.read(unknown)
    assert module.uncounted == ["while.1"]
    assert module.times["body"] == 1
    assert hlo.read(MODULE).uncounted == []


STARTED = """
%gathered (p.0: bf16[2,8]) -> bf16[8,8] {
  %p.0 = bf16[2,8]{1,0} parameter(0)
  ROOT %all-gather.1 = bf16[8,8]{1,0} all-gather(%p.0), channel_id=1, replica_groups={{0,1,2,3}}, dimensions={0}
}

%wrapped (p.1: bf16[2,8]) -> bf16[8,8] {
  %p.1 = bf16[2,8]{1,0} parameter(0)
  ROOT %call.1 = bf16[8,8]{1,0} call(%p.1), to_apply=%gathered
}

ENTRY %main (a: bf16[2,8]) -> bf16[8,8] {
  %a = bf16[2,8]{1,0} parameter(0)
  %start = ((bf16[2,8]{1,0}), bf16[8,8]{1,0}) async-start(%a), calls=%wrapped
  %update = ((bf16[2,8]{1,0}), bf16[8,8]{1,0}) async-update(%start)
  ROOT %done = bf16[8,8]{1,0} async-done(%update)
}
"""


def test_what_is_called_by_what_is_started_is_asynchronous_and_moves_its_bytes_once() -> None:
    (one,) = read_collectives(STARTED, {"fsdp": 4})
    assert one.asynchronous and one.times == 1
    assert hbm_bytes(hlo.read(STARTED)) == 2 * 8 * 2 + 8 * 8 * 2
    assert hbm_bytes(hlo.read(SPARSE_CORES)) == 16 * 8 * 2 + 32 * 8 * 2 + 4, "and a number of its own"


def test_what_goes_between_slices_is_sent_by_way_of_the_hosts() -> None:
    """Two slices of two chips: each chip sends its array to the one in its place, asynchronously."""
    sent = '_xla_host_transfer_handler_name="xla_megascale_runtime",_xla_megascale_transfer_type="ALL_REDUCE"'
    text = f"""
ENTRY %main (a: bf16[8,128]) -> token[] {{
  %a = bf16[8,128]{{1,0}} parameter(0)
  %t = token[] after-all()
  %s = (bf16[8,128]{{1,0}}, u32[]{{:S(2)}}, token[]) send(%a, %t), channel_id=1, frontend_attributes={{{sent}}}
  ROOT %done = token[] send-done(%s), channel_id=1
}}
"""
    (one,) = read_collectives(text, {"data": 2, "fsdp": 2}, slices=[0, 0, 1, 1])
    assert (one.kind, one.axes, one.members, one.asynchronous) == ("all-reduce", ("data",), 2, True)
    assert one.groups.tolist() == [[0, 2], [1, 3]] and one.size == one.sent == 8 * 128 * 2
    with pytest.raises(ValueError, match="kind not known here: BROADCAST"):
        read_collectives(text.replace("ALL_REDUCE", "BROADCAST"), {"data": 2, "fsdp": 2}, slices=[0, 0, 1, 1])


def test_a_part_of_a_tuple_may_stand_by_its_place_alone() -> None:
    """As in what the compiler dumps: `%loop#1#0` is an instruction that takes a part, and so is what it takes it of."""
    text = """
ENTRY %main (p: (s32[], (f32[8,4], bf16[2]))) -> f32[8,4] {
  %p = (s32[]{:T(128)}, (f32[8,4]{1,0:T(8,128)(2,1)}, bf16[2]{0})) parameter(0)
  ROOT %sum = f32[8,4]{1,0:T(8,128)} add(%p#1#0, %p#1#0)
}
"""
    parameter, part, number, total = hlo.read(text).computations["main"]
    assert (part.name, part.opcode, part.operands) == ("p#1", "get-tuple-element", ("p",))
    assert (number.operands, number.type) == (("p#1",), "f32[8,4]{1,0:T(8,128)(2,1)}")
    assert number.attribute(r"index=(\d+)") == "0" and total.operands == ("p#1#0", "p#1#0")
    assert hlo.tuple_parts(parameter.type) == ["s32[]{:T(128)}", part.type]


def test_a_text_that_is_no_module_is_refused() -> None:
    with pytest.raises(ValueError, match="no ENTRY computation"):
        read_collectives("module @jit_step {}", MESH)

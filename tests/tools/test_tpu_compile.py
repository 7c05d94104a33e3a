"""libtpu's compiler in processes of their own: what it says, and what becomes of cases when it dies."""

from __future__ import annotations

import subprocess
import sys

import pytest

from rave_jax.tools.tpu import TOPOLOGIES, Array, Case, Compiled, compile_cases

needs_libtpu = pytest.mark.tpu_compiler


def case(name: str, function: str, **arguments: int) -> Case:
    return Case(name, f"tests.tools.tpu_cases:{function}", arguments)


@needs_libtpu
def test_a_program_is_described_and_a_refused_one_says_why() -> None:
    cases = [case("small", "double", rows=64), case("large", "double", rows=512), case("no", "too_big")]
    found = compile_cases("v5e", [*cases, case("outer", "outer", length=256)], hlo=True, cycles=True, bundles=True)
    small, large = found["small"], found["large"]
    assert small.error is None and large.error is None
    assert small.memory is not None and small.memory.arguments == small.memory.outputs == 64 * 128 * 4
    assert small.arrays >= {Array("f32", (64, 128))} and Array("f32", (512, 128)) not in small.arrays
    assert Array("f32", (256, 256)) in found["outer"].arrays
    # An estimate follows the grid. The dumps of one case are not taken for those of the next, which bear its names.
    assert 4 < large.kernel_cycles("double") / small.kernel_cycles("double") < 12
    # What the eight rows of a step take does not depend on how many steps there are.
    body, same = small.kernel_bundles("double"), large.kernel_bundles("double")
    assert body.longest.bundles < body.whole.bundles and body.whole.spills == 0
    assert body.longest.bundles == pytest.approx(same.longest.bundles, abs=8)
    assert body.whole.used["MXU"] == 0 and 0 < body.whole.used[body.whole.fullest] <= 1
    assert found["no"].error and "vmem" in found["no"].error and found["no"].memory is None
    with pytest.raises(ValueError, match="0 ops are called 'double'"):
        found["no"].kernel_cycles("double")


@needs_libtpu
def test_the_case_that_kills_its_process_is_named_and_the_rest_compiled() -> None:
    found = compile_cases("v5e", [case("a", "double", rows=8), case("dies", "dies"), case("b", "double", rows=8)])
    assert [name for name, result in found.items() if result.error] == ["dies"]
    assert "signal 6" in str(found["dies"].error)
    assert {"a", "b"} == {name for name, result in found.items() if result.memory}
    assert found["a"].cycles == {} and found["a"].bundles == {}, "not asked for"
    with pytest.raises(ValueError, match="hlo=True"):
        _ = found["a"].arrays


@needs_libtpu
def test_a_case_that_never_ends_is_ended() -> None:
    assert "Timeout" in str(compile_cases("v5e", [case("hangs", "hangs")], limit=1)["hangs"].error)


@needs_libtpu
@pytest.mark.parametrize("chip", TOPOLOGIES)
def test_every_chip_compiles_a_kernel(chip: str) -> None:
    assert compile_cases(chip, [case("a", "double", rows=16)])["a"].error is None


@needs_libtpu
def test_two_processes_compile_at_once() -> None:
    code = (
        "from rave_jax.tools.tpu import Case, compile_cases\n"
        "r = compile_cases('v5e', [Case('a', 'tests.tools.tpu_cases:double', {'rows': 4096})], cycles=True)['a']\n"
        "assert r.error is None, r.error"
    )
    both = [subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True) for _ in range(2)]
    assert [process.communicate(timeout=300)[1] for process in both] == ["", ""]


def test_misuse_is_refused_before_anything_starts() -> None:
    with pytest.raises(ValueError, match="no chip 'v4'"):
        compile_cases("v4", [])
    with pytest.raises(ValueError, match="one name"):
        compile_cases("v5e", [case("a", "double", rows=8)] * 2)


def test_an_op_is_found_by_part_of_its_name_if_that_is_clear() -> None:
    said = Compiled(None, cycles={"attend_forward.1": 5, "attend_dq.1": 7})
    assert said.kernel_cycles("dq") == 7
    with pytest.raises(ValueError, match="2 ops"):
        said.kernel_cycles("attend")

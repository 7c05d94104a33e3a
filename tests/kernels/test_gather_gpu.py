"""The GPU kernel for chosen regions: that jax lowers it for CUDA, what it reads, what it refuses, and who takes it."""

from __future__ import annotations

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import triton
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

from rave_jax.kernels.attention import Term, Tile
from rave_jax.kernels.routed.gather import gather_attention, pallas_gpu, reference
from rave_jax.kernels.routed.gather.api import OPERATION
from rave_jax.kernels.routed.gather.base import Operands, Stack, listed, union
from rave_jax.kernels.support import interpreted
from rave_jax.parallel.mesh import AXES, MeshConfig
from rave_jax.parallel.sharding import use_mesh
from tests.kernels.drawn import PairBias
from tests.kernels.score_terms import soft_cap, terms_of

H100, T4 = "NVIDIA H100 80GB HBM3", "Tesla T4"


def operands(
    *,
    apart: bool = False,
    form: str | None = None,
    dtype: str = "float32",
    int8: bool = False,
    regions: int = 12,
    entries: int = 9,
    most: int = 7,
    group: int = 3,
    kv_heads: int = 2,
    rows: int = 1,
    widths: tuple[int, int] = (64, 64),
    rank: int = 4,
) -> Operands:
    """Every choice is full, a fifth of the entries empty. The second of two layers is meant; the first holds NaN."""
    rng = np.random.default_rng(0)
    cache = (rows, kv_heads, regions, entries)

    def normal(*shape: int) -> np.ndarray:
        return np.float32(rng.normal(size=shape))

    def stack(width: int) -> Stack:
        if int8:
            values = rng.integers(-127, 128, (2, *cache, width)).astype(np.int8)
            scale = np.stack([np.full(cache, np.nan, np.float32), abs(normal(*cache)) / 64])
            return Stack(jnp.asarray(values), jnp.asarray(scale), jnp.int32(1))
        values = np.stack([np.full((*cache, width), np.nan), normal(*cache, width)])
        return Stack(jnp.asarray(values, dtype), None, jnp.int32(1))

    chosen = np.zeros((rows, kv_heads, group if apart else 1, regions), bool)
    for at in np.ndindex(chosen.shape[:-1]):
        chosen[at][rng.choice(regions, most, replace=False)] = True
    heads = rows, kv_heads * group
    terms: Any = ()
    if form is not None:
        parts = normal(*heads, rank), normal(*cache, rank), normal(*heads), normal(*cache), normal(heads[1])
        on = (rng.random(shape) < 0.7 for shape in (heads, (rows, regions, entries)))
        terms = terms_of(PairBias(*map(jnp.asarray, (*parts, *on))), form)
    q = jnp.asarray(normal(rows, kv_heads, group, widths[0]), dtype)
    k, v = map(stack, widths)
    real = jnp.asarray(rng.random((rows, regions, entries)) < 0.8)
    return Operands(q, k, v, real, jnp.asarray(chosen), terms)


CASES: dict[str, dict[str, Any]] = {
    "per group": {"dtype": "bfloat16", "widths": (128, 128), "entries": 36, "group": 7},
    "per head": {"dtype": "bfloat16", "widths": (128, 128), "apart": True, "form": "log_gate", "rank": 16},
    "a small head": {"dtype": "bfloat16", "widths": (64, 64), "form": "tanh", "group": 1},
    "a large head": {"dtype": "bfloat16", "widths": (256, 128), "form": "linear", "group": 32},
    "float32": {"widths": (128, 256), "apart": True, "form": "centered_sigmoid"},
    "int8": {"dtype": "bfloat16", "widths": (128, 128), "int8": True, "apart": True},
    "no power of two": {"widths": (80, 96), "entries": 5, "int8": True, "rows": 2},
}


def with_term(given: Operands, function: Any) -> Operands:
    """With a function of the score alone."""
    return given._replace(terms=(Term(function),))


def on(kind: str, tensor: int = 1) -> AbstractMesh:
    """A mesh of GPUs that are not there."""
    device, sizes = AbstractDevice(kind, None, "gpu"), MeshConfig(tensor=tensor).sizes(tensor)
    return AbstractMesh(sizes, AXES, axis_types=(AxisType.Auto,) * len(AXES), abstract_device=device)


def attended(given: Operands, implementation: Any = "auto") -> Any:
    """Of a layer's operands, through the public function."""
    q, k, v, real, chosen, terms = given
    heads = q.reshape(q.shape[0], -1, q.shape[-1])
    return gather_attention(heads, k, v, real, chosen, 7, terms, scale=0.1, implementation=implementation)


@pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated")
@pytest.mark.parametrize("tensor", [1, 2], ids=["one GPU", "two GPUs"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_it_lowers_for_gpus_and_reads_the_cache_where_it_lies(case: dict[str, Any], tensor: int) -> None:
    """As `auto` has it on a GPU: one kernel, and nothing else takes the stacks, whole or in part."""
    given = operands(**case)
    with use_mesh(on(H100, tensor)):
        text = jax.jit(attended).trace(given).lower(lowering_platforms=("cuda",)).as_text()
    calls = [line for line in text.splitlines() if triton.CUSTOM_CALL_TARGET_NAME in line]
    assert len(calls) == 1 and 'name = "gather_attention"' in calls[0]
    kv_heads = 2 // tensor
    B, _, R, m, _ = given.k.shape
    for stack in (given.k, given.v):
        kind = {"int8": "i8", "bfloat16": "bf16", "float32": "f32"}[stack.values.dtype.name]
        mine = f"tensor<2x{B}x{kv_heads}x{R}x{m}x{stack.shape[-1]}x{kind}>"
        assert mine in calls[0]
    widths = "|".join(str(x.shape[-1]) for x in (given.k, given.v))
    cut = re.compile(rf"tensor<[x0-9]*x{R}x{m}x({widths})x\w+>")
    assert [x for x in text.splitlines() if "stablehlo." in x and x not in calls and cut.search(x)] == []


EXAMPLES: dict[str, tuple[int, dict[str, Any]]] = {
    "entries as they come": (
        6,
        {"entries": 7, "widths": (64, 48), "form": "log_gate+bent_score+distance", "apart": True},
    ),
    "large regions, no split": (1, {"entries": 150, "most": 2, "regions": 3}),
    "int8": (4, {"entries": 36, "int8": True, "apart": True, "dtype": "bfloat16", "widths": (16, 16)}),
}


@pytest.mark.parametrize(("programs", "example"), EXAMPLES.values(), ids=EXAMPLES)
def test_programs_share_a_list_of_any_length(
    programs: int, example: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In several turns each, the last of which are not full."""
    monkeypatch.setattr(pallas_gpu, "PROGRAMS", programs)
    monkeypatch.setattr(pallas_gpu, "TILE_KEYS", 16)
    given = operands(**example)
    # The kv heads' lists have different lengths.
    given = given._replace(chosen=given.chosen & (np.arange(given.chosen.shape[3]) < np.array([[[[99]], [[2]]]])))
    R = given.chosen.shape[3]

    @jax.jit
    def both(given: Operands) -> Any:
        index, count = listed(union(given.chosen), R)
        kernel = pallas_gpu.over(given, index, count, 0.1, interpret=True)
        return kernel, reference.attention(given, R, 0.1), count

    found, expected, count = both(given)
    assert int(count.max()) * given.k.shape[3] > 3 * 16
    atol = 0.02 if given.q.dtype == jnp.bfloat16 else 1e-5
    for x, y in zip(found, expected, strict=True):
        np.testing.assert_allclose(x, y, atol=atol)


def test_nothing_is_read_behind_the_end_of_the_list() -> None:
    """Not even of an empty one: a number of no region stands there, and one of a region that holds NaN."""
    given = operands()
    index, _ = listed(union(given.chosen), 7)
    count = jnp.array([[0, 4]], jnp.int32)

    @jax.jit
    def run(given: Operands, behind: int) -> Any:
        return pallas_gpu.over(given, index.at[..., 4].set(behind), count, 0.1, interpret=True)

    found = run(given, 5000)
    np.testing.assert_array_equal(found[0][:, 0], 0)
    np.testing.assert_array_equal(found[1][:, 0], -jnp.inf)
    nan = [x._replace(values=x.values.at[:, :, :, index[0, 1, 5]].set(jnp.nan)) for x in (given.k, given.v)]
    for x, y in zip(found, run(given._replace(k=nan[0], v=nan[1]), -7), strict=True):
        assert not np.isnan(x).any()
        np.testing.assert_array_equal(x, y)


def rounded(tile: Tile) -> Any:
    """What Triton kernels do not lower."""
    return jnp.round(tile.dot)


@pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated")
def test_what_it_cannot_do_is_said() -> None:
    def refused(match: str, given: Operands, kind: str = H100) -> None:
        with use_mesh(on(kind)):
            assert OPERATION.choose("auto", given, 7) == "xla"
            with pytest.raises(ValueError, match=f"'pallas_gpu' cannot serve attention to chosen regions: .*{match}"):
                OPERATION.choose("pallas_gpu", given, 7)

    given = operands()
    with use_mesh(on(H100)):
        assert OPERATION.choose("auto", given, 7) == "pallas_gpu"
    assert OPERATION.choose("auto", given, 7) == "xla"
    with pytest.raises(ValueError, match="its kernel runs on NVIDIA GPUs, and the devices are cpu"):
        OPERATION.choose("pallas_gpu", given, 7)
    with interpreted():
        assert OPERATION.choose("pallas_gpu", given, 7) == "pallas_gpu"
    refused("compute capability 8.0 and more, and this is 7.5", given, T4)
    refused("that jax knows: Unsupported GPU device kind: Abacus", given, "Abacus")
    refused(
        "v must have q's dtype, float32, or be int8 with scales, not bfloat16",
        given._replace(v=given.v._replace(values=given.v.values.astype(jnp.bfloat16))),
    )
    refused("score function rounded does not fit: GPU kernels have no operation round", with_term(given, rounded))
    with use_mesh(on(H100)):
        assert OPERATION.choose("auto", with_term(given, soft_cap), 7) == "pallas_gpu"
    refused("q must be bfloat16 or float32, not float16", operands(dtype="float16"))
    refused("33 query heads share a kv head, at most 32 can", operands(group=33))
    refused("may have 256 channels, not 64 and 257", operands(widths=(64, 257)))
    shape = jax.ShapeDtypeStruct((1 << 10, 2, 2, 1 << 10, 9, 64), jnp.int8)
    large = given.k._replace(values=shape, scale=jax.ShapeDtypeStruct(shape.shape[:-1], jnp.float32))
    refused(
        r"an int8 stack may not have between 2\^31 and 2\^32 numbers, and k has 2415919104", given._replace(k=large)
    )

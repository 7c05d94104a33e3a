"""The TPU kernel for chosen regions: what it reads, what it refuses, and that a wrong number is found."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from rave_jax.kernels.routed.gather import gather_attention, pallas_tpu, reference
from rave_jax.kernels.routed.gather.base import Operands, Stack, listed, union
from rave_jax.kernels.support import interpreted
from rave_jax.tools.tpu import Operand, copied_bytes
from tests.kernels.drawn import PairBias
from tests.kernels.score_terms import terms_of

K, G, R, m, h = 2, 3, 192, 8, 128
MOST = 40


def operands(apart: bool, dtype: str = "float32", names: str = "") -> Operands:
    """One row; every choice is full. `names` of terms as in `score_terms`."""
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=(1, K, *shape)), dtype) for shape in ((G, h), (R, m, h), (R, m, h)))
    chosen = np.zeros((1, K, G if apart else 1, R), bool)
    for at in np.ndindex(chosen.shape[:-1]):
        chosen[at][rng.choice(R, MOST, replace=False)] = True
    H, r, cache = K * G, 4, (1, K, R, m)
    shapes = (1, H, r), (*cache, r), (1, H), cache, (H,)
    floats = [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes]
    on = (jnp.asarray(rng.random(shape) < 0.7) for shape in ((1, H), (1, R, m)))
    terms = terms_of(PairBias(*floats, *on), names) if names else ()
    # The second of two layers; the first holds what nobody may read.
    k, v = (Stack(jnp.stack([jnp.full_like(x, jnp.nan), x]), None, jnp.int32(1)) for x in (k, v))
    return Operands(q, k, v, jnp.ones((1, R, m), bool), jnp.asarray(chosen), terms)


def lists(given: Operands) -> tuple[Any, Any]:
    return listed(union(given.chosen), pallas_tpu.length_of_list(given, MOST))


@pytest.mark.slow
@pytest.mark.parametrize("apart", [False, True], ids=["per group", "per head"])
def test_several_steps_by_the_other_interpreter(apart: bool) -> None:
    given = operands(apart, names="log_gate+bent_score+distance" if apart else "")
    index, count = lists(given)
    assert index.shape[-1] > pallas_tpu.regions_of_step(m)
    found = pallas_tpu.over(given, index, count, 0.1, interpret=pltpu.InterpretParams())
    for x, y in zip(found, reference.attention(given, MOST, 0.1), strict=True):
        np.testing.assert_allclose(x, y, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("wrong", [R, 10 * R])
def test_a_number_behind_the_last_region_is_an_error(wrong: int) -> None:
    given = operands(False)
    index, count = lists(given)
    index = index.at[0, 1, 2].set(wrong)
    with pytest.raises(Exception, match=r"(?i)out.of.bounds|IndexError"):
        jax.block_until_ready(pallas_tpu.over(given, index, count, 0.1, interpret=pltpu.InterpretParams()))


def test_a_list_names_the_chosen_regions_and_nothing_else() -> None:
    rng = np.random.default_rng(1)
    chosen = rng.random((3, K, 20)) < np.array([0.0, 0.3, 1.0])[:, None, None]
    index, count = (np.asarray(x) for x in listed(jnp.asarray(chosen), 24))
    for at in np.ndindex(3, K):
        found = np.flatnonzero(chosen[at])
        assert count[at] == len(found)
        np.testing.assert_array_equal(index[at][: count[at]], found)
        np.testing.assert_array_equal(index[at][count[at] :], found[-1] if len(found) else 0)


class Called(Exception):
    """Instead of a Pallas call."""


@pytest.mark.parametrize("apart", [False, True], ids=["per group", "per head"])
def test_it_copies_what_is_chosen_and_no_more(apart: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of keys and values, counted from index maps and concrete lists; where the list is full, all bytes are those
    declared."""

    def instead(_kernel: Any, *, grid_spec: Any, out_shape: Any, cost_estimate: Any, **_: Any) -> Any:
        def run(*args: Any) -> Any:
            both = [*zip(grid_spec.in_specs, args[3:], strict=True), *zip(grid_spec.out_specs, out_shape, strict=True)]
            found = [Operand.of(str(n), spec, x) for n, (spec, x) in enumerate(both)]
            copied = copied_bytes(grid_spec.grid, found, args[:3])
            cache = [n for n, (_, x) in enumerate(both) if x.ndim == 6 and x.shape[3] == R]
            raise Called(sum(copied[str(n)] for n in cache), sum(copied.values()), cost_estimate.bytes_accessed)

        return run

    given = operands(apart, "bfloat16", "tanh+bent_score" if apart else "")
    monkeypatch.setattr(pl, "pallas_call", instead)
    region = 2 * m * h * 2
    with pytest.raises(Called) as made:
        pallas_tpu.over(given, *lists(given), 0.1, interpret=True)
    chosen = int(union(given.chosen).sum())
    assert made.value.args[0] == chosen * region
    full = listed(jnp.ones((1, K, R), bool), R)
    with pytest.raises(Called) as made:
        pallas_tpu.over(given, *full, 0.1, interpret=True)
    assert made.value.args[1] == made.value.args[2]


def test_what_it_cannot_do_is_said() -> None:
    given = operands(False)

    def run(implementation: str, **changed: Any) -> Any:
        q, k, v, real, chosen, terms = given._replace(**changed)
        q = q.reshape(1, K * G, -1)
        how: Any = {"scale": 1.0, "implementation": implementation}
        return jax.eval_shape(lambda: gather_attention(q, k, v, real, chosen, MOST, terms, **how))

    with pytest.raises(ValueError, match="its kernels run on TPUs, and the devices are cpu"):
        run("pallas_tpu")

    def changed(name: str, change: Any) -> dict[str, Any]:
        stack = getattr(given, name)
        return {name: stack._replace(values=change(stack.values))}

    short = changed("k", lambda x: x[..., :7, :]) | changed("v", lambda x: x[..., :7, :])
    short["real"] = given.real[..., :7]
    with interpreted():
        run("pallas_tpu")
        with pytest.raises(ValueError, match=r"multiple of 8 entries, .* 128 channels, not 7 and 128 and 128"):
            run("pallas_tpu", **short)
        with pytest.raises(ValueError, match="one dtype"):
            run("pallas_tpu", **changed("v", lambda x: x.astype(jnp.bfloat16)))
    run("auto", **short)

"""The hook before the output projection: heads are scaled, attention is not, and who does not ask pays nothing."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rave_jax import attention as at
from rave_jax.attention.heads import ScaledHeads, head_gates
from rave_jax.config import ConfigError
from tests.attention.packed import DIMS, KEY, ROWS, attend, dense_map, everything, features, info_of, outputs

SADS = at.Sads(heads=(1, 3))
VHR = at.Vhr(heads=(0, 3), alpha=2.0)
SCALES: dict[tuple[at.MechanismConfig, ...], list[float]] = {
    # y = sum over kept heads of O_h W_O^h
    (SADS,): [1, 0, 1, 0],
    (at.Sads(heads=(1, 2, 3), rescale=True),): [4, 0, 0, 0],
    # O_h <- alpha O_h
    (VHR,): [2, 1, 1, 2],
    # Gates of several multiply.
    (SADS, VHR): [2, 0, 1, 0],
}


@pytest.mark.parametrize("configs", list(SCALES), ids=str)
def test_gates_are_the_stated_numbers(configs: Any) -> None:
    x, info = features(), info_of(*ROWS)
    gates = head_gates(at.build_mechanisms(configs, DIMS, KEY), x, x.q, info)
    np.testing.assert_array_equal(gates, np.reshape(np.float32(SCALES[configs]), (1, 1, 4)))


def test_heads_are_scaled_and_attention_is_not() -> None:
    x, info, scales = features(), info_of(*ROWS), np.array(SCALES[SADS, VHR])
    plain = dense_map((), x, info)
    mechanisms = at.build_mechanisms((SADS, VHR), DIMS, KEY)
    every = jnp.broadcast_to(jnp.arange(x.q.shape[1]), x.q.shape[:2])

    @jax.jit
    def both(x: at.Features) -> Any:
        def total(x: at.Features) -> Any:
            found = attend(x, info, mechanisms, queries=every, gates=True)
            return jnp.sum(found.out), found

        return jax.grad(total, has_aux=True)(x)

    gradient, found = both(x)
    np.testing.assert_allclose(found.out, outputs(plain, x) * scales[:, None], atol=1e-5)
    np.testing.assert_allclose(found.attention, plain, atol=1e-5)
    np.testing.assert_array_equal(found.gates, np.broadcast_to(scales, found.gates.shape))
    dropped = scales == 0
    assert np.all(np.asarray(gradient.q)[:, :, dropped] == 0), "a dropped head learns nothing"
    assert np.abs(np.asarray(gradient.q)[:, :, ~dropped]).max() > 1e-3


NEUTRAL = (at.Sads(), at.Sads(rescale=True), at.Vhr(), at.Vhr(heads=(1, 2), alpha=1.0))


@pytest.mark.parametrize("neutral", NEUTRAL, ids=str)
def test_the_neutral_setting_asks_for_nothing(neutral: at.MechanismConfig) -> None:
    assert type(neutral.build(DIMS, KEY)) is at.Mechanism


def test_a_gate_of_one_changes_no_bit_and_no_gate_costs_nothing() -> None:
    x, info = features(), info_of(*ROWS)

    def program(mechanisms: Any, **asked: bool) -> str:
        return str(jax.make_jaxpr(lambda x: attend(x, info, mechanisms, **asked).out)(x))

    assert program([at.Mechanism()]) == program([]) != program([ScaledHeads((1.0,) * 4)])
    one, plain = (
        jax.jit(lambda x, mechanisms=mechanisms: attend(x, info, mechanisms).out)(x)
        for mechanisms in ([ScaledHeads((1.0,) * 4)], [])
    )
    np.testing.assert_array_equal(one, plain)
    half = jax.tree.map(lambda y: y.astype(jnp.bfloat16), x)
    assert attend(half, info, [ScaledHeads((0.5,) * 4)]).out.dtype == jnp.bfloat16


def test_what_cannot_be_scaled_is_refused_by_the_field() -> None:
    for cls in (at.Sads, at.Vhr):
        with pytest.raises(ConfigError, match=r"heads is \(1, 1\), expected each head once"):
            cls(heads=(1, 1))
        with pytest.raises(ConfigError, match=r"heads is \(4,\), expected numbers from 0 to 3"):
            cls(heads=(4,)).build(DIMS, KEY)
    with pytest.raises(ConfigError, match=r"heads is \(0, 2\), expected no head 0, which every layer keeps"):
        at.Sads(heads=(0, 2)).build(DIMS, KEY)
    with pytest.raises(ConfigError, match="alpha is"):
        at.Vhr(alpha=-1.0)


def test_a_packed_row_equals_its_documents_alone() -> None:
    """Gates that are chosen by the token."""
    x, config = features(), (at.Moh(), VHR)
    packed = everything(config, x, info_of(*ROWS), x.q)[0]
    for b, documents in enumerate(ROWS):
        start = 0
        for document in documents:
            n = len(document)
            one = jax.tree.map(lambda a, b=b, s=start: np.roll(a[b : b + 1], -s, axis=1).repeat(2, axis=0), x)
            alone = everything(config, one, info_of((document,), (document,)), x.q)[0]
            np.testing.assert_allclose(packed[b, start : start + n], alone[0, :n], atol=1e-6)
            start += n

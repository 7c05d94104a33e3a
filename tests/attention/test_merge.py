"""Weights changed within key groups: against the map, for several mechanisms, and where nothing is seen."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rave_jax import attention as at
from rave_jax.attention.merge import log_sum_exp
from rave_jax.batch import TokenInfo
from rave_jax.kernels.attention import KeyGroups
from tests.attention.packed import DIMS, KEY, ROWS, B, T, attend, dense_map, features, info_of, normalised, outputs

H = DIMS.num_heads


class Striped(at.Mechanism):
    """Key j is in group j % count, of which one more than that exists; each gets a log weight of its own, and
    `by_mass` times what it has already."""

    def __init__(self, count: int, scale: float, by_mass: float = 0.0):
        self.count, self.scale, self.by_mass = count, scale, by_mass

    def key_groups(self, x: at.Features, remembered: None, info_k: TokenInfo) -> KeyGroups:
        index = jnp.arange(info_k.offset.shape[1]) % self.count
        return KeyGroups(jnp.broadcast_to(index, info_k.offset.shape), self.count + 1)

    def weights(self) -> np.ndarray:
        return self.scale * np.random.default_rng(self.count).normal(size=(T, self.count + 1, H))

    def merge(self, x: at.Features, parts: at.Parts, info_q: TokenInfo, info_k: TokenInfo) -> jax.Array:
        own = jnp.asarray(self.weights(), jnp.float32)
        return jnp.broadcast_to(own, parts.groups.shape) + self.by_mass * parts.mass

    def by_hand(self, plain: np.ndarray) -> np.ndarray:
        """The same as logs for every pair [B,T,H,S], from the map before any merge."""
        stripe = np.arange(T) % self.count
        mass = np.stack([plain[..., stripe == n].sum(-1) for n in range(self.count)], axis=-1)
        return np.moveaxis(self.weights(), 1, 2)[None][..., stripe] + self.by_mass * mass[..., stripe]


class Added(at.Mechanism):
    """A bias of every key and head, and two channels, all from x."""

    def __init__(self, scale: float):
        self.scale = scale

    def score(self, x: at.Features, remembered: None, info_q: TokenInfo, info_k: TokenInfo) -> at.Score:
        bias = self.scale * jnp.repeat(x.v[..., 0], 2, axis=2)
        return at.Score(key_bias=bias, channels=at.Channels(self.scale * x.q0[..., :2], x.k0[..., :2]))

    def by_hand(self, x: at.Features) -> np.ndarray:
        wide = [np.repeat(np.float64(a), 2, axis=2) for a in (x.v, x.k0)]
        product = np.einsum("BTHn,BSHn->BTHS", np.float64(x.q0[..., :2]), wide[1][..., :2])
        return self.scale * (np.moveaxis(wide[0][..., 0], 1, 2)[:, None] + product)


CASES: dict[str, list[Any]] = {
    "no weights": [Striped(3, 0.0)],
    "one": [Striped(3, 1.0)],
    "two, one of which reads its masses": [Striped(2, 1.0, by_mass=2.0), at.Mechanism(), Striped(3, 0.5)],
}


@pytest.mark.parametrize("implementation", ("reference", "xla"))
@pytest.mark.parametrize("name", CASES)
def test_weights_of_key_groups_are_those_of_the_map(name: str, implementation: Any) -> None:
    x, info, mechanisms = features(), info_of(*ROWS), CASES[name]
    plain = dense_map((), x, info)
    logs = sum(m.by_hand(plain) for m in mechanisms if isinstance(m, Striped))
    wanted = normalised(plain * np.exp(logs))

    @jax.jit
    def run(x: at.Features) -> Any:
        every = jnp.broadcast_to(jnp.arange(T), (B, T))
        return attend(x, info, mechanisms, implementation=implementation, queries=every)[:2]

    out, rows = run(x)
    np.testing.assert_allclose(out, outputs(wanted, x), atol=1e-5)
    np.testing.assert_allclose(rows, wanted, atol=1e-5)
    assert np.all(np.asarray(out)[np.asarray(info.document) == 0] == 0)


def test_gradients_are_those_of_the_map() -> None:
    """Also through what a merge reads, and with a key group that nobody sees and rows that see nothing."""
    x, info, ct = features(), info_of(*ROWS), features(1).q
    (one,) = CASES["one"]
    reading = Striped(2, 1.0, by_mass=2.0)

    def dense(x: at.Features) -> jax.Array:
        k, v = (jnp.repeat(a, 2, axis=2) for a in (x.k, x.v))
        index = jnp.arange(T)
        allow = (index <= index[:, None]) & (info.document[..., None] == info.document[:, None])
        allow = (allow & (info.document > 0)[..., None])[:, :, None]
        scores = jnp.where(allow, jnp.einsum("BTHh,BSHh->BTHS", x.q, k) * DIMS.head_dim**-0.5, -1e30)
        plain = jnp.where(allow, jax.nn.softmax(scores), 0.0)
        logs = np.zeros((B, T, H, T))
        for m in (one, reading):
            stripe = np.arange(T) % m.count
            mass = jnp.stack([plain[..., stripe == n].sum(-1) for n in range(m.count)], axis=-1)
            logs = logs + np.moveaxis(m.weights(), 1, 2)[..., stripe] + m.by_mass * mass[..., stripe]
        weights = plain * jnp.exp(logs)
        total = weights.sum(-1, keepdims=True)
        return jnp.einsum("BTHS,BSHh->BTHh", weights / jnp.where(total > 0, total, 1), v)

    @jax.jit
    def gradients(x: at.Features) -> Any:
        ours = jax.grad(lambda x: jnp.sum(attend(x, info, [one, reading]).out * ct))(x)
        return ours, jax.grad(lambda x: jnp.sum(dense(x) * ct))(x)

    ours, theirs = gradients(x)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), ours, theirs)


def test_key_biases_and_channels_of_several_add_up_beside_a_gate() -> None:
    x, info = features(), info_of(*ROWS)
    gate = at.Rave(rank=4, start="random")
    mechanisms = [Added(0.7), *at.build_mechanisms((gate,), DIMS, KEY), Added(-0.2)]
    wanted = normalised(dense_map((gate,), x, info) * np.exp(0.5 * Added(1.0).by_hand(x)))
    every = jnp.broadcast_to(jnp.arange(T), (B, T))
    found = jax.jit(lambda x: attend(x, info, mechanisms, queries=every)[:2])(x)
    np.testing.assert_allclose(found[0], outputs(wanted, x), atol=1e-5)
    np.testing.assert_allclose(found[1], wanted, atol=1e-5)


def test_a_sum_over_nothing_has_a_gradient() -> None:
    x = jnp.array([[-jnp.inf, -jnp.inf], [-jnp.inf, 2.0], [1e4, 1e4]])
    value, pull = jax.vjp(lambda x: log_sum_exp(x, (1,)), x)
    np.testing.assert_allclose(value, [-np.inf, 2, 1e4 + np.log(2)])
    np.testing.assert_allclose(pull(jnp.ones(3))[0], [[0, 0], [0, 1], [0.5, 0.5]])


def test_a_sum_over_nan_is_nan() -> None:
    np.testing.assert_array_equal(log_sum_exp(jnp.array([[jnp.nan, 1.0], [0.0, -jnp.inf]]), (1,)), [np.nan, 0.0])

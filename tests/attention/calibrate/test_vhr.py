"""VHR: the divergence is the stated formula, and one pass over pairs finds what layer after layer does."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rave_jax.attention import Vhr
from rave_jax.attention.base import Features, Mechanism
from rave_jax.attention.calibrate.traced import with_mechanism, with_scales
from rave_jax.attention.calibrate.vhr import VhrSearch, configs_of, reinforcing
from rave_jax.attention.vhr import divergence
from rave_jax.batch import TokenInfo
from rave_jax.config import ConfigError
from rave_jax.families.qwen2_5_vl.presets import tiny
from rave_jax.models.config import ModelOptions
from rave_jax.models.forward import Want
from rave_jax.models.vlm import Vlm
from tests.models.layout import Visual, batch, document
from tests.models.made import model as made


def chosen_of(seen: np.ndarray, blind: np.ndarray) -> np.ndarray:
    """The heads [N,H] of the stated formula, from outputs [N,H,h]."""
    distance = np.linalg.norm(seen - blind, axis=-1)
    surge = np.linalg.norm(blind, axis=-1) - np.linalg.norm(seen, axis=-1)
    for n in range(len(seen)):
        distance[n, surge[n] > surge[n].mean() + surge[n].std()] = 0
    return distance > np.median(distance, axis=-1, keepdims=True)


def test_the_divergence_is_the_stated_distance_without_heads_that_surge() -> None:
    rng = np.random.default_rng(0)
    seen, blind = rng.normal(size=(2, 3, 8, 4))
    blind[0, 2] *= 9
    found = np.asarray(divergence(jnp.asarray(seen, jnp.float32), jnp.asarray(blind, jnp.float32)))
    assert found[0, 2] == 0, "it is far larger without the picture"
    kept = found > 0
    np.testing.assert_allclose(found[kept], np.linalg.norm(seen - blind, axis=-1)[kept], rtol=1e-5)
    median = np.median(found, axis=-1, keepdims=True)
    np.testing.assert_array_equal(found > median, chosen_of(seen, blind))


RECORDED: list[np.ndarray] = []


class Recorder(Mechanism):
    """Keeps what heads give, layer by layer."""

    def head_gate(self, x: Features, out: jax.Array, info_q: TokenInfo) -> None:
        jax.debug.callback(lambda out: RECORDED.append(np.asarray(out)), out, ordered=True)


def test_one_pass_finds_what_layer_after_layer_does() -> None:
    config = tiny(vocab_size=64, num_layers=3, vision_depth=1, full_attention_blocks=())
    rng = np.random.default_rng(1)
    seen = [document([n, Visual(1, 4, 4), 5], config, rng) for n in (3, 2)]
    blind = [document([n + 5], config, rng) for n in (3, 2)]
    for with_, without in zip(seen, blind, strict=True):
        without.tokens[:] = [t for t, code in zip(with_.tokens, with_.codes, strict=True) if not code.get("image")]
    rows = batch([[doc] for doc in (*seen, *blind)], config, tokens=16, patches=16)
    last = np.array([len(doc.tokens) - 1 for doc in (*seen, *blind)])
    model = made(config, ModelOptions())
    on = np.array([True, False, True])

    @jax.jit
    def one_pass(model: Vlm) -> jax.Array:
        decoder = reinforcing(model.decoder, 2.0, jnp.asarray(on))
        return decoder(model.embedded(rows), rows.info, rows.positions, Want(gates=True)).gates

    @jax.jit
    def recorded(model: Vlm, scales: jax.Array) -> jax.Array:
        decoder = with_mechanism(with_scales(model.decoder, scales), lambda run: Recorder())
        return decoder(model.embedded(rows), rows.info, rows.positions).hidden

    gates = np.asarray(one_pass(model))
    scales = np.ones((3, 4, 4), np.float32)
    for layer in range(3):
        RECORDED.clear()
        jax.block_until_ready(recorded(model, scales))
        jax.effects_barrier()
        out = RECORDED[layer][np.arange(4), last]
        scales[layer, :2] = np.where(chosen_of(out[:2], out[2:]) & on[layer], 2.0, 1.0)
    assert (scales[[0, 2]] == 2).any((1, 2)).all() and (scales[1] == 1).all()
    np.testing.assert_array_equal(gates, np.broadcast_to(scales[:, :, None], gates.shape))


def test_heads_that_more_than_half_of_the_samples_choose_are_kept() -> None:
    chosen = np.zeros((3, 4, 4), bool)
    chosen[:, 1, 2] = chosen[:2, 1, 3] = chosen[:2, 3, 2] = chosen[:, 3, 3] = chosen[0, 2, 0] = True
    search = VhrSearch(alpha=1.5, first=(1,), last=2)
    assert configs_of(search, chosen) == (Vhr(heads=(2, 3), alpha=1.5, layers=(1, 3)),)
    assert search.layers(6).tolist() == [False, True, False, False, True, True]
    assert VhrSearch().layers(32).nonzero()[0].tolist() == [1, *range(18, 32)]
    assert VhrSearch().layers(2).all()


def test_bad_searches_name_the_field() -> None:
    for bad in ({"alpha": 1.0}, {"first": (-1,)}, {"last": -1}):
        with pytest.raises(ConfigError, match=next(iter(bad))):
            VhrSearch(**bad)
    with pytest.raises(ConfigError, match=r"first is \(7,\), expected numbers from 0 to 3"):
        VhrSearch(first=(7,)).layers(4)
    with pytest.raises(ConfigError, match="last is 0"):
        VhrSearch(first=(), last=0).layers(4)

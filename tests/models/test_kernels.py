"""The fused kernels under a whole model: logits, gradients and cached steps of the blockwise attention."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from rave_jax.attention import Mma, Rave, ZeroTuning
from rave_jax.batch import Batch
from rave_jax.kernels.pair_bias.support import interpreted
from rave_jax.models.config import ModelOptions
from rave_jax.models.families import presets
from rave_jax.models.vlm import Vlm
from tests.models.layout import Visual, batch, document
from tests.models.made import model as made

CONFIG = presets.tiny(vocab_size=64, num_layers=1)
OPTIONS = ModelOptions(mechanisms=(Rave(rank=4), Mma(), ZeroTuning(gamma=1.5)))


def a_batch() -> Batch:
    rng = np.random.default_rng(0)
    documents = [document(parts, CONFIG, rng) for parts in ([2, Visual(1, 4, 8), 5], [6])]
    return batch([documents, documents[:1]], CONFIG, tokens=30, patches=64)


def models() -> tuple[Vlm, Vlm]:
    """(blockwise, fused) with the same numbers."""
    return made(CONFIG, OPTIONS), made(CONFIG, dataclasses.replace(OPTIONS, attention="pallas_tpu"))


def test_logits_and_gradients_are_those_of_the_blockwise_attention() -> None:
    given = a_batch()

    @jax.jit
    def of(model: Vlm) -> tuple[jax.Array, Vlm]:
        def loss(model: Vlm) -> tuple[jax.Array, jax.Array]:
            logits = model.logits(model.hidden(given))
            real = (given.info.segment > 0)[..., None]
            return jnp.sum(jnp.where(real, logits, 0.0) ** 2), jnp.where(real, logits, 0.0)

        return jax.grad(loss, has_aux=True)(model)[::-1]

    plain, fused = models()
    expected = of(plain)
    with interpreted():
        found = of(fused)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4 * float(jnp.abs(b).max()))


def test_decoding_against_the_cache_is_that_of_the_blockwise_attention() -> None:
    """A prompt of 24 tokens, then four at once, then one."""
    options = ModelOptions(mechanisms=(Rave(rank=4), ZeroTuning(gamma=1.5)))
    text = batch([[document([29], CONFIG, np.random.default_rng(1))]], CONFIG, tokens=29, patches=0)

    def steps(model: Vlm) -> list[jax.Array]:
        cache = model.empty_cache(1, 32)
        found = []
        for start, stop in ((0, 24), (24, 28), (28, 29)):
            info = jax.tree.map(lambda x, a=start, b=stop: x[:, a:b], text.info)
            positions = text.positions[:, :, start:stop]
            hidden, cache = jax.jit(Vlm.decode)(model, text.tokens[:, start:stop], info, positions, cache)
            found.append(hidden)
        return found

    expected = steps(made(CONFIG, options))
    with interpreted():
        found = steps(made(CONFIG, dataclasses.replace(options, attention="pallas_tpu")))
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)

"""The fused kernels under a whole model: logits, gradients and cached steps of the other backends."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rave_jax.attention import Decomposed, MechanismConfig, Mma, Rave, Var, ZeroTuning
from rave_jax.batch import Batch
from rave_jax.families.qwen2_5_vl import presets
from rave_jax.kernels.attention import Implementation
from rave_jax.kernels.support import interpreted
from rave_jax.models.config import ModelOptions
from rave_jax.models.forward import Chunk
from rave_jax.models.vlm import Vlm
from tests.models.layout import Visual, batch, document
from tests.models.made import model as made

CONFIG = presets.tiny(vocab_size=64, num_layers=1, vision_depth=1, full_attention_blocks=())


def a_batch() -> Batch:
    rng = np.random.default_rng(0)
    documents = [document(parts, CONFIG, rng) for parts in ([2, Visual(1, 4, 8), 5], [6])]
    return batch([documents, documents[:1]], CONFIG, tokens=30, patches=64)


def everything(mechanisms: tuple[MechanismConfig, ...], attention: Implementation) -> tuple[jax.Array, Vlm]:
    """Logits of the real tokens, and the gradients of all parameters where the loss is the sum of their squares."""
    given = a_batch()

    @jax.jit
    def of(model: Vlm) -> tuple[jax.Array, Vlm]:
        def loss(model: Vlm) -> tuple[jax.Array, jax.Array]:
            logits = model.logits(model.forward(given).hidden)
            real = (given.info.document > 0)[..., None]
            return jnp.sum(jnp.where(real, logits, 0.0) ** 2), jnp.where(real, logits, 0.0)

        return jax.grad(loss, has_aux=True)(model)[::-1]

    with interpreted():
        return of(made(CONFIG, ModelOptions(mechanisms=mechanisms, attention=attention)))


def same(found: tuple[jax.Array, Vlm], expected: tuple[jax.Array, Vlm]) -> None:
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4 * np.abs(b).max())


@pytest.mark.slow
def test_logits_and_gradients_are_those_of_the_blockwise_attention() -> None:
    mechanisms = (Rave(rank=4), Mma(), ZeroTuning(gamma=1.5))
    same(everything(mechanisms, "pallas_tpu"), everything(mechanisms, "xla"))


PARTS: dict[str, MechanismConfig] = {
    "another query": Decomposed(),
    "a pair term": Rave(rank=4),
    "a key bias": ZeroTuning(gamma=(1.5, 0.4), heads=(0, 3)),
    "a channel": ZeroTuning(gamma=3.0, heads=(1,), route="channel"),
    "a factor": ZeroTuning(gamma=0.3, heads=(2,), route="after"),
    "weighed key groups": Var(dims=(3,), tau=1.8, summ=0.05, layers="all"),
}


@pytest.mark.slow
def test_all_that_mechanisms_may_ask_of_a_kernel_is_the_dense_attention() -> None:
    """q and k that are twice as wide and a column more, every kind of term, four key groups and what follows them."""
    mechanisms = tuple(PARTS.values())
    same(everything(mechanisms, "pallas_tpu"), everything(mechanisms, "reference"))


@pytest.mark.slow
def test_each_of_them_says_something() -> None:
    """So that the test above compares what it names."""
    given = a_batch()

    def logits(names: set[str]) -> jax.Array:
        chosen = tuple(PARTS[name] for name in PARTS if name in names)
        model = made(CONFIG, ModelOptions(mechanisms=chosen, attention="reference"))
        return jax.jit(lambda model: model.logits(model.forward(given).hidden))(model)[given.info.document > 0]

    whole = logits(set(PARTS))
    for name in PARTS:
        change = jnp.abs(logits(set(PARTS) - {name}) - whole)
        assert float(change.max()) > 1e-2 * float(jnp.abs(whole).max()), name


@pytest.mark.slow
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
            out, cache = jax.jit(Vlm.extend)(model, Chunk(text.tokens[:, start:stop], info, positions), cache)
            found.append(out.hidden)
        return found

    expected = steps(made(CONFIG, options))
    with interpreted():
        found = steps(made(CONFIG, dataclasses.replace(options, attention="pallas_tpu")))
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)

"""Tokens that leave after a layer: hidden in whole rows, gathered beside a cache, and both give the same numbers."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rave_jax import attention as at
from rave_jax.attention.tokens import deciders
from rave_jax.batch import Batch, Role
from rave_jax.config import ConfigError
from rave_jax.families.qwen2_5_vl.presets import tiny
from rave_jax.families.qwen3_5.presets import qwen3_5_800m
from rave_jax.models.config import ModelOptions
from rave_jax.models.forward import Embedded, Want
from rave_jax.models.parameters import shardings
from rave_jax.models.vlm import Vlm
from rave_jax.parallel.mesh import MeshConfig, make_mesh
from rave_jax.parallel.sharding import use_mesh
from tests.models.layout import Visual, batch, document
from tests.models.made import model as made

CONFIG = tiny(vocab_size=64, num_layers=4, vision_depth=1, full_attention_blocks=(), tie_embeddings=False)
PRUNING = (
    at.Pruning(0.5, slope=2.0, layers=(0,)),
    at.Pruning(0.25, layers=(2,)),
    at.Rave(rank=2, layers=(0, 1, 2)),
    at.SlidingWindow(12, layers=(1, 3)),
    at.LogN(length=4),
)
DYVTE = (at.Dyvte(width=8), at.Moh("learned", layers=(2, 3)), at.Mma(layers=(1, 3)))
STACKS = {"pruning": PRUNING, "dyvte": DYVTE}
B, T, P, PROMPT = 8, 32, 32, 28


@functools.cache
def rows() -> Batch:
    """Prompts of up to 28 tokens, with two pictures each, and answers of two tokens."""
    rng = np.random.default_rng(0)
    made_of = [[document([n, Visual(1, 4, 8), 2, Visual(1, 4, 4), 7 - n // 2], CONFIG, rng)] for n in range(1, 9)]
    found = batch(made_of, CONFIG, tokens=T, patches=2 * P)
    last = np.sum(found.info.document > 0, axis=1, keepdims=True)
    answer = (np.arange(T) >= last - 2) & (found.info.document > 0)
    return found._replace(info=found.info._replace(role=np.where(answer, Role.RESPONSE, found.info.role)))


@functools.cache
def model(stack: str) -> Vlm:
    """Routers that let the tokens of some rows leave, of each at another layer."""
    return made(CONFIG, ModelOptions(STACKS[stack]), seed=3)


def whole(model: Vlm, batch: Batch) -> Any:
    """Logits, hidden states of all layers, and the gradient by what enters the decoder."""
    tokens = model.embedded(batch)

    def total(x: jax.Array) -> Any:
        out = model.decoder(tokens._replace(x=x), batch.info, batch.positions, Want(inputs=True))
        logits = jnp.where((batch.info.role == Role.RESPONSE)[..., None], model.logits(out.hidden), 0.0)
        return jnp.sum(logits**2), (logits, out.inputs)

    gradient, found = jax.grad(total, has_aux=True)(tokens.x)
    return *found, gradient


def cached(model: Vlm, batch: Batch, lengths: Any) -> Any:
    """The same: the prompts at once into a cache, and then the answers token by token."""
    tokens, last = model.embedded(batch), jnp.sum(batch.info.document > 0, axis=1, keepdims=True)
    every = jnp.arange(T)

    def total(x: jax.Array) -> Any:
        cache: Any = model.empty_cache(B, T)
        prompt = jax.tree.map(lambda code: jnp.where(every < last - 2, code, 0), batch.info)
        info = jax.tree.map(lambda code: code[:, :PROMPT], prompt)
        taken = cache.take(None, T, reaches=model.decoder.reaches(T, lengths))
        start = tokens._replace(x=x[:, :PROMPT])
        positions = batch.positions[:, :, :PROMPT]
        first, taken = model.decoder.extend(start, info, positions, taken, want=Want(inputs=True), lengths=lengths)
        found = []
        for n in (2, 1):
            at_ = last - n
            info = jax.tree.map(lambda code, at_=at_: jnp.take_along_axis(code, at_, axis=1), batch.info)
            one = tokens._replace(x=jnp.take_along_axis(x, at_[..., None], axis=1))
            positions = jnp.take_along_axis(batch.positions, at_[None], axis=2)
            out, taken = model.decoder.extend(one, info, positions, taken, lengths=lengths)
            found.append(model.logits(out.hidden)[:, 0])
        logits = jnp.stack(found, axis=1)
        return jnp.sum(logits**2), (logits, first.inputs, [one for one in taken.layer_runs])

    gradient, found = jax.grad(total, has_aux=True)(tokens.x)
    return *found, gradient


@functools.cache
def both(stack: str) -> Any:
    """Of whole rows, and beside a cache with as few entries as the mechanisms say."""
    vlm, info = model(stack), rows().info
    visual, pictures = np.sum(info.kind == 2, axis=1), 2
    text = np.sum(info.document > 0, axis=1) - visual
    counts = [vlm.decoder.stays(int(n), pictures) for n in visual]
    of_rows = [[[int(t) + n for n in bounds] for bounds in drops] for t, drops in zip(text, counts, strict=True)]
    lengths = tuple(tuple(sorted({*map(max, zip(*drop, strict=True))})) for drop in zip(*of_rows, strict=True))
    return jax.jit(whole)(vlm, rows()), jax.jit(cached, static_argnums=2)(vlm, rows(), lengths), lengths


SHORT = tiny(vocab_size=64, num_layers=2, vision_depth=1, full_attention_blocks=(), tie_embeddings=False)


def test_two_layers_give_the_same_in_whole_rows_and_beside_a_cache() -> None:
    """The decoder alone: a prompt at once, gathered behind the first layer, and an answer of one token."""
    decoder = made(SHORT, ModelOptions((at.Pruning(0.5, slope=2.0, layers=(0,)), at.LogN(length=4))), seed=3).decoder
    info, places = rows().info, rows().positions
    x = jnp.asarray(np.random.default_rng(1).normal(size=(B, T, SHORT.text.hidden_size)), jnp.float32)
    last = np.sum(np.asarray(info.document) > 0, axis=1, keepdims=True) - 1

    def whole(decoder: Any, x: jax.Array) -> jax.Array:
        return decoder(Embedded(x), info, places).hidden

    def short(decoder: Any, x: jax.Array) -> Any:
        cache = decoder.empty_cache(B, T, "compute", x.dtype).take(None, T, reaches=decoder.reaches(T, ((26,),)))
        prompt = jax.tree.map(lambda code: jnp.where(np.arange(T) < last, code, 0), info)
        first, cache = decoder.extend(Embedded(x), prompt, places, cache, lengths=((26,),))
        one = jax.tree.map(lambda code: jnp.take_along_axis(code, last, axis=1), info)
        place = jnp.take_along_axis(places, last[None], axis=2)
        token = Embedded(jnp.take_along_axis(x, last[..., None], axis=1))
        return first.hidden, decoder.extend(token, one, place, cache, lengths=((26,),))[0].hidden

    expected, (prompt, answer) = jax.jit(whole)(decoder, x), jax.jit(short)(decoder, x)
    stays, rows_ = np.any(np.asarray(prompt) != 0, axis=-1), np.arange(B)
    np.testing.assert_allclose(np.asarray(prompt)[stays], np.asarray(expected)[stays], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(answer[:, 0], np.asarray(expected)[rows_, last[:, 0]], rtol=1e-4, atol=1e-5)
    may = np.asarray(deciders(info)) < T
    np.testing.assert_array_equal((may & ~stays).sum(1), may.sum(1) - np.floor(may.sum(1) / 2 + 0.5))


@pytest.mark.slow
@pytest.mark.parametrize("stack", STACKS)
def test_gathered_tokens_give_the_numbers_of_hidden_ones(stack: str) -> None:
    """Logits of answers, hidden states of what stays, and gradients of all that enters."""
    (logits, inputs, gradient), (few, prompt, kept, short), lengths = both(stack)
    info = rows().info
    at_ = np.asarray(info.role) == Role.RESPONSE
    assert all(sizes[-1] <= T for sizes in lengths) and lengths[-1][0] < PROMPT
    np.testing.assert_allclose(few, np.asarray(logits)[at_].reshape(B, 2, -1), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(short, gradient, rtol=1e-4, atol=1e-4 * np.abs(gradient).max())
    stays = np.any(np.asarray(prompt) != 0, axis=-1)
    np.testing.assert_allclose(
        np.asarray(prompt)[stays], np.asarray(inputs)[:, :, :PROMPT][stays], rtol=1e-4, atol=1e-4
    )
    real = (np.asarray(info.document) > 0) & ~at_
    left = real[:, :PROMPT] & ~stays
    may = np.asarray(deciders(info))[:, :PROMPT] < T
    assert not left[0].any() and np.all(may | ~left), "visual tokens alone, behind the first layer"
    if stack == "pruning":
        count = may.sum(1)
        one = count - np.floor(count * 0.5 + 0.5)
        np.testing.assert_array_equal(left[1].sum(1), one)
        np.testing.assert_array_equal(left[3].sum(1), one + (count - one) - np.floor((count - one) * 0.25 + 0.5))
    else:
        rows_left = left.sum(-1)
        assert np.all((rows_left == 0) | (rows_left == may.sum(1))), "all leave or none"
        assert rows_left[-1].any() and len({*np.argmax(rows_left > 0, axis=0).tolist()}) > 1
    behind = [one for one in kept if isinstance(one, at.ShortKeys)]
    np.testing.assert_array_equal(behind[-1].index[0], stays[3].sum(1) + 2)


def test_a_share_of_one_compiles_the_plain_model() -> None:
    def program(*mechanisms: at.MechanismConfig) -> str:
        decoder = made(SHORT, ModelOptions(mechanisms, scan_layers=False), seed=3).decoder
        x = jnp.zeros((B, T, SHORT.text.hidden_size))
        return str(jax.make_jaxpr(lambda d: d(Embedded(x), rows().info, rows().positions).hidden)(decoder))

    assert program() == program(at.Pruning(keep=1.0, layers=(0,)))


@pytest.mark.slow
def test_a_model_in_which_nothing_leaves_is_the_plain_one_bit_for_bit() -> None:
    """Routers start so that all stay."""
    options = ModelOptions(scan_layers=False)
    plain = made(CONFIG, options, seed=3)
    forward = jax.jit(lambda model, batch: model.forward(batch).hidden)
    expected = forward(plain, rows())
    routed = jax.eval_shape(
        lambda: Vlm(CONFIG, dataclasses.replace(options, mechanisms=(at.Dyvte(width=8),)), key=jax.random.key(0))
    )
    for mine, theirs in zip(routed.decoder.layer_runs, plain.decoder.layer_runs, strict=True):
        mechanisms = mine.layers.mechanisms
        mine.layers = jax.tree.map(lambda x: x, theirs.layers)
        mine.layers.mechanisms = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), mechanisms)
    routed.decoder.norm, routed.embed, routed.lm_head = plain.decoder.norm, plain.embed, plain.lm_head
    routed.vision = plain.vision
    np.testing.assert_array_equal(forward(routed, rows()), expected)


@pytest.mark.slow
@pytest.mark.parametrize("stack", STACKS)
@pytest.mark.parametrize("change", [{"remat": "full"}, {"remat": "dots"}], ids=str)
def test_remat_changes_nothing(stack: str, change: dict[str, Any]) -> None:
    other = made(CONFIG, dataclasses.replace(ModelOptions(STACKS[stack]), **change), seed=3)
    for a, b in zip(jax.jit(whole)(other, rows()), both(stack)[0], strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4 * np.abs(b).max())


@pytest.mark.slow
@pytest.mark.parametrize("stack", STACKS)
def test_a_mesh_of_eight_gives_the_same_numbers(stack: str) -> None:
    mesh = make_mesh(MeshConfig(fsdp=2, tensor=2, data=2), jax.devices()[:8])
    expected, few, lengths = both(stack)
    with use_mesh(mesh):
        placed = jax.device_put(model(stack), shardings(model(stack), mesh))
        found = jax.jit(lambda m, b: whole(m, b))(placed, rows())
        short = jax.jit(lambda m, b: cached(m, b, lengths))(placed, rows())
    for a, b in [*zip(found, expected, strict=True), (short[0], few[0])]:
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4 * np.abs(b).max())


def test_models_that_cannot_drop_are_refused_by_name() -> None:
    config = qwen3_5_800m()
    with pytest.raises(ConfigError, match="Pruning lets tokens leave, and every token writes to the state of"):
        jax.eval_shape(lambda: Vlm(config, ModelOptions((at.Pruning(layers=(1,)),)), key=jax.random.key(0)))

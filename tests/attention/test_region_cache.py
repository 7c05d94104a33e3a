"""A cache by regions against a whole forward pass, hidden state by hidden state: in chunks, then token by token."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rave_jax.attention import Cca, Croc, Gaze, MechanismConfig, RegionCache, RegionReach, SlidingWindow, ZeroTuning
from rave_jax.batch import Role
from rave_jax.config import ConfigError
from rave_jax.data.layout import offsets_in_region
from rave_jax.families.qwen2_5_vl import presets
from rave_jax.layout import FixedRegions
from rave_jax.models.config import ModelOptions
from rave_jax.models.forward import Embedded, Want
from rave_jax.models.vlm import Vlm
from tests.inference.prompts import example_of
from tests.models.layout import Document, Visual, batch, document
from tests.models.made import model

CONFIG = presets.tiny(vocab_size=64, num_layers=1, vision_depth=1, full_attention_blocks=())
PICTURE = [3, Visual(1, 8, 8), 4]
VIDEO = [3, Visual(2, 6, 4, video=True), 2]
FRAMES_64 = [12, Visual(32, 4, 4, video=True), 3]
"""A temporal patch is two frames; four visual tokens each."""
CUTS_64 = range(24, 144, 24)
_whole = jax.jit(lambda model, given: (model.embedded(given).x, model.forward(given).hidden))


@jax.jit
def _taken(model, x, info, positions, cache, places):
    """As a prompt is read: where its row's regions lie on the device."""
    row = jnp.zeros(1, jnp.int32)
    out, part = model.decoder.extend(Embedded(x), info, positions, cache.take(row, cache.size), places)
    return out.hidden, cache.put(part, row)


@jax.jit
def _cached(model, x, *given):
    out, cache = model.decoder.extend(Embedded(x), *given)
    return out.hidden, cache


@functools.cache
def a_model(*mechanisms: MechanismConfig) -> Vlm:
    return model(CONFIG, ModelOptions(mechanisms), seed=1)


def read(vlm: Vlm, doc: Document, cuts: list[int], cache=None):
    """(hidden states in parts, those of the whole, the cache); parts without visual tokens are read as in decoding."""
    given = batch([[doc]], CONFIG, len(doc.tokens), len(doc.patches))
    region = example_of(doc, CONFIG, vlm.options.layout).info.region[None]
    given = jax.tree.map(jnp.asarray, given._replace(info=given.info._replace(region=region)))
    x, whole = _whole(vlm, given)
    cache = vlm.empty_cache(1, 160) if cache is None else cache
    places, parts = jnp.asarray(offsets_in_region(region[0]))[None], []
    for start, stop in zip([0, *cuts], [*cuts, len(doc.tokens)], strict=True):
        cut = slice(start, stop)
        seen = places[:, cut] if start == 0 or region[:, cut].any() else None
        info = jax.tree.map(lambda code, cut=cut: code[:, cut], given.info)
        through = _cached if seen is None or cache.host_nbytes == 0 else _taken
        part, cache = through(vlm, x[:, cut], info, given.positions[:, :, cut], cache, seen)
        parts.append(part)
    return np.concatenate(parts, axis=1), np.asarray(whole), cache


def test_only_the_wanted_tokens_come_out_of_a_chunk() -> None:
    vlm = a_model(Gaze(FixedRegions(2, 2), 16, top_k=1))
    doc = document(PICTURE, CONFIG, np.random.default_rng(0))
    given = batch([[doc]], CONFIG, len(doc.tokens), len(doc.patches))
    region = example_of(doc, CONFIG, vlm.options.layout).info.region[None]
    given = jax.tree.map(jnp.asarray, given._replace(info=given.info._replace(region=region)))
    x, whole = _whole(vlm, given)
    places, wanted = jnp.asarray(offsets_in_region(region[0]))[None], jnp.array([[len(doc.tokens) - 1, 9]])
    found, _ = _cached(vlm, x, given.info, given.positions, vlm.empty_cache(1, 160), places, wanted)
    np.testing.assert_allclose(found, whole[:, wanted[0]], atol=2e-5)


@pytest.mark.parametrize(
    "mechanism", [Gaze(FixedRegions(2, 2), 16, top_k=1), SlidingWindow(9)], ids=["regions", "none"]
)
def test_attention_choices_and_inputs_are_given_beside_a_cache_too(mechanism) -> None:
    """Of a token of a chunk, and of one that is read alone; of losses it is said that they are not."""
    vlm = a_model(mechanism)
    doc = document(PICTURE, CONFIG, np.random.default_rng(0))
    given = batch([[doc]], CONFIG, len(doc.tokens), len(doc.patches))
    region = example_of(doc, CONFIG, vlm.options.layout).info.region[None]
    given = jax.tree.map(jnp.asarray, given._replace(info=given.info._replace(region=region)))
    last = len(doc.tokens) - 1
    whole = jax.jit(lambda model: model.forward(given, Want(jnp.array([[last - 1, last]]), inputs=True)))(vlm)
    x, _ = _whole(vlm, given)
    places, cache = jnp.asarray(offsets_in_region(region[0]))[None], vlm.empty_cache(1, 160)

    @functools.partial(jax.jit, static_argnames="losses")
    def extend(model, x, info, positions, cache, places, losses=False):
        want = Want(jnp.array([[x.shape[1] - 1]]), losses=losses, inputs=True)
        return model.decoder.extend(Embedded(x), info, positions, cache, places, want=want)

    for n, cut in enumerate((slice(0, last), slice(last, last + 1))):
        info = jax.tree.map(lambda code, cut=cut: code[:, cut], given.info)
        read = x[:, cut], info, given.positions[:, :, cut], cache
        out, cache = extend(vlm, *read, places[:, cut] if n == 0 else None)
        entries = jax.tree.map(lambda code: np.asarray(code)[0], cache.codes)
        there = entries.document > 0
        assert sorted(entries.offset[there]) == list(range(cut.stop))
        attention = np.asarray(out.attention)[0, 0, 0]
        assert not attention[:, ~there].any()
        np.testing.assert_allclose(
            attention[:, there], np.asarray(whole.attention)[0, 0, n][:, entries.offset[there]], atol=2e-5
        )
        if vlm.options.layout.regions is None:
            assert out.chosen is None and whole.chosen is None
        else:
            regions = whole.chosen.shape[-1]
            np.testing.assert_array_equal(out.chosen[:, :, 0, :, :regions], whole.chosen[:, :, n])
            assert out.chosen.any()
        np.testing.assert_allclose(out.inputs, whole.inputs[:, :, cut], atol=2e-5)
    with pytest.raises(ValueError, match="losses, gates or choices of mechanisms were asked for beside a cache"):
        extend(vlm, *read, None, losses=True)


@pytest.mark.parametrize(
    ("mechanisms", "parts", "cuts"),
    [
        ((Gaze(FixedRegions(3, 2), 16, top_k=1, normalise="keys"),), PICTURE, [9, 20, 21, 22]),
        pytest.param(
            (Gaze(FixedRegions(2, 2), 16, top_k=1, choice="soft_bias"),), PICTURE, [20, 21, 22], marks=pytest.mark.slow
        ),
        pytest.param(
            (Gaze(FixedRegions(2, 2), 16, top_k=1), SlidingWindow(9)), PICTURE, [20, 21, 22], marks=pytest.mark.slow
        ),
        ((Gaze(FixedRegions(1, 2, frames=2), 16, top_k=1, visual_queries="frame+routed"),), VIDEO, [11]),
        pytest.param(
            (Gaze(FixedRegions(2, 2, frames=2), 16, top_k=4, visual_queries="frame+routed"),),
            FRAMES_64,
            CUTS_64,
            marks=pytest.mark.slow,
        ),
    ],
    ids=[
        "regions of two sizes",
        "soft bias",
        "a window that cuts regions",
        "a chunk that ends inside regions of two frames",
        "64 frames in chunks",
    ],
)
def test_in_parts_it_is_the_whole(mechanisms, parts, cuts) -> None:
    doc = document(parts, CONFIG, np.random.default_rng(0))
    found, whole, _ = read(a_model(*mechanisms), doc, cuts)
    np.testing.assert_allclose(found, whole, atol=2e-5)


def test_other_regions_in_another_layer_are_in_parts_what_they_are_in_the_whole() -> None:
    config = presets.tiny(vocab_size=64, num_layers=2, vision_depth=1, full_attention_blocks=())
    layers = Gaze(FixedRegions(2, 2), 16, top_k=1, layers=(0,)), Gaze(FixedRegions(3, 1), 32, top_k=2, layers=(1,))
    vlm = model(config, ModelOptions(layers), seed=1)
    found, whole, _ = read(vlm, document(PICTURE, config, np.random.default_rng(0)), [20, 21])
    np.testing.assert_allclose(found, whole, atol=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("parts", [[3, Visual(2, 4, 4, video=True), 2, Visual(1, 8, 6), 6], [Visual(1, 8, 8), 7]])
def test_beside_what_sees_ahead_or_reweighs_a_cache_is_the_whole(parts) -> None:
    """A prompt at once and its answer token by token; with a layer that has no regions."""
    gaze, rng = functools.partial(Gaze, FixedRegions(2, 2), 16, top_k=1), np.random.default_rng(0)
    after = ZeroTuning((0.2, 6.0), heads=(0, 2), route="after")
    layers = (
        (gaze(), Croc()),
        (gaze(visual_queries="frame+routed", normalise="keys"), Cca()),
        (gaze(share="group"), Croc("prefix"), after),
        (Croc("prefix"), after),
        (gaze(choice="soft_bias"), after),
        (gaze(descriptor="oracle"), Cca(), after),
    )
    config = presets.tiny(vocab_size=64, num_layers=len(layers), vision_depth=1, full_attention_blocks=())
    mechanisms = [dataclasses.replace(one, layers=(n,)) for n, layer in enumerate(layers) for one in layer]
    vlm, doc = model(config, ModelOptions(tuple(mechanisms)), seed=1), document(parts, CONFIG, rng)
    prompt = len(doc.tokens) - 4
    for code in doc.codes[prompt:]:
        code["role"] = Role.RESPONSE
    found, whole, _ = read(vlm, doc, [*range(prompt, len(doc.tokens))])
    np.testing.assert_allclose(found, whole, atol=5e-5)


@pytest.mark.parametrize(
    "config",
    [
        Gaze(FixedRegions(2, 2), 16, top_k=16, share="group"),
        pytest.param(Gaze(FixedRegions(2, 1), 8, top_k=8), marks=pytest.mark.slow),
    ],
)
def test_all_regions_are_the_dense_model_in_prefill_and_steps(config: Gaze) -> None:
    doc = document(PICTURE, CONFIG, np.random.default_rng(0))
    found, *_ = read(a_model(config), doc, [*range(21, len(doc.tokens))])
    _, dense, _ = read(a_model(), doc, [])
    np.testing.assert_allclose(found, dense, atol=2e-5)


@pytest.mark.slow
def test_a_row_remembers_no_region_of_who_had_it() -> None:
    """Whose regions were more than those of the next prompt are taken."""
    vlm, rng = a_model(Gaze(FixedRegions(1, 1), 40, top_k=1)), np.random.default_rng(0)
    many, few = (document(parts, CONFIG, rng) for parts in ([2, Visual(1, 8, 8), 2], [2, Visual(1, 4, 4), 40]))
    *_, whole = read(vlm, many, [])
    row, reach = jnp.zeros(1, jnp.int32), RegionReach(4, 4)
    part = jax.jit(lambda x: x.take(row, 160, reach).emptied(jnp.ones(1, bool)))(whole)
    _, _, part = read(vlm, few, [], part)
    cache = jax.jit(RegionCache.put)(whole, part, row)
    assert np.unique(cache.regions.info.region).tolist() == [0, 1, 2, 3, 4]


@pytest.mark.slow
def test_all_keys_are_brought_from_the_host_where_they_are_needed() -> None:
    """Where two tokens are read at once, and for a mechanism that changes weights."""
    doc = document(PICTURE, CONFIG, np.random.default_rng(0))
    vlm = a_model(Gaze(FixedRegions(2, 2), 16, top_k=1), ZeroTuning(0.2))
    found, whole, cache = read(vlm, doc, [20, 22], vlm.empty_cache(1, 128, regions_in="host"))
    np.testing.assert_allclose(found, whole, atol=2e-5)
    kept = cache.regions.layer_runs[0].keys
    assert kept.k.tiles.sharding.memory_kind == kept.v.tiles.sharding.memory_kind == "pinned_host"
    assert cache.host_nbytes == kept.k.tiles.nbytes + kept.v.tiles.nbytes
    assert cache.nbytes + cache.host_nbytes == sum(x.nbytes for x in jax.tree.leaves(cache))
    x, info = jnp.zeros((1, 1, CONFIG.text.hidden_size)), jax.tree.map(lambda code: code[:, :1], cache.info)
    with pytest.raises(ValueError, match="visual tokens are read where their rows' regions lie on the device"):
        _cached.lower(vlm, x, info, jnp.zeros((3, 1, 1), int), cache, jnp.zeros((1, 1), int))


FAST = (("head", "device", "compute"), ("group", "host", "int8"))
STEPS = [
    pytest.param(*each, marks=[pytest.mark.slow] * (each not in FAST))
    for each in (
        *itertools.product(("head", "group"), ("device",), ("compute", "int8")),
        ("head", "host", "compute"),
        ("group", "host", "int8"),
    )
]


def test_a_cache_that_the_asked_for_kernel_cannot_read_is_refused_at_once() -> None:
    def empty(regions: FixedRegions, kind="compute", head_dim: int = 128):
        config = presets.tiny(vocab_size=64, num_layers=1)
        sections = (head_dim // 4, head_dim // 8, head_dim // 8)
        text = dataclasses.replace(config.text, head_dim=head_dim, mrope_section=sections)
        config = dataclasses.replace(config, text=text)
        options = ModelOptions((Gaze(regions, 16, top_k=1, share="group"),), attention="pallas_tpu")
        return jax.eval_shape(lambda: Vlm(config, options, key=jax.random.key(0)).empty_cache(1, 24, kind))

    empty(FixedRegions(4, 4))
    for wrong, message in (
        ({"regions": FixedRegions(6, 6)}, "multiple of 8 entries.*not 36"),
        ({"regions": FixedRegions(4, 4), "head_dim": 64}, "multiple of 128 channels, not 16 and 64"),
        ({"regions": FixedRegions(4, 4), "kind": "int8"}, "the cache is int8, and the model computes in float32"),
    ):
        with pytest.raises(ConfigError, match=f"'pallas_tpu', whose kernel cannot decode over regions: .*{message}"):
            empty(**wrong)


@pytest.mark.parametrize(("share", "place", "kind"), STEPS)
def test_a_step_copies_no_layer_out_of_the_stack_and_expands_none(share, place, kind) -> None:
    config = presets.tiny(vocab_size=64, num_layers=3)
    vlm = model(config, ModelOptions((Gaze(FixedRegions(2, 2), 19, top_k=1, share=share),)), seed=1)
    cache = vlm.empty_cache(1, 24, kind, place)
    info = jax.tree.map(lambda code: jnp.ones((1, 1), jnp.int32), cache.info)._replace(region=jnp.zeros((1, 1), int))
    x, at = jnp.zeros((1, 1, config.text.hidden_size)), jnp.zeros((3, 1, 1), jnp.int32)
    text = _cached.lower(vlm, x, info, at, cache).compile().as_text()
    kept = cache.regions.layer_runs[0].keys.v
    L, B, K, *_, h = (kept if kind == "compute" else kept.values).shape
    S = 19 * 4
    assert L == 3 and cache.regions.info.document.shape == (B, S)
    of_a_layer = rf"f32\[(1,)?({B},{K},({S}|{S // 4},4)|{B},{S},{K}),{h}\]"
    assert not re.search(of_a_layer, text)
    if place == "host":
        assert "8,128]" in text and not re.search(rf"\[(1,)?({B},{K},{S // 4}|{B * K * S // 4}),\d+,8,128\]", text)

"""DeepStack: behind each of the first layers the visual tokens get features of their own, however rows are read."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rave_jax.attention import Gaze, MechanismConfig, SlidingWindow
from rave_jax.batch import Batch, Kind
from rave_jax.config import ConfigError
from rave_jax.data.layout import offsets_in_region
from rave_jax.families.config import VlmConfig
from rave_jax.families.qwen3_vl import presets
from rave_jax.layout import ContextTokens, FixedRegions
from rave_jax.models.config import ModelOptions, Remat
from rave_jax.models.forward import Chunk, ImageFeatures, Want
from rave_jax.models.parameters import named_parameters, shardings
from rave_jax.models.vlm import Vlm
from rave_jax.parallel.mesh import MeshConfig, make_mesh
from rave_jax.parallel.sharding import use_mesh
from tests.inference.prompts import example_of
from tests.models.layout import Visual, batch, document
from tests.models.made import model as made

CONFIG = presets.tiny(vocab_size=64, num_layers=4, vision_depth=2)
PARTS: list[int | Visual] = [3, Visual(1, 4, 6), 4, Visual(1, 6, 4), 5]
SHAPE = {"tokens": 32, "patches": 52}
GAZE = Gaze(FixedRegions(2, 2), 16, top_k=1, layers=(1, 2, 3))


@functools.cache
def a_model(options: ModelOptions | None = None, config: VlmConfig = CONFIG) -> Vlm:
    return made(config, options or ModelOptions(), seed=1)


def a_row(vlm: Vlm) -> Batch:
    """One row with the layout that the model wants of its pictures."""
    layout = vlm.options.layout
    doc = document(PARTS, CONFIG, np.random.default_rng(3), layout.context)
    rows = batch([[doc]], CONFIG, **SHAPE)
    region = np.zeros_like(rows.info.region)
    region[0, : len(doc.tokens)] = example_of(doc, CONFIG, layout).info.region
    return jax.tree.map(jnp.asarray, rows._replace(info=rows.info._replace(region=region)))


@jax.jit
def layers_of(model: Vlm, rows: Batch, features: ImageFeatures) -> tuple[jax.Array, jax.Array]:
    """What enters each layer, and what leaves the last."""
    tokens = model.embed_tokens(rows.tokens, rows.info, features, rows.visual_index)
    out = model.decoder(tokens, rows.info, rows.positions, Want(inputs=True))
    return out.inputs, out.hidden


@pytest.mark.parametrize("scan", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_visual_tokens_alone_get_them_and_each_its_own(scan: bool) -> None:
    vlm = a_model(ModelOptions(context=ContextTokens(2), scan_layers=scan))
    rows = a_row(vlm)
    assert {int(kind) for kind in Kind} == set(np.asarray(rows.info.kind).ravel().tolist())
    features = jax.jit(Vlm.embed_images)(vlm, rows.patches)
    assert len(features.deep) == vlm.config.deep_layers == 2
    visual, unit = np.asarray(rows.info.kind[0] == Kind.VISUAL), np.asarray(rows.visual_index[0])
    for layer, deep in enumerate(features.deep):
        without = tuple(jnp.zeros_like(x) if n == layer else x for n, x in enumerate(features.deep))
        (plain, _), (given, _) = (layers_of(vlm, rows, x) for x in (features._replace(deep=without), features))
        np.testing.assert_array_equal(plain[: layer + 1], given[: layer + 1])
        added = np.asarray(given - plain)[layer + 1, 0]
        np.testing.assert_allclose(added[visual], np.asarray(deep)[0][unit[visual]], atol=1e-5)
        assert not added[~visual].any()
        assert np.abs(added[visual]).max() > 0.1


def cut_at(vlm: Vlm, rows: Batch, cuts: list[int]) -> np.ndarray:
    """The hidden states of a row that is read in parts, pictures in the order of their offsets."""
    features = jax.jit(Vlm.embed_images)(vlm, rows.patches)
    places = jnp.asarray(offsets_in_region(np.asarray(rows.info.region[0])))[None]
    cache, found = vlm.empty_cache(1, 64), []
    for start, stop in zip([0, *cuts], [*cuts, SHAPE["tokens"]], strict=True):
        cut = slice(start, stop)
        visual = bool(jnp.any(rows.info.kind[:, cut] >= Kind.VISUAL))
        chunk = Chunk(
            rows.tokens[:, cut],
            jax.tree.map(lambda code, cut=cut: code[:, cut], rows.info),
            rows.positions[:, :, cut],
            rows.visual_index[:, cut] if visual else None,
            places[:, cut] if visual and vlm.options.layout.regions is not None else None,
        )
        out, cache = _extend(vlm, chunk, cache, features if visual else None)
        found.append(out.hidden)
    return np.concatenate(found, axis=1)


_extend = jax.jit(Vlm.extend)
_whole = jax.jit(lambda model, rows: model.forward(rows).hidden)


@pytest.mark.parametrize(
    ("mechanisms", "context", "scan"),
    [
        pytest.param((), None, True, marks=pytest.mark.slow),
        ((GAZE,), ContextTokens(2), True),
        pytest.param((), ContextTokens(1), False, marks=pytest.mark.slow),
        pytest.param((GAZE, SlidingWindow(9, layers=(0,))), None, True, marks=pytest.mark.slow),
    ],
    ids=["plain", "regions and context tokens", "layers apart", "a window and regions"],
)
def test_a_row_in_parts_is_the_whole(
    mechanisms: tuple[MechanismConfig, ...], context: ContextTokens | None, scan: bool
) -> None:
    """Cuts inside both pictures, between them, and before every single token at the end."""
    vlm = a_model(ModelOptions(mechanisms, context, scan_layers=scan))
    rows = a_row(vlm)
    real = np.asarray(rows.info.document[0]) > 0
    whole, parts = np.asarray(_whole(vlm, rows)), cut_at(vlm, rows, [5, 16, 30, 31])
    np.testing.assert_allclose(parts[0, real], whole[0, real], atol=2e-5)


def test_wanted_tokens_get_them_too_where_the_last_layer_does() -> None:
    config = presets.tiny(vocab_size=64, num_layers=1, vision_depth=1, deep_blocks=(0,))
    vlm = a_model(config=config)
    rows = a_row(vlm)
    wanted = jnp.array([[4, 29]])
    assert rows.info.kind[0, 4] == Kind.VISUAL
    found, _ = jax.jit(lambda m, r, c: m.prefill(r, c, wanted=wanted))(vlm, rows, vlm.empty_cache(1, 32))
    np.testing.assert_allclose(found.hidden, _whole(vlm, rows)[:, wanted[0]], atol=2e-5)


@jax.jit
def gradients(model: Vlm, rows: Batch) -> Vlm:
    def loss(model: Vlm) -> jax.Array:
        return jnp.sum(jnp.square(model.forward(rows).hidden), where=(rows.info.document > 0)[..., None])

    return jax.grad(loss)(model)


@pytest.mark.slow
@pytest.mark.parametrize("remat", ["full", "dots"])
def test_every_parameter_learns_alike_whatever_is_kept(remat: Remat) -> None:
    rows = a_row(a_model())
    plain, again = (gradients(a_model(ModelOptions(remat=kind)), rows) for kind in ("none", remat))
    for (name, a), b in zip(named_parameters(plain).items(), named_parameters(again).values(), strict=True):
        assert np.abs(a[...]).max() > 0, name
        np.testing.assert_allclose(b[...], a[...], rtol=1e-4, atol=1e-4 * np.abs(a[...]).max(), err_msg=name)


@pytest.mark.slow
def test_a_mesh_gives_the_same_numbers() -> None:
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2), jax.devices()[:8])
    vlm = a_model(ModelOptions(sequence_parallel=True))
    rows = jax.tree.map(lambda x: jnp.concatenate([x] * 4, axis=1 if x.shape[0] == 3 else 0), a_row(vlm))
    with use_mesh(mesh):
        ours = jax.jit(lambda m, b: m.forward(b).hidden)(jax.device_put(vlm, shardings(vlm, mesh)), rows)
    np.testing.assert_allclose(ours, _whole(vlm, rows), atol=2e-5)


def test_more_features_than_layers_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"vision.deep_layers is 2, expected at most text.num_layers 1"):
        presets.tiny(num_layers=1)
    vlm = a_model()
    rows = a_row(vlm)
    tokens = jnp.zeros((1, 12, CONFIG.text.hidden_size))
    with pytest.raises(ValueError, match="additions to 0 layers, expected 2"):
        jax.eval_shape(Vlm.embed_tokens, vlm, rows.tokens, rows.info, ImageFeatures(tokens), rows.visual_index)

"""Gaze: descriptors, schedule, who chooses what, and a whole model that is the dense one where all is chosen."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rave_jax.attention import (
    Avar,
    Decomposed,
    Gaze,
    Mechanism,
    MechanismConfig,
    Rave,
    TopKSchedule,
)
from rave_jax.batch import Batch, TokenInfo
from rave_jax.config import ConfigError
from rave_jax.data.layout import lay_out, region_major
from rave_jax.data.patches import empty_patches
from rave_jax.data.sample import Example
from rave_jax.families.qwen2_5_vl import presets
from rave_jax.kernels.attention import Implementation
from rave_jax.kernels.routed.pallas_tpu.sizes import BY_DEVICE_KIND, ItemSizes
from rave_jax.kernels.support import interpreted
from rave_jax.layout import FixedRegions, VisualLayout
from rave_jax.models.config import ModelOptions
from rave_jax.models.forward import Embedded, Want
from rave_jax.models.vlm import Vlm
from rave_jax.parallel.mesh import MeshConfig, make_mesh
from rave_jax.parallel.sharding import replicated, use_mesh
from tests.models.layout import Visual, batch, document
from tests.models.made import model as made

CONFIG = presets.tiny(vocab_size=64, num_layers=2, vision_depth=1, full_attention_blocks=())
T, P = 64, 160
LAYOUT = FixedRegions(2, 3)
# One row of two documents, with two pictures and with a video; one row of text and of a single picture.
PARTS = (
    ([2, Visual(1, 6, 8), 3, Visual(1, 4, 4), 5], [1, Visual(2, 4, 6, video=True), 4]),
    ([6], [2, Visual(1, 6, 8), 9]),
)


def rows(regions=LAYOUT, order: str = "raster", parts=PARTS) -> Batch:
    """The rows with regions numbered over each, raster or with the tokens of a region side by side."""
    rng = np.random.default_rng(0)
    documents = [[document(of_one, CONFIG, rng) for of_one in row] for row in parts]
    found = batch(documents, CONFIG, T, P)
    info = jax.tree.map(np.array, found.info)
    lists = {name: np.array(getattr(found, name)) for name in ("tokens", "loss_weights", "visual_index")}
    positions = np.array(found.positions)
    for b, row in enumerate(documents):
        start = regions_before = 0
        for doc in row:
            span = slice(start, start + len(doc.tokens))
            images = info.image[b, span]
            first = images[images > 0].min(initial=99) - 1
            codes = type(info)(*(code[b, span] for code in info))
            codes = codes._replace(image=np.where(images > 0, images - first, 0))
            example = Example(
                lists["tokens"][b, span],
                lists["loss_weights"][b, span],
                codes,
                positions[:, b, span],
                lists["visual_index"][b, span],
                empty_patches((0,), 0),
            )
            example = lay_out(example, VisualLayout(regions, 99))
            region = example.info.region
            region = np.where(region > 0, region + regions_before, 0)
            example = example._replace(info=example.info._replace(region=region, image=images))
            regions_before = max(regions_before, int(region.max()))
            if order == "region":
                # Pictures are found by their number in the document.
                local = example._replace(info=example.info._replace(image=codes.image))
                moved = region_major(local)
                image = moved.info.image
                example = moved._replace(info=moved.info._replace(image=np.where(image > 0, image + first, 0)))
            for name, code in example.info._asdict().items():
                getattr(info, name)[b, span] = code
            info.document[b, span] = codes.document
            for name in ("tokens", "visual_index"):
                lists[name][b, span] = getattr(example, name)
            positions[:, b, span] = example.positions
            start = span.stop
    return found._replace(
        info=jax.tree.map(jnp.asarray, info),
        positions=jnp.asarray(positions),
        **{name: jnp.asarray(x) for name, x in lists.items()},
    )


@functools.cache
def a_model(*mechanisms: MechanismConfig) -> Vlm:
    return made(CONFIG, ModelOptions(mechanisms=mechanisms))


@jax.jit
def hidden(model: Vlm, given: Batch) -> jax.Array:
    return jnp.where((given.info.document > 0)[..., None], model.forward(given).hidden, 0.0)


@jax.jit
def chosen_of(model: Vlm, given: Batch) -> jax.Array:
    """Of every query."""
    return model.forward(given, Want(queries=jnp.broadcast_to(jnp.arange(T), (2, T)))).chosen


def gaze(**options) -> Gaze:
    return Gaze(**({"regions": LAYOUT, "max_regions": 16, "top_k": 2} | options))


@pytest.mark.parametrize(
    "config",
    [gaze(top_k=16), pytest.param(gaze(top_k=16, share="group", descriptor="min_max"), marks=pytest.mark.slow)],
)
def test_all_regions_are_the_dense_model_with_its_gradients(config: Gaze) -> None:
    given = rows()

    @jax.jit
    def of(model: Vlm) -> tuple[jax.Array, jax.Array]:
        def loss(embed: jax.Array) -> jax.Array:
            layers = model.decoder(Embedded(embed), given.info, given.positions)
            return jnp.sum(jnp.where((given.info.document > 0)[..., None], layers.hidden, 0.0) ** 2)

        return jax.value_and_grad(loss)(model.embedded(given).x)

    dense, gate = a_model(Rave(rank=4)), Rave(rank=4)
    for a, b in zip(of(a_model(gate, config)), of(dense), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * np.abs(b).max())
    fewer = hidden(a_model(gaze(), gate), given)
    assert float(jnp.abs(fewer - hidden(dense, given)).max()) > 1e-2


@pytest.mark.slow
@pytest.mark.parametrize("config", [gaze(), gaze(visual_queries="frame+routed", share="group", rank_with_bias=True)])
def test_tokens_may_lie_region_by_region(config: Gaze) -> None:
    """The same rows with the tokens of each region side by side, put back."""
    raster, by_region = rows(), rows(order="region")
    assert (np.asarray(by_region.info.offset) != np.asarray(raster.info.offset)).any()
    model = a_model(config, Rave(rank=4))
    a, b = hidden(model, raster), hidden(model, by_region)
    for row in range(2):
        of = [np.lexsort((info.offset[row], info.document[row])) for info in (raster.info, by_region.info)]
        np.testing.assert_allclose(a[row][of[0]], b[row][of[1]], atol=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    "mechanisms", [(gaze(share="group"),), (gaze(rank_with_bias=True), Rave(rank=4))], ids=["group", "heads and a gate"]
)
def test_the_fused_kernels_are_the_blockwise_attention(
    mechanisms: tuple[MechanismConfig, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hidden states and gradients, half way through the schedule and at its end, compiled once.

    With few queries in an item of work: what an interpreter takes to compile grows with them.
    """
    monkeypatch.setitem(BY_DEVICE_KIND, jax.devices()[0].device_kind, ItemSizes(32, 16, 32, (16, 16)))
    given = rows(order="region")
    real = (given.info.document > 0)[..., None]

    def of(attention: Implementation) -> list[tuple[jax.Array, Vlm]]:
        model = made(CONFIG, ModelOptions(mechanisms, attention=attention))

        @jax.jit
        def both(model: Vlm, progress: jax.Array) -> tuple[jax.Array, Vlm]:
            def loss(model: Vlm) -> tuple[jax.Array, jax.Array]:
                found = jnp.where(real, model.forward(given, Want(progress=progress)).hidden, 0.0)
                return jnp.sum(found**2), found

            return jax.grad(loss, has_aux=True)(model)[::-1]

        return [both(model, jnp.float32(progress)) for progress in (0.25, 0.5)]

    expected = of("xla")
    with interpreted():
        found = of("pallas_tpu")
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4 * np.abs(b).max())


@pytest.mark.slow
def test_a_mesh_changes_no_logit_and_no_gradient() -> None:
    given, model = rows(), a_model(gaze(), Rave(rank=4))
    mesh = make_mesh(MeshConfig(fsdp=2, tensor=2), jax.devices()[:4])

    def loss(model: Vlm) -> jax.Array:
        return jnp.sum(jnp.where((given.info.document > 0)[..., None], model.forward(given).hidden, 0.0) ** 2)

    expected = jax.jit(jax.grad(loss))(model)
    with use_mesh(mesh):
        found = jax.jit(jax.grad(loss))(jax.device_put(model, replicated(mesh)))
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4 * np.abs(b).max())


def at_the_start(packed: Batch, row: int, number: int) -> tuple[Batch, np.ndarray]:
    """One document of a row alone: the first of the row, regions counted from 1; and where it was."""
    (mine,) = np.nonzero(np.asarray(packed.info.document[row]) == number)

    def moved(x: Any, axis: int, fill: int = 0) -> Any:
        found = np.full_like(np.asarray(x), fill)
        found[(slice(None),) * (axis - 1) + (row, slice(len(mine)))] = np.take(np.asarray(x), row, axis - 1)[..., mine]
        return jnp.asarray(found)

    info = TokenInfo(*(moved(code, 1) for code in packed.info))
    least = min((int(n) for n in info.region[row] if n), default=1) - 1
    info = info._replace(document=info.document // number, region=jnp.maximum(info.region - least, 0))
    lists = {name: moved(getattr(packed, name), 1) for name in ("tokens", "loss_weights")}
    index = moved(packed.visual_index, 1, fill=int(packed.visual_index[0, -1]))
    alone = packed._replace(**lists, info=info, positions=moved(packed.positions, 2), visual_index=index)
    return alone, mine


@pytest.mark.slow
@pytest.mark.parametrize("descriptor", ["mean", pytest.param("random", marks=pytest.mark.slow)])
def test_a_packed_document_is_the_document_alone(descriptor) -> None:
    """Wherever it stands, and whatever numbers its regions have; so is its part of a gradient."""
    packed, model = rows(), a_model(gaze(top_k=1, descriptor=descriptor), Rave(rank=4))
    total, whole = gradient(model, packed)
    assert np.abs(whole - np.asarray(hidden(a_model(Rave(rank=4)), packed))).max() > 1e-2, "it chooses"
    parts = []
    for row, number in ((0, 1), (0, 2), (1, 1), (1, 2)):
        alone, mine = at_the_start(packed, row, number)
        part, found = gradient(model, alone)
        np.testing.assert_allclose(found[row, : len(mine)], whole[row][mine], atol=2e-5)
        parts.append(part)
    summed = jax.tree.map(lambda *x: sum(x), *parts)
    for a, b in zip(jax.tree.leaves(summed), jax.tree.leaves(total), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4 * (1 + np.abs(b).max()))


@jax.jit
def _gradient(model: Vlm, given: Batch) -> tuple[Any, jax.Array]:
    """Of a sum over the tokens that have a loss, by every parameter; and the hidden states."""

    def loss(model: Vlm) -> tuple[jax.Array, jax.Array]:
        found = model.forward(given).hidden
        real = jnp.where((given.info.document > 0)[..., None], found, 0.0)
        return jnp.sum(given.loss_weights[..., None] * jnp.sin(found)), real

    return jax.grad(loss, has_aux=True)(model)


def gradient(model: Vlm, given: Batch) -> tuple[Any, np.ndarray]:
    """In numpy: each operation on a parameter of another shape would be compiled."""
    return jax.tree.map(np.asarray, _gradient(model, given))


def test_without_pictures_or_regions_it_is_plain_attention() -> None:
    given = rows()
    bare = given._replace(info=given.info._replace(region=jnp.zeros_like(given.info.region)))
    text = batch([[document([20], CONFIG, np.random.default_rng(0))]] * 2, CONFIG, T, P)
    for found in (bare, text):
        np.testing.assert_array_equal(hidden(a_model(gaze()), found), hidden(a_model(), found))


@pytest.mark.slow
def test_regions_are_ranked_without_rope_where_text_meets_them_without() -> None:
    """Beside Decomposed: all regions are its dense model, and few are those with the largest <q0, mean k0>."""
    given, keys = rows(), {"descriptor_keys": "pre_rope"}
    dense = np.asarray(hidden(a_model(Decomposed()), given))
    np.testing.assert_allclose(hidden(a_model(gaze(top_k=16, **keys), Decomposed()), given), dense, atol=2e-5)
    few = a_model(gaze(top_k=1, **keys), Decomposed())
    assert np.abs(np.asarray(hidden(few, given)) - dense).max() > 1e-2
    # In the first layer queries and keys before RoPE are those of a model whose layers all have it.
    plain = a_model(gaze(top_k=1, **keys))
    np.testing.assert_array_equal(chosen_of(few, given)[0], chosen_of(plain, given)[0])


@pytest.mark.parametrize(("keys", "same"), [("pre_rope", True), ("post_rope", False)])
def test_keys_before_rotary_positions_rank_alike_wherever_a_picture_stands(keys, same: bool) -> None:
    """In the first layer, whose keys know nothing else of positions."""
    given, model = rows(), a_model(gaze(descriptor_keys=keys))
    visual = given.info.image > 0
    far = given._replace(positions=jnp.where(visual & (given.info.col > 0), given.positions + 40, given.positions))
    first, other = (chosen_of(model, one)[0] for one in (given, far))
    assert bool((first == other).all()) == same


@pytest.mark.parametrize(
    "config",
    [
        gaze(),
        gaze(top_k=0.4, visual_queries="frame+routed"),
        pytest.param(gaze(descriptor="oracle"), marks=pytest.mark.slow),
    ],
)
def test_what_is_chosen_stands_before_and_is_as_much_as_was_asked(config: Gaze) -> None:
    given = rows()
    chosen = np.asarray(chosen_of(a_model(config), given))
    info = jax.tree.map(np.asarray, given.info)
    for b, t in np.ndindex(2, T):
        able = set()
        for n in range(1, 17):
            (tokens,) = np.nonzero((info.region[b] == n) & (info.document[b] == info.document[b, t]))
            own = info.offset[b, t]
            if info.image[b, t]:
                own -= info.row[b, t] * info.grid_w[b, t] + info.col[b, t]
            if len(tokens) and info.document[b, t] and (info.offset[b][tokens] < own).all():
                able.add(n - 1)
        if info.image[b, t] and config.visual_queries == "dense":
            able = set()
        count = min(len(able), 2) if config.top_k == 2 else np.ceil(round(0.4 * len(able), 4))
        found = chosen[:, b, t]
        assert (found.sum(-1) == count).all()
        assert not found[..., [n for n in range(16) if n not in able]].any()


def test_the_schedule_goes_from_all_to_top_k_without_compiling_again() -> None:
    given, model = rows(), a_model(gaze(), Rave(rank=4))

    @jax.jit
    def at(model: Vlm, progress: jax.Array) -> jax.Array:
        return model.forward(given, Want(progress=progress)).hidden

    real = np.asarray(given.info.document > 0)
    for progress, same in ((0.0, a_model(Rave(rank=4))), (0.5, model)):
        found, expected = np.asarray(at(model, jnp.float32(progress))), np.asarray(hidden(same, given))
        np.testing.assert_allclose(found[real], expected[real], atol=2e-5)
    assert at._cache_size() == 1


@pytest.mark.parametrize(
    ("shape", "share"),
    [
        ("cosine", [1, (2 + 2**0.5) / 4, 0.5, (2 - 2**0.5) / 4]),
        ("linear", [1, 0.75, 0.5, 0.25]),
        ("steps", [1, 0.5, 0.25, 0.125]),
        ("none", [0, 0, 0, 0]),
    ],
)
def test_schedules_fall_from_one_to_nothing(shape, share) -> None:
    schedule = TopKSchedule(shape, until=0.5)
    found = [float(schedule.dense(jnp.float32(x))) for x in (0, 0.125, 0.25, 0.375, 0.5, 0.75, 1)]
    np.testing.assert_allclose(found, [*share, 0, 0, 0], atol=1e-6)
    assert found[4:] == [0, 0, 0], "exactly: any share of further regions is at least one region more"


def test_wrong_settings_and_company_are_refused() -> None:
    for wrong in ({"top_k": 0}, {"top_k": 2.5}, {"top_k": 1.0}, {"max_regions": 0}, {"tau": 0.0}):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            Gaze(**wrong)
    with pytest.raises(ConfigError, match="until"):
        TopKSchedule(until=0)
    with pytest.raises(ConfigError, match="Gaze cannot share a layer with Decomposed, which lets other queries"):
        a_model(gaze(), Decomposed())
    a_model(gaze(descriptor_keys="pre_rope"), Decomposed())
    with pytest.raises(
        ConfigError,
        match="'pallas_tpu', which cannot serve Gaze: it has choice 'soft_bias', and the kernels",
    ):
        ModelOptions(mechanisms=(gaze(choice="soft_bias"),), attention="pallas_tpu")
    ModelOptions(mechanisms=(gaze(),), attention="pallas_tpu")
    with pytest.raises(ConfigError, match="'pallas_tpu', which cannot serve Avar in a layer with Gaze: its kernels"):
        made(CONFIG, ModelOptions((gaze(layers=(0,)), Avar()), attention="pallas_tpu"))
    made(CONFIG, ModelOptions((gaze(rank_with_bias=True), Rave(rank=4)), attention="pallas_tpu"))
    with pytest.raises(
        ConfigError,
        match="Gaze, with the fields that it has, needs in each of its layers another",
    ):
        a_model(gaze(rank_with_bias=True), Rave(rank=4, layers=(0,)))
    with pytest.raises(ConfigError, match="normalise is 'keys', expected 'none' with descriptor 'spread'"):
        gaze(descriptor="spread", normalise="keys")
    with pytest.raises(ConfigError, match="rank_with_bias"):
        gaze(descriptor="oracle", rank_with_bias=True)
    with pytest.raises(ConfigError, match="Gaze and Gaze share a layer, and each chooses what queries read"):
        a_model(gaze(), gaze(top_k=3))
    assert issubclass(type(a_model(gaze()).decoder.layer_runs[0].layers.mechanisms[0]), Mechanism)

"""Gaze: descriptors, schedule, who chooses what, and a whole model that is the dense one where all is chosen."""

from __future__ import annotations

import functools
from typing import Any

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings

from rave_jax.attention import (
    AttentionDims,
    Avar,
    Cca,
    Croc,
    Decomposed,
    Features,
    Gaze,
    Mechanism,
    MechanismConfig,
    Rave,
    TopKSchedule,
    ZeroTuning,
    attend,
    build_mechanisms,
    remember,
)
from rave_jax.attention.attend import mask_codes
from rave_jax.attention.gaze import descriptors
from rave_jax.attention.masks import causal_codes
from rave_jax.batch import Batch, TokenInfo
from rave_jax.config import ConfigError
from rave_jax.data.layout import lay_out, region_major
from rave_jax.data.patches import empty_patches
from rave_jax.data.sample import Example
from rave_jax.families.qwen2_5_vl import presets
from rave_jax.kernels.attention import Implementation
from rave_jax.kernels.support import interpreted
from rave_jax.layout import AdaptiveRegions, FixedRegions, VisualLayout
from rave_jax.models.config import ModelOptions
from rave_jax.models.forward import Embedded, Want
from rave_jax.models.vlm import Vlm
from rave_jax.parallel.mesh import MeshConfig, make_mesh
from rave_jax.parallel.sharding import replicated, use_mesh
from tests.attention.packed import features
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
def test_the_fused_kernels_are_the_blockwise_attention(mechanisms: tuple[MechanismConfig, ...]) -> None:
    """Hidden states and gradients, half way through the schedule and at its end, compiled once."""
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


NAMES = ("mean", "min_max", "spread", "learned")


@functools.partial(jax.jit, static_argnames=("name", "R"))
def described(name, k, logits, region, R):
    summary = descriptors.summarise(name, k, logits, region, R)
    return descriptors.describe(name, summary, (*region.shape[:1], R, *k.shape[2:]), jnp.zeros((1, R), jnp.int32))


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 1000), cut=st.integers(0, 12))
def test_descriptors_are_their_formulas_whole_or_in_parts(name, seed: int, cut: int) -> None:
    """Also with keys in another order, and 0 for a region without keys."""
    rng = np.random.default_rng(seed)
    R, region = 4, rng.integers(0, 4, (1, 12)).astype(np.int32)
    k = rng.normal(size=(1, 12, 2, 4)).astype(np.float32)
    logits = rng.normal(size=(1, 12, 2)).astype(np.float32) if name == "learned" else None
    found = np.asarray(described(name, jnp.asarray(k), logits, jnp.asarray(region), R))
    for n, head in np.ndindex(R, 2):
        (mine,) = np.nonzero(region[0] == n + 1)
        keys = np.float64(k[0, mine, head])
        if not len(mine):
            assert not found[0, n, head].any()
            continue
        expected = {
            "mean": lambda keys=keys: keys.mean(0),
            "min_max": lambda keys=keys: np.concatenate([keys.max(0), keys.min(0)]),
            "spread": lambda keys=keys: np.concatenate([keys.mean(0), keys.var(0)]),
            "learned": lambda keys=keys, mine=mine, head=head: np.average(
                keys, 0, weights=np.exp(8 * np.tanh(np.float64(logits[0, mine, head]) / 8))
            ),
        }[name]()
        np.testing.assert_allclose(found[0, n, head], expected, atol=2e-5)
    order = rng.permutation(12)
    moved = [None if x is None else x[:, order] for x in (k, logits, region)]
    np.testing.assert_allclose(in_parts(name, *moved, cut, R), found, atol=2e-5)


@functools.partial(jax.jit, static_argnames=("name", "R"))
def in_parts(name, k, logits, region, cut, R):
    """The first `cut` keys, and apart from them the others: keys of no region say nothing."""
    first = jnp.arange(region.shape[1]) < cut
    a, b = (descriptors.summarise(name, k, logits, jnp.where(mine, region, 0), R) for mine in (first, ~first))
    return descriptors.describe(name, descriptors.combine(a, b), (1, R, 2, 4), jnp.zeros((1, R), jnp.int32))


def test_small_regions_keep_their_share_where_they_are_normalised() -> None:
    """With random keys: of the first places of a third of all regions, which have 6 keys where the others have 36."""
    rng, R = np.random.default_rng(0), 6
    sizes = np.array([36, 36, 6, 36, 36, 6])
    region = jnp.asarray(np.tile(np.repeat(np.arange(1, R + 1), sizes), (300, 1)), jnp.int32)
    k = np.float32(rng.normal(size=(*region.shape, 1, 32)) + 3 * rng.normal(size=(300, 1, 1, 32)))

    @jax.jit
    def both(k: jax.Array) -> tuple[jax.Array, jax.Array]:
        summary = descriptors.summarise("mean", k, None, region, R)
        mean = descriptors.describe("mean", summary, (300, R, 1, 32), jnp.zeros((300, R), jnp.int32))
        return mean, descriptors.evened(mean, summary, jnp.broadcast_to(jnp.arange(R) == 0, (300, R)), 36)

    mean, found = map(np.asarray, both(k))
    q = rng.normal(size=(300, 64, 32))
    share = [np.isin(np.einsum("bth,brh->btr", q, d[:, :, 0]).argmax(-1), (2, 5)).mean() for d in (mean, found)]
    assert share[0] > 0.45 and abs(share[1] - 1 / 3) < 0.03
    np.testing.assert_array_equal(found[:, sizes == 36], mean[:, sizes == 36])


def test_a_normalised_mean_lies_nearer_to_that_of_its_frames() -> None:
    """Of every region of the rows, whose frames are those of one document and picture: at the edge, by sqrt(n / m)."""
    given, router = rows(), gaze(normalise="keys").build(AttentionDims(4, 2, 8), jax.random.key(0))
    info, x = jax.tree.map(np.asarray, given.info), features(rows=2, length=T)

    @jax.jit
    def descriptors_of(x: Features, info: TokenInfo) -> jax.Array:
        summary = router.summarise(x, info.region, 16)
        return router.route(x, summary, info, info, causal_codes(info), 16, None).routes.descriptor

    found = descriptors_of(x, given.info)
    ragged = 0
    for b, n in np.ndindex(2, 16):
        mine = info.region[b] == n + 1
        if not mine.any():
            continue
        of = mine.argmax()
        same = ["document", "image", "frame"]
        frames = np.all([getattr(info, name)[b] == getattr(info, name)[b, of] for name in same], axis=0)
        frames &= info.region[b] > 0
        mean, around = (np.float64(x.k)[b, some].mean(0) for some in (mine, frames))
        ragged += mine.sum() < 6
        np.testing.assert_allclose(found[b, n], around + (mine.sum() / 6) ** 0.5 * (mean - around), atol=1e-5)
    assert ragged > 4


def test_min_max_bounds_the_score_of_every_key() -> None:
    rng = np.random.default_rng(0)
    q, k = jnp.asarray(rng.normal(size=(1, 5, 2, 4))), jnp.asarray(rng.normal(size=(1, 6, 2, 4)))
    d = described("min_max", k, None, jnp.ones((1, 6), jnp.int32), 1)
    bound = jnp.einsum("BTKc,BRKc->BTK", descriptors.features("min_max", q, jnp.zeros((1, 5), jnp.int32)), d)
    assert (np.einsum("btkh,bskh->bstk", q, k) <= np.asarray(bound)[:, None] + 1e-5).all()


def test_spread_is_the_log_of_a_region_s_mass_to_second_order() -> None:
    """Of weights exp(<q, k> / sqrt(h)): by a product over channels, for keys whose channels vary apart."""
    h, rng = 4, np.random.default_rng(0)
    one = rng.normal(size=(2, h))
    k = np.stack([[one[bit, c] for c, bit in enumerate(np.unravel_index(n, (2,) * h))] for n in range(2**h)])
    q = 0.1 * rng.normal(size=(5, h))
    d = described("spread", jnp.asarray(k[None, :, None]), None, jnp.ones((1, 2**h), jnp.int32), 1)
    x = descriptors.features("spread", jnp.asarray(q[None, :, None]), jnp.zeros((1, 5), jnp.int32))
    found = np.einsum("btkc,brkc->t", x, d)
    np.testing.assert_allclose(found, np.log(np.exp(q @ k.T / h**0.5).mean(1)), atol=1e-5)


def test_wrong_settings_and_company_are_refused() -> None:
    for wrong in ({"top_k": 0}, {"top_k": 2.5}, {"top_k": 1.0}, {"max_regions": 0}, {"tau": 0.0}):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            Gaze(**wrong)
    with pytest.raises(ConfigError, match="until"):
        TopKSchedule(until=0)
    with pytest.raises(ConfigError, match="Gaze and Gaze ask for different regions"):
        ModelOptions(mechanisms=(Gaze(layers=(0,)), Gaze(AdaptiveRegions(), layers=(1,))))
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


COMPANY: dict[str, tuple[MechanismConfig, ...]] = {
    "croc": (Croc(),),
    "prefix": (Croc("prefix"),),
    "cca": (Cca(),),
    "after": (ZeroTuning((5.0, 0.3), heads=(0, 2), route="after"),),
}


@functools.partial(jax.jit, static_argnames=("gaze", "company"))
def beside(gaze: Gaze, company: tuple[MechanismConfig, ...], x: Features, info: TokenInfo) -> Any:
    """What a layer gives, and the mask codes of those that stand beside Gaze."""
    mechanisms = build_mechanisms((gaze, *company), AttentionDims(4, 2, 8), jax.random.key(0))
    codes = mask_codes(mechanisms, info, info, causal_codes(info))
    every = jnp.broadcast_to(jnp.arange(T), (2, T))
    summary = mechanisms[0].summarise(x, info.region, 16)
    keys = remember(mechanisms, x)._replace(summary=summary)
    found = attend(x, keys, codes, info, info, mechanisms, queries=every, regions=16, implementation="xla")
    return found.out, found.attention, codes


FAST = {("cca", "frame+routed"), ("after", "dense")}
BEGINS = ((PARTS[0][0], PARTS[0][1][1:]), (PARTS[1][0], PARTS[1][1][1:]))
"""Two documents begin with a picture, so that their first token is in a region."""


@pytest.mark.parametrize(
    ("name", "visual_queries"),
    [
        pytest.param(name, who, marks=[pytest.mark.slow] * ((name, who) not in FAST))
        for name in COMPANY
        for who in ("dense", "frame+routed")
    ],
)
def test_beside_what_reorders_or_reweighs_it_is_the_dense_formula(name: str, visual_queries) -> None:
    """Query by query in loops: text chooses two of the regions that it sees whole, the mask decides the rest."""
    given, x = rows(order="region", parts=BEGINS), features(rows=2, length=T)
    config = gaze(visual_queries=visual_queries)
    found = beside(config, COMPANY[name], x, given.info)
    out, weights = map(np.asarray, found[:2])
    lo, hi, order, _, _ = map(np.asarray, found[2])
    info = jax.tree.map(np.asarray, given.info)
    gammas = dict(zip((0, 2), (5.0, 0.3), strict=True)) if name == "after" else {}
    for b, t in np.ndindex(2, T):
        if not info.document[b, t]:
            assert not weights[b, t].any()
            continue
        seen = (lo[b, t] <= order[b]) & (order[b] <= hi[b, t])
        regions = [np.flatnonzero(info.region[b] == n) for n in range(1, info.region[b].max() + 1)]
        if info.image[b, t] and visual_queries == "dense":
            able = []
        elif info.image[b, t]:
            own = [info.document[b] == info.document[b, t], info.offset[b] < info.offset[b, t]]
            ahead = np.logical_and.reduce(own) & (
                (info.image[b] != info.image[b, t]) | (info.frame[b] < info.frame[b, t])
            )
            able = [keys for keys in regions if ahead[keys].all()]
        else:
            able = [keys for keys in regions if seen[keys].all()]
        for head in range(4):
            q, k, v = (np.float64(y)[b] for y in (x.q[:, t, head], x.k[:, :, head // 2], x.v[:, :, head // 2]))
            ranked = sorted(able, key=lambda keys, q=q, k=k: -q @ k[keys].mean(0))
            open_ = seen.copy()
            for keys in ranked[2:]:
                open_[keys] = False
            row = np.where(open_, np.exp(k @ q / 8**0.5), 0.0)
            first = (info.document[b] == info.document[b, t]) & (info.offset[b] == 0)
            row = np.where(first, row * gammas.get(head, 1.0), row)
            np.testing.assert_allclose(weights[b, t, head], row / row.sum(), atol=2e-5)
            np.testing.assert_allclose(out[b, t, head], row / row.sum() @ v, atol=2e-5)

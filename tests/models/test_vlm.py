from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rave_jax.attention import CacheType, KvCache, Rave, SlidingWindow
from rave_jax.batch import Batch, Kind, TokenInfo
from rave_jax.data.patches import empty_patches
from rave_jax.families.config import TextConfig, VlmConfig
from rave_jax.families.qwen2_5_vl import presets
from rave_jax.models.config import ModelOptions
from rave_jax.models.forward import Chunk, ImageFeatures, Want
from rave_jax.models.parameters import count, named_parameters, param_axes, shardings, with_values
from rave_jax.models.vlm import Vlm
from rave_jax.parallel.mesh import MeshConfig, make_mesh
from rave_jax.parallel.sharding import use_mesh
from tests.models.layout import Document, Visual, batch, document
from tests.models.made import model as made

CONFIG = presets.tiny(vocab_size=64, num_layers=3)
RAVE = ModelOptions(mechanisms=(Rave(rank=4, layers=(1, 2)),))


@functools.cache
def a_model(options: ModelOptions = ModelOptions()) -> Vlm:  # noqa: B008  # frozen
    return made(CONFIG, options)


BOTH = pytest.mark.parametrize(
    "options", [pytest.param(ModelOptions(), id="plain", marks=pytest.mark.slow), pytest.param(RAVE, id="rave")]
)
"""The gated model has a layer without a gate as well."""


@jax.jit
def logits(model: Vlm, batch: Batch) -> jax.Array:
    return model.logits(model.forward(batch).hidden)


embedded = jax.jit(lambda model, batch: model.embedded(batch).x)
hidden_states = jax.jit(lambda model, batch: model.forward(batch).hidden)


def documents(*parts: list[int | Visual]):
    rng = np.random.default_rng(7)
    return [document(p, CONFIG, rng) for p in parts]


@BOTH
def test_packed_documents_equal_each_alone(options: ModelOptions) -> None:
    model = a_model(options)
    docs = documents([3, Visual(1, 4, 6), 4], [5], [Visual(1, 2, 4), 1, Visual(2, 4, 4, video=True), 3])
    shape = PACKED
    packed = logits(model, batch([docs, docs[::-1]], CONFIG, **shape))
    for order, row in ((docs, 0), (docs[::-1], 1)):
        start = 0
        for doc in order:
            n = len(doc.tokens)
            alone = logits(model, batch([[doc], []], CONFIG, **shape))
            np.testing.assert_allclose(packed[row, start : start + n], alone[0, :n], atol=2e-5)
            start += n


PACKED = {"tokens": 44, "patches": 68}


@jax.jit
def loss_and_gradients(model: Vlm, rows: Batch) -> tuple[jax.Array, Vlm]:
    def loss(model: Vlm) -> jax.Array:
        # The square makes every token's share its own; padding has none.
        real = (rows.info.kind != Kind.PAD)[..., None]
        return jnp.sum(jnp.square(model.logits(model.forward(rows).hidden)), where=real)

    return jax.value_and_grad(loss)(model)


prefill, extend = jax.jit(Vlm.prefill), jax.jit(Vlm.extend)


@BOTH
def test_prefill_and_decode_equal_the_whole_forward_at_every_step(options: ModelOptions) -> None:
    model = a_model(options)
    rows = [[doc] for doc in documents([3, Visual(1, 4, 6), 8], [12])]
    prompts = np.array([11, 7])
    T = 18
    whole = batch(rows, CONFIG, tokens=T, patches=24)
    expected = np.asarray(logits(model, whole))
    lengths = (np.asarray(whole.info.document) > 0).sum(1)

    within = np.arange(T) < prompts[:, None]
    prompt = whole._replace(
        tokens=np.where(within, whole.tokens, 0),
        info=TokenInfo(*(np.where(within, code, 0) for code in whole.info)),
        positions=np.where(within, whole.positions, 0),
    )
    # The cache is larger than the prompt, and rows end at different lengths.
    out, cache = prefill(model, prompt, model.empty_cache(2, T + 5))
    assert cache.index.tolist() == prompts.tolist()
    for row, n in enumerate(prompts):
        np.testing.assert_allclose(model.logits(out.hidden)[row, :n], expected[row, :n], atol=2e-5)

    for step in range(7):
        at = prompts + step
        alive = at < lengths
        pick = functools.partial(np.take_along_axis, indices=np.minimum(at, T - 1)[:, None], axis=1)
        info = TokenInfo(*(np.where(alive[:, None], pick(code), 0) for code in whole.info))
        positions = np.stack([pick(p) for p in whole.positions])
        out, cache = extend(model, Chunk(pick(whole.tokens), info, positions), cache)
        for row in np.flatnonzero(alive):
            np.testing.assert_allclose(model.logits(out.hidden)[row, 0], expected[row, at[row]], atol=2e-5)
    assert cache.index.tolist() == lengths.tolist()


@pytest.mark.parametrize(
    ("layers", "alone"),
    [pytest.param((1, 2), False, id="stacked", marks=pytest.mark.slow), pytest.param((2,), True, id="apart")],
)
def test_only_the_wanted_tokens_come_out_of_a_chunk(layers: tuple[int, ...], alone: bool) -> None:
    """And the same cache; where the last layer stands apart, its mlp is computed for them alone."""
    model = a_model(ModelOptions(mechanisms=(Rave(rank=4, layers=layers),)))
    prompt = batch([[doc] for doc in documents([3, Visual(1, 4, 6), 8], [12])], CONFIG, tokens=18, patches=24)
    wanted = np.array([[16, 2], [11, 0]])

    def some(model: Vlm, prompt: Batch, cache: KvCache) -> tuple[jax.Array, KvCache]:
        out, cache = model.prefill(prompt, cache, wanted=jnp.asarray(wanted))
        return out.hidden, cache

    given = (model, prompt, model.empty_cache(2, 23))
    whole, expected = prefill(*given)
    traced = jax.jit(some).trace(*given)
    found, cache = traced.lower().compile()(*given)
    np.testing.assert_allclose(
        found, np.take_along_axis(np.asarray(whole.hidden), wanted[..., None], axis=1), atol=2e-5
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), cache, expected)
    assert (f"f32[2,2,{CONFIG.text.mlp_size}]" in str(traced.jaxpr)) == alone


@pytest.mark.parametrize(
    ("kind", "tolerance"), [pytest.param("bfloat16", 0.02, marks=pytest.mark.slow), ("int8", 0.02)]
)
def test_a_smaller_cache_changes_little(kind: CacheType, tolerance: float) -> None:
    model = a_model(RAVE)
    whole = batch([[doc] for doc in documents([3, Visual(1, 4, 6), 8], [12])], CONFIG, tokens=18, patches=24)
    expected = np.asarray(logits(model, whole))
    out, _ = prefill(model, whole, model.empty_cache(2, 18, kind))
    real = np.asarray(whole.info.document) > 0
    difference = np.abs(np.asarray(model.logits(out.hidden)) - expected)[real]
    assert 0 < difference.max() < tolerance * np.abs(expected[real]).max()


def test_a_cache_keeps_what_mechanisms_remember_and_no_more() -> None:
    (plain,) = a_model().empty_cache(1, 5).layer_runs
    assert plain.remembered == ()
    before, rave, *after = a_model(RAVE).empty_cache(1, 5).layer_runs
    assert [keys.remembered for keys in (before, *after)] == [()] * (1 + len(after))
    gate_keys = jax.tree.leaves(rave.remembered)
    # The key's side of a pair product of rank 4: w, a one for the query's term, and the key's term.
    assert [x.shape for x in gate_keys] == [(2, 1, CONFIG.text.num_kv_heads, 5, 6)]


def test_text_needs_no_patches() -> None:
    docs = documents([9])
    without = batch([docs], CONFIG, tokens=10, patches=0)
    spare = batch([docs], CONFIG, tokens=10, patches=16)
    np.testing.assert_allclose(logits(a_model(), without), logits(a_model(), spare), atol=1e-6)
    text = made(VlmConfig(text=TextConfig(), family="qwen3"))
    assert np.isfinite(logits(text, without._replace(patches=empty_patches((1, 0), 0)))).all()
    with pytest.raises(ValueError, match="no vision tower"):
        text.forward(spare)


def test_features_that_would_be_dropped_are_refused() -> None:
    given = batch([documents([3, Visual(1, 4, 6), 4])], CONFIG, tokens=14, patches=24)
    tokens = jnp.zeros((1, 6, CONFIG.text.hidden_size))
    for features, index, message in (
        (ImageFeatures(tokens), None, "without visual_index"),
        (ImageFeatures(tokens, (tokens, tokens)), given.visual_index, "additions to 2 layers, expected 0"),
    ):
        with pytest.raises(ValueError, match=message):
            jax.eval_shape(Vlm.embed_tokens, a_model(), given.tokens, given.info, features, index)


@BOTH
def test_empty_rows_and_padding_make_no_nan(options: ModelOptions) -> None:
    rows = batch([documents([2, Visual(1, 4, 4), 2]), []], CONFIG, **PACKED)
    value, grads = loss_and_gradients(a_model(options), rows)
    assert np.isfinite(value)
    for name, grad in named_parameters(grads).items():
        assert np.isfinite(grad[...]).all(), name
        assert np.abs(grad[...]).max() > 0, name


def test_fifty_odd_sizes_compile_once() -> None:
    traced = []

    @jax.jit
    def run(model: Vlm, batch: Batch) -> jax.Array:
        traced.append(1)
        return model.forward(batch).hidden

    rng = np.random.default_rng(0)
    for _ in range(50):
        h, w = 2 * rng.integers(1, 7, 2)
        doc = document([int(rng.integers(1, 6)), Visual(1, int(h), int(w)), 2], CONFIG, rng)
        assert np.isfinite(run(a_model(), batch([[doc]], CONFIG, tokens=44, patches=144))).all()
    assert len(traced) == 1 == run._cache_size()


def test_the_attention_of_queries_is_what_the_heads_read() -> None:
    rows = batch([documents([3, Visual(1, 4, 6), 4]), documents([6])], CONFIG, tokens=14, patches=24)
    wanted = jnp.array([[12, 0, 5], [5, 2, 13]])
    out = jax.jit(Vlm.forward)(a_model(RAVE), rows, Want(queries=wanted))
    hidden, seen = out.hidden, np.asarray(out.attention)
    np.testing.assert_allclose(hidden, hidden_states(a_model(RAVE), rows), atol=2e-5)
    assert out.chosen is None and out.inputs is None and out.losses == {}
    assert seen.shape == (3, 2, 3, CONFIG.text.num_heads, 14)
    total = seen.sum(-1)
    np.testing.assert_allclose(total[:, 0], 1, atol=1e-5)
    np.testing.assert_allclose(total[:, 1, :2], 1, atol=1e-5)
    assert (total[:, 1, 2] == 0).all(), "a padding query sees nothing"
    assert (seen[:, 0, 2, :, 6:] == 0).all(), "no query sees what comes later"


@pytest.mark.slow
def test_rematerialisation_changes_no_gradient() -> None:
    rows = batch([documents([3, Visual(1, 4, 6), 4])], CONFIG, tokens=14, patches=24)

    @jax.jit
    def grads(model: Vlm) -> Vlm:
        return jax.grad(lambda m: jnp.sum(jnp.square(m.forward(rows).hidden)))(model)

    ours = named_parameters(grads(a_model()))
    for remat in ("full", "dots"):
        theirs = named_parameters(grads(made(CONFIG, ModelOptions(remat=remat))))
        for name in ours:
            np.testing.assert_allclose(ours[name][...], theirs[name][...], rtol=1e-4, atol=1e-4, err_msg=name)


@pytest.mark.slow
def test_a_stack_that_is_cut_says_the_same() -> None:
    # A window wider than the row does nothing but make layer runs.
    whole = a_model()
    cut = ModelOptions(mechanisms=(SlidingWindow(100, layers=(1,)),))
    parts = made(CONFIG, cut)
    (stack,) = whole.decoder.layer_runs
    assert [(s.start, s.stop) for s in parts.decoder.layer_runs] == [(0, 1), (1, 2), (2, 3)]
    values = {path: value[...] for path, value in named_parameters(whole).items() if ".layer_runs." not in path}
    for run in parts.decoder.layer_runs:
        run.layers = jax.tree.unflatten(
            jax.tree.structure(run.layers),
            [x[run.start : run.stop] for x in jax.tree.leaves(stack.layers)],
        )
    parts = with_values(parts, values)
    rows = batch([documents([3, Visual(1, 4, 6), 4])], CONFIG, tokens=14, patches=24)
    np.testing.assert_allclose(logits(whole, rows), logits(parts, rows), atol=1e-5)


@pytest.mark.slow
def test_how_a_stack_is_cut_changes_nothing() -> None:
    # A window wider than the row does nothing but make layer runs.
    cut = ModelOptions(mechanisms=(SlidingWindow(100, layers=(1,)),))
    build = jax.jit(lambda options: Vlm(CONFIG, options, key=jax.random.key(3)), static_argnums=0)
    whole, parts = build(ModelOptions()), build(cut)
    assert [len(whole.decoder.layer_runs), len(parts.decoder.layer_runs)] == [1, 3]
    rows = batch([documents([3, Visual(1, 4, 6), 4])], CONFIG, tokens=14, patches=24)
    np.testing.assert_allclose(logits(whole, rows), logits(parts, rows), atol=1e-5)


@pytest.mark.slow
def test_layers_apart_are_the_layers_of_the_stack() -> None:
    build = jax.jit(lambda options: Vlm(CONFIG, options, key=jax.random.key(3)), static_argnums=0)
    stacked, apart = (build(dataclasses.replace(RAVE, scan_layers=scan)) for scan in (True, False))
    for stack, depth in ((apart.decoder, CONFIG.text.num_layers), (apart.vision, CONFIG.vision.depth)):
        assert [(s.start, s.stop) for s in stack.layer_runs] == [(n, n + 1) for n in range(depth)]
    rows = batch([documents([3, Visual(1, 4, 6), 4])], CONFIG, tokens=14, patches=24)

    @jax.jit
    def value_and_grads(model: Vlm) -> tuple[jax.Array, Vlm]:
        return jax.value_and_grad(lambda m: jnp.sum(jnp.square(m.logits(m.forward(rows).hidden))))(model)

    def sizes(grads: Vlm) -> list[float]:
        """The size of every gradient, layer by layer."""
        layers = [
            jnp.linalg.norm(leaf[n].reshape(-1))
            for stack in (grads.decoder, grads.vision)
            for run in stack.layer_runs
            for n in range(run.stop - run.start)
            for leaf in jax.tree.leaves(run.layers)
        ]
        return [*layers, jnp.linalg.norm(grads.embed.weight[...])]

    (one, ours), (other, theirs) = value_and_grads(stacked), value_and_grads(apart)
    np.testing.assert_allclose(one, other, rtol=1e-5)
    np.testing.assert_allclose(sizes(ours), sizes(theirs), rtol=1e-4, atol=1e-5)


@BOTH
def test_packed_gradients_are_the_sum_of_each_document_alone(options: ModelOptions) -> None:
    docs = documents([3, Visual(1, 4, 6), 4], [5], [Visual(1, 2, 4), 1, Visual(2, 4, 4, video=True), 3])

    def grads(documents: list[Document]) -> dict:
        return named_parameters(loss_and_gradients(a_model(options), batch([documents, []], CONFIG, **PACKED))[1])

    packed, alone = grads(docs), [grads([doc]) for doc in docs]
    for name, param in packed.items():
        total = sum(np.asarray(each[name][...]) for each in alone)
        scale = max(1.0, float(np.abs(total).max()))
        np.testing.assert_allclose(param[...] / scale, total / scale, atol=2e-5, err_msg=name)


def test_half_precision_keeps_its_types() -> None:
    model = made(CONFIG, ModelOptions(param_dtype="bfloat16", compute_dtype="bfloat16"))
    rows = batch([documents([3, Visual(1, 4, 6), 4])], CONFIG, tokens=14, patches=24)
    hidden = hidden_states(model, rows)
    assert hidden.dtype == jnp.bfloat16
    assert model.logits(hidden).dtype == jnp.float32
    wide = {path: param[...].astype(jnp.float32) for path, param in named_parameters(model).items()}
    exact = logits(with_values(a_model(), wide), rows)
    assert np.abs(model.logits(hidden) - exact)[0, :13].max() < 0.1 * np.abs(exact).max()


def test_visual_tokens_come_from_their_own_picture() -> None:
    docs = documents([1, Visual(1, 4, 4), 1, Visual(1, 2, 4), 1])
    rows = batch([docs], CONFIG, tokens=12, patches=24)
    pixels = rows.patches.pixels
    pixels = np.where(rows.patches.frame[..., None] == 2, 255 - pixels, pixels)
    second = rows._replace(patches=rows.patches._replace(pixels=pixels))
    changed = np.abs(np.asarray(embedded(a_model(), rows) - embedded(a_model(), second))[0]).max(-1) > 0
    assert changed.tolist() == (rows.info.image[0] == 2).tolist()
    assert (rows.info.kind[0] == Kind.VISUAL).sum() == 6


@pytest.mark.slow
@pytest.mark.parametrize("layout", [{"fsdp": 2, "tensor": 2, "data": 1}], ids=str)
def test_a_mesh_gives_the_same_numbers(layout: dict[str, int]) -> None:
    devices = jax.devices()[: int(np.prod(list(layout.values())))]
    mesh = make_mesh(MeshConfig(**layout), devices)
    model = a_model(RAVE)
    rows = batch(
        [[doc] for doc in documents(*[[n, Visual(1, 4, 6), 4] for n in range(1, 5)])], CONFIG, tokens=14, patches=24
    )
    with use_mesh(mesh):
        placed = jax.device_put(model, shardings(model, mesh))
        ours = jax.jit(lambda m, b: m.logits(m.forward(b).hidden))(placed, rows)
    query = named_parameters(placed)["decoder.layer_runs.0.layers.attention.query.weight"]
    assert param_axes(query) == ("layers", "heads", "head_dim", "embed")
    local = query[...].addressable_shards[0].data.size
    assert local * layout["fsdp"] * layout["tensor"] == query.size
    np.testing.assert_allclose(ours, logits(model, rows), atol=2e-5)


def test_values_go_where_they_are_sent_or_nowhere() -> None:
    model = a_model()
    changed = with_values(model, {"decoder.norm.weight": jnp.full(32, 2.0)})
    assert float(named_parameters(changed)["decoder.norm.weight"][...].sum()) == 64
    assert count(changed) == count(model)
    with pytest.raises(KeyError, match=r"no such parameters: decoder\.nrm"):
        with_values(model, {"decoder.nrm": jnp.zeros(1)})
    with pytest.raises(ValueError, match=r"decoder\.norm\.weight is \(3,\), expected \(32,\)"):
        with_values(model, {"decoder.norm.weight": jnp.zeros(3)})

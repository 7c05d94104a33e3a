"""Models of gated delta layers and gated attention: packed rows, caches, regions, and what mechanisms may name.

The tower and the pictures are of another family: no family is needed to have such a decoder.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rave_jax.attention import Gaze, MechanismConfig, Rave
from rave_jax.attention.states import StoredStates
from rave_jax.batch import Batch, TokenInfo
from rave_jax.config import ConfigError
from rave_jax.data.collate import BatchShape, collate
from rave_jax.data.layout import lay_out, region_major
from rave_jax.families.config import DeltaConfig
from rave_jax.families.qwen2_5_vl import presets
from rave_jax.inference import Engine, Sampling, SlotConfig
from rave_jax.layout import ContextTokens, FixedRegions, VisualLayout
from rave_jax.models.config import Lora, ModelOptions
from rave_jax.models.forward import Chunk, Want
from rave_jax.models.parameters import named_parameters, shardings
from rave_jax.models.vlm import Vlm
from rave_jax.parallel.mesh import MeshConfig, make_mesh
from rave_jax.parallel.sharding import use_mesh
from tests.inference.prompts import example_of, whole_forward
from tests.models.layout import Document, Visual, batch, document
from tests.models.made import model as made

PLAIN = presets.tiny(vocab_size=64, num_layers=3, vision_depth=1, full_attention_blocks=(), tie_embeddings=False)
DELTA = DeltaConfig(layers=(0, 1), key_heads=2, value_heads=4, key_dim=8, value_dim=6)
CONFIG = dataclasses.replace(
    PLAIN,
    text=dataclasses.replace(
        PLAIN.text,
        delta=DELTA,
        output_gate=True,
        norm_plus_one=True,
        qk_norm=True,
        rotary_part=4,
        mrope_section=(1, 1, 0),
    ),
)
VISION = CONFIG.vision
assert VISION is not None
REGIONS = FixedRegions(2, 2, frames=2)
CUT = 2e-4
"""What logits of size 8 may differ by where chunks of the rule are cut elsewhere: they are sums in another order."""
RAVE, GAZE = (Rave(rank=4),), (Gaze(REGIONS, 40, top_k=2), Rave(rank=4))


@functools.cache
def a_model(*mechanisms: MechanismConfig) -> Vlm:
    return made(CONFIG, ModelOptions(mechanisms))


@jax.jit
def logits(model: Vlm, batch: Batch) -> jax.Array:
    return model.logits(model.forward(batch).hidden)


def documents(*parts: list[int | Visual]) -> list[Document]:
    rng = np.random.default_rng(7)
    return [document(p, CONFIG, rng) for p in parts]


def test_layers_stand_in_runs_of_their_kind_and_all_means_those_that_attend() -> None:
    model = a_model(*RAVE)
    runs = [(run.start, run.stop, len(run.layers.mechanisms)) for run in model.decoder.layer_runs]
    assert runs == [(0, 2, 0), (2, 3, 1)]
    apart = made(CONFIG, ModelOptions(RAVE, scan_layers=False))
    assert [(run.start, run.stop) for run in apart.decoder.layer_runs] == [(0, 1), (1, 2), (2, 3)]


def test_a_mechanism_in_a_layer_without_attention_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"^Rave.layers names \[0, 1\], layers without attention.* \[2\], or 'all'"):
        made(CONFIG, ModelOptions((Rave(rank=4, layers=(0, 1, 2)),)))
    with pytest.raises(ConfigError, match=r"^context is ContextTokens.*, expected None: layers with the gated delta"):
        made(CONFIG, ModelOptions(context=ContextTokens(2)))


def test_packed_documents_do_not_see_each_other() -> None:
    """Not in a bit, where the other document's tokens and pixels change; and moved to the row's start it is the same
    document. Chunks of the rule hold several documents here."""
    model = a_model(*RAVE)
    docs = documents([3, Visual(1, 4, 6), 40], [5], [Visual(1, 2, 4), 1, Visual(2, 4, 4, video=True), 70])
    shape = {"tokens": 160, "patches": 72}
    packed = np.asarray(logits(model, batch([docs], CONFIG, **shape)))[0]
    rng = np.random.default_rng(3)
    for n, doc in enumerate(docs):
        others = [
            dataclasses.replace(d, tokens=list(rng.permutation(d.tokens)), patches=[255 - p for p in d.patches])
            for d in docs
        ]
        others[n] = doc
        start = sum(len(d.tokens) for d in docs[:n])
        here = slice(start, start + len(doc.tokens))
        found = np.asarray(logits(model, batch([others], CONFIG, **shape)))[0]
        assert np.abs(found - packed).max() > 0.1
        np.testing.assert_array_equal(found[here], packed[here])
        alone = np.asarray(logits(model, batch([[doc]], CONFIG, **shape)))[0, : len(doc.tokens)]
        np.testing.assert_allclose(alone, packed[here], atol=CUT)


prefill, extend = jax.jit(Vlm.prefill), jax.jit(Vlm.extend)


def cut(row: Batch, tokens: np.ndarray) -> tuple:
    """The columns of a batch, [B,n] indices; -1 is padding."""
    real = tokens >= 0
    at = np.maximum(tokens, 0)

    def pick(x: np.ndarray) -> np.ndarray:
        return np.where(real, np.take_along_axis(np.asarray(x), at, axis=1), 0)

    positions = np.stack([pick(p) for p in row.positions])
    return pick(row.tokens), TokenInfo(*map(pick, row.info)), positions, pick(row.visual_index)


def test_prompts_in_chunks_and_tokens_one_by_one_equal_the_whole_forward() -> None:
    """Rows end at different places in a chunk, and padding on the right does not move the state. A row that is emptied
    begins anew, whatever its state was."""
    model = a_model(*RAVE)
    whole = batch([[doc] for doc in documents([3, Visual(1, 4, 6), 12], [16])], CONFIG, tokens=21, patches=24)
    expected = np.asarray(logits(model, whole))
    features = jax.jit(Vlm.embed_images)(model, whole.patches)
    lengths = (np.asarray(whole.info.document) > 0).sum(1)

    def read(cache, done: np.ndarray, chunks: list[tuple[int, int]], row_seen: np.ndarray):
        for taken in chunks:
            width = max(max(taken), 1) if max(taken) == 1 else 8
            n = np.minimum(taken, lengths - done)
            columns = np.where(np.arange(width) < n[:, None], done[:, None] + np.arange(width), -1)
            tokens, info, positions, unit = cut(whole, columns)
            visual = (unit, features) if width > 1 else (None, None)
            out, cache = extend(model, Chunk(tokens, info, positions, visual[0]), cache, visual[1])
            found = np.asarray(model.logits(out.hidden))
            for row in np.flatnonzero(row_seen):
                np.testing.assert_allclose(
                    found[row, : n[row]], expected[row, done[row] : done[row] + n[row]], atol=CUT
                )
            done = done + n
        return cache, done

    chunks = [(8, 3), (2, 8), (0, 1), (1, 0), (1, 1)]
    cache, done = read(model.empty_cache(2, 48), np.zeros(2, int), chunks, np.array([True, True]))
    states = [run for run in cache.layer_runs if isinstance(run, StoredStates)]
    assert [jax.tree.leaves(run)[0].shape[:2] for run in states] == [(2, 2)]
    again = cache.emptied(np.array([True, False]))
    read(again, np.where([True, False], 0, done), [(8, 0), (8, 1), (1, 1)], np.array([True, True]))


def test_rows_taken_out_of_a_cache_keep_their_states() -> None:
    model = a_model(*RAVE)
    whole = batch([[doc] for doc in documents([9], [5], [7])], CONFIG, tokens=9, patches=0)
    _, cache = prefill(model, whole, model.empty_cache(3, 16))
    part = cache.take(jnp.asarray([2, 0, 5]), 12)
    swapped = part.put(part.take(jnp.asarray([0, 1, 2]), 12), None)
    back = model.empty_cache(3, 16).put(swapped, jnp.asarray([2, 0, 3]))
    for run, kept in zip(cache.layer_runs, back.layer_runs, strict=True):
        if isinstance(run, StoredStates):
            for a, b in zip(jax.tree.leaves(run), jax.tree.leaves(kept), strict=True):
                np.testing.assert_array_equal(a[:, [0, 2]], b[:, [0, 2]])
                assert float(jnp.abs(b[:, 1]).max()) == 0


@pytest.mark.slow
@pytest.mark.parametrize("mechanisms", [pytest.param(RAVE, id="rave"), pytest.param(GAZE, id="gaze")])
def test_answers_in_slots_are_those_of_whole_passes(mechanisms: tuple[MechanismConfig, ...]) -> None:
    """More prompts than slots, in several chunks, next to answers that grow: rows are used again."""
    model = a_model(*mechanisms)
    parts = ([3, Visual(1, 4, 4), 4], [2, Visual(1, 4, 6), 1, Visual(1, 2, 4), 40], [14])
    prompts = documents(*parts)
    sizes = SlotConfig(slots=2, max_length=80, chunk=40, smallest=40, patches=40, prefill_rows=2, decode_steps=3)
    engine = Engine(model, sizes, [])
    order = [engine.submit(example_of(p, CONFIG, model.options.layout), Sampling(max_new_tokens=5)) for p in prompts]
    answers: dict[int, list[int]] = {request: [] for request in order}
    while engine.waiting or engine.running:
        for progress in engine.step():
            assert progress.error is None
            answers[progress.request] += progress.tokens
    expected = whole_forward(model, prompts, [answers[request] for request in order], 64, 48)
    for request, rows in zip(order, expected, strict=True):
        assert len(rows) == 5
        assert answers[request] == rows.argmax(-1).tolist()


def test_the_order_of_regions_in_a_row_does_not_reach_the_delta_layers() -> None:
    layout = VisualLayout(REGIONS, 40)
    model = a_model(*GAZE)
    docs = [
        lay_out(example_of(doc, CONFIG), layout)
        for doc in documents([2, Visual(1, 6, 8), 5, Visual(3, 6, 6, video=True), 4], [4])
    ]
    rows = [docs, [region_major(one) for one in docs]]
    raster, major = (collate([row], BatchShape(1, 80, 160), CONFIG.patch_sizes) for row in rows)
    starts = np.cumsum([0] + [len(one.tokens) for one in docs])
    lies = np.concatenate([start + np.argsort(one.info.offset) for start, one in zip(starts, rows[1], strict=False)])
    assert np.any(lies != np.arange(len(lies)))
    np.testing.assert_allclose(
        np.asarray(logits(model, major))[:, lies], np.asarray(logits(model, raster))[:, : len(lies)], atol=CUT
    )


def test_attention_is_of_the_layers_that_attend() -> None:
    model = a_model()
    whole = batch([documents([9], [5])], CONFIG, tokens=16, patches=0)
    out = jax.jit(Vlm.forward)(model, whole, Want(queries=jnp.asarray([[3, 12]]), inputs=True))
    assert out.attention is not None and out.attention.shape == (1, 1, 2, CONFIG.text.num_heads, 16)
    np.testing.assert_allclose(out.attention.sum(-1), 1, atol=1e-5)
    assert out.inputs is not None and out.inputs.shape == (3, 1, 16, CONFIG.text.hidden_size)


@pytest.mark.slow
def test_a_mesh_and_remat_give_the_same_numbers_and_gradients() -> None:
    lora = Lora(rank=2, targets=("decoder.delta.qkv", "decoder.delta.output", "decoder.attention.query"))
    rows = batch([[doc] for doc in documents([9], [5, Visual(1, 4, 4), 2], [7], [11])], CONFIG, tokens=12, patches=16)

    def gradients(model: Vlm, rows: Batch) -> Vlm:
        real = (rows.info.document > 0)[..., None]
        return jax.grad(lambda m: jnp.sum(jnp.square(m.logits(m.forward(rows).hidden)), where=real))(model)

    model = made(CONFIG, ModelOptions(RAVE, lora=lora))
    expected = named_parameters(jax.jit(gradients)(model, rows))
    assert [path for path, g in expected.items() if not float(jnp.abs(g[...]).max()) > 0] == []
    mesh = make_mesh(MeshConfig(fsdp=2, tensor=2, data=2), jax.devices())
    remat = made(CONFIG, ModelOptions(RAVE, lora=lora, remat="full"))
    with use_mesh(mesh):
        found = named_parameters(jax.jit(gradients)(jax.device_put(remat, shardings(remat, mesh)), rows))
    for path, gradient in expected.items():
        scale = float(jnp.abs(gradient[...]).max())
        # The norm of each head divides by what may be small, and enlarges rounding: 5.4e-5 was seen.
        np.testing.assert_allclose(found[path][...] / scale, gradient[...] / scale, atol=1e-4, err_msg=path)


def test_number_types() -> None:
    """What fades a memory over thousands of tokens is float32 whatever the rest is."""
    options = ModelOptions(param_dtype="bfloat16", compute_dtype="bfloat16")
    model = jax.eval_shape(lambda: Vlm(CONFIG, options, key=jax.random.key(0)))
    wide = {path.split("layers.")[1] for path, p in named_parameters(model).items() if p.dtype == jnp.float32}
    assert wide == {"delta.decay_log", "delta.decay_bias", "delta.norm.weight"}
    cache = jax.eval_shape(lambda: model.empty_cache(2, 8, "int8"))
    kinds = [{str(x.dtype) for x in jax.tree.leaves(run)} for run in cache.layer_runs]
    assert kinds == [{"bfloat16", "float32"}, {"int8", "float32"}]


def test_layers_of_a_config_are_checked() -> None:
    for layers in ((0, 3), (), (1, 0), (1, 1), (0, 1, 2)):
        with pytest.raises(ConfigError, match="layers"):
            dataclasses.replace(PLAIN.text, delta=dataclasses.replace(DELTA, layers=layers))
    with pytest.raises(ConfigError, match="value_heads is 3, expected a multiple of key_heads 2"):
        dataclasses.replace(DELTA, value_heads=3)
    with pytest.raises(ConfigError, match="rotary_part is 3"):
        dataclasses.replace(PLAIN.text, rotary_part=3)

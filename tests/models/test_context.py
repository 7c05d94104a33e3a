"""Context tokens through a whole model: their table, its gradient, who they listen to, packing, checkpoints' names."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from rave_jax.attention import Rave
from rave_jax.batch import Batch, Kind
from rave_jax.checkpoint.naming import extra_parameters
from rave_jax.config import ConfigError
from rave_jax.families.config import TextConfig, VlmConfig
from rave_jax.families.qwen2_5_vl import presets
from rave_jax.layout import ContextTokens
from rave_jax.models.config import ModelOptions
from rave_jax.models.forward import Want
from rave_jax.models.parameters import named_parameters, param_axes, with_values
from rave_jax.models.vlm import Vlm
from rave_jax.parallel.mesh import MeshConfig, make_mesh
from rave_jax.parallel.sharding import partition_spec
from tests.models.layout import Document, Visual, batch, document
from tests.models.made import model as made

CONFIG = presets.tiny(vocab_size=64, num_layers=2, vision_depth=1, full_attention_blocks=(0,))
CONTEXT = ContextTokens(3)
OPTIONS = ModelOptions(mechanisms=(Rave(rank=4),), context=CONTEXT)
SHAPE = {"tokens": 64, "patches": 96}


@functools.cache
def a_model(context: ContextTokens = CONTEXT) -> Vlm:
    return made(CONFIG, ModelOptions(OPTIONS.mechanisms, context))


def without_context(vlm: Vlm) -> Vlm:
    """The model with the same weights that has no context tokens."""
    plain = jax.eval_shape(lambda: Vlm(CONFIG, ModelOptions(OPTIONS.mechanisms), key=jax.random.key(0)))
    values = named_parameters(vlm)
    return with_values(plain, {path: values[path][...] for path in named_parameters(plain)})


def documents(context: ContextTokens | None = CONTEXT) -> list[Document]:
    rng = np.random.default_rng(1)
    some: list[list[int | Visual]] = [
        [3, Visual(1, 4, 6), 4],
        [5],
        [Visual(1, 2, 4), 1, Visual(2, 4, 4, video=True), 3],
    ]
    return [document(parts, CONFIG, rng, context) for parts in some]


@jax.jit
def logits(model: Vlm, rows: Batch) -> jax.Array:
    return model.logits(model.forward(rows).hidden)


embedded = jax.jit(lambda model, batch: model.embedded(batch).x)


def test_the_table_stands_where_context_tokens_are() -> None:
    vlm, rows = a_model(), batch([documents()], CONFIG, **SHAPE)
    assert vlm.context is not None
    x, table = np.asarray(embedded(vlm, rows))[0], np.asarray(vlm.context.weight[...])
    kind, number = np.asarray(rows.info.kind)[0], np.asarray(rows.info.row)[0]
    here = kind == Kind.CONTEXT
    assert here.sum() == 4 * CONTEXT.count
    np.testing.assert_array_equal(x[here], table[number[here]])
    plain = without_context(vlm)
    np.testing.assert_array_equal(x[~here], np.asarray(embedded(plain, rows))[0][~here])


def test_without_context_tokens_there_is_no_table_and_no_mask() -> None:
    vlm = without_context(a_model())
    assert vlm.context is None and "context.weight" not in named_parameters(vlm)
    rows = batch([documents(None)], CONFIG, **SHAPE)
    np.testing.assert_allclose(logits(vlm, rows), logits(a_model(), rows), atol=1e-5)


@pytest.mark.slow
def test_a_model_starts_with_the_weights_it_has_without() -> None:
    ours, plain = (
        named_parameters(jax.jit(lambda key, o=options: Vlm(CONFIG, o, key=key))(jax.random.key(0)))
        for options in (ModelOptions(context=ContextTokens(64)), ModelOptions())
    )
    assert ours.keys() - plain.keys() == {"context.weight"}
    for path, param in plain.items():
        np.testing.assert_array_equal(param[...], ours[path][...])
    table = np.asarray(ours["context.weight"][...])
    assert table.shape == (64, CONFIG.text.hidden_size)
    assert abs(table.std() - 0.02) < 2e-3 and abs(table.mean()) < 2e-3


def test_the_table_learns_and_nobody_predicts_its_tokens() -> None:
    rows = batch([documents()], CONFIG, **SHAPE)

    @jax.jit
    @jax.grad
    def gradients(model: Vlm, rows: Batch) -> jax.Array:
        scores = jax.nn.log_softmax(model.logits(model.forward(rows).hidden))
        picked = jnp.take_along_axis(scores, rows.targets[..., None], axis=-1)[..., 0]
        return -jnp.sum(picked * rows.loss_weights)

    # Only the last token is learned, far behind the pictures: it reads them through the context tokens too.
    weights = np.zeros_like(rows.loss_weights)
    last = int(np.asarray(rows.info.document)[0].nonzero()[0][-1]) - 1
    weights[0, last] = 1
    found = named_parameters(gradients(a_model(), rows._replace(loss_weights=weights)))["context.weight"][...]
    assert found.shape == (CONTEXT.count, CONFIG.text.hidden_size)
    assert np.all(np.isfinite(found)) and np.all(np.abs(found).max(1) > 0)
    text = batch([documents()[1:2]], CONFIG, **SHAPE)
    assert not np.any(named_parameters(gradients(a_model(), text))["context.weight"][...])


@pytest.mark.parametrize(
    "context",
    [
        pytest.param(CONTEXT, id="own", marks=pytest.mark.slow),
        pytest.param(ContextTokens(2, "image", "own+first"), id="own+first"),
    ],
)
def test_packed_documents_equal_each_alone(context: ContextTokens) -> None:
    vlm, docs = a_model(context), documents(context)
    packed = logits(vlm, batch([docs, docs[::-1]], CONFIG, **SHAPE))
    for row, order in enumerate((docs, docs[::-1])):
        start = 0
        for doc in order:
            n = len(doc.tokens)
            alone = logits(vlm, batch([[doc], []], CONFIG, **SHAPE))
            np.testing.assert_allclose(packed[row, start : start + n], alone[0, :n], atol=2e-5)
            start += n


@pytest.mark.parametrize("sees", [pytest.param("own", marks=pytest.mark.slow), "own+first"])
def test_context_tokens_listen_to_no_text_but_the_first(sees) -> None:
    """The rows of the attention map in every layer and head."""
    context = ContextTokens(3, sees=sees)
    vlm, docs = a_model(context), documents(context)[:1]
    rows = batch([docs], CONFIG, **SHAPE)
    at = np.flatnonzero(np.asarray(rows.info.kind)[0] == Kind.CONTEXT)
    seen = jax.jit(lambda m, b: m.forward(b, Want(queries=jnp.asarray(at)[None])).attention)(vlm, rows)
    kind = np.asarray(rows.info.kind)[0]
    wanted = (kind == Kind.VISUAL) | (kind == Kind.CONTEXT)
    wanted[0] = sees == "own+first"
    for n, own in enumerate(at):
        np.testing.assert_array_equal(np.asarray(seen)[:, 0, n].max((0, 1)) > 0, wanted & (np.arange(len(kind)) <= own))


def test_the_table_is_in_the_side_car_and_on_the_mesh() -> None:
    vlm = a_model()
    assert "context.weight" in extra_parameters(vlm)
    mesh = make_mesh(MeshConfig(fsdp=4, tensor=2))
    table = named_parameters(vlm)["context.weight"]
    assert partition_spec(param_axes(table), table.shape, mesh) == PartitionSpec(None, "fsdp")


def test_a_text_model_has_nothing_to_put_them_behind() -> None:
    with pytest.raises(ConfigError, match="context"):
        jax.eval_shape(
            lambda: Vlm(VlmConfig(TextConfig(), family="qwen3"), ModelOptions(context=CONTEXT), key=jax.random.key(0))
        )

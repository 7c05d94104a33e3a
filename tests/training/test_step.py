"""The step: accumulation, groups, phases, meshes, and what happens to a loss that is not a number."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rave_jax.config import ConfigError
from rave_jax.layout import ContextTokens
from rave_jax.models.config import Lora, ModelOptions
from rave_jax.parallel.mesh import MeshConfig, make_mesh
from rave_jax.parallel.rows import global_batch
from rave_jax.parallel.sharding import use_mesh
from rave_jax.training.objective import chunked_cross_entropy
from rave_jax.training.optimizers import OptimizerConfig, ParameterGroup
from rave_jax.training.session import group_rows
from tests.training.small import CONFIG, OPTIONS, TEXT, first_state, random_batch, rows_of, run_steps, session_of

TOWER = ParameterGroup("tower", r"^vision\.", frozen=True)
GATE = ParameterGroup("gate", "mechanisms", freeze_after=2)
PLAIN = OptimizerConfig(learning_rate=1e-2, decay="none", clip_norm=None)
CLIPPED = OptimizerConfig(learning_rate=1e-2, decay="none", weight_decay=0.1, clip_norm=0.5)


def host(tree):
    return jax.tree.map(np.asarray, tree)


@pytest.fixture(scope="module")
def plain():
    return session_of(PLAIN)


@pytest.fixture(scope="module")
def one_device(plain):
    return run_steps(plain, first_state(plain), range(3))[1]


@pytest.fixture(scope="module")
def clipped():
    return session_of(CLIPPED)


@pytest.fixture(scope="module")
def in_parts():
    """The tower frozen, and the gate after two steps."""
    return session_of(OptimizerConfig(learning_rate=1e-2, weight_decay=0.1, groups=(TOWER, GATE)))


@pytest.mark.slow
def test_accumulation_equals_the_whole_batch(clipped):
    """Micro-batches have different numbers of target tokens, so a mean of means would differ."""
    results = []
    for session in (clipped, session_of(dataclasses.replace(CLIPPED, accumulation=4))):
        state, metrics = run_steps(session, first_state(session), range(2))
        results.append((host(state.trained), metrics))
    (one, one_metrics), (four, four_metrics) = results
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), one_metrics, four_metrics)
    for name in one:
        # Adam divides by the root of a squared gradient, which magnifies rounding where a gradient is about zero.
        np.testing.assert_allclose(one[name], four[name], atol=2e-4, err_msg=name)


def test_equals_the_step_written_out_by_hand(clipped):
    """Dense loss, plain optax AdamW on the whole model: no groups, no chunks, no shardings."""
    session = clipped
    state = first_state(session)
    params = host(state.trained)
    batch = random_batch(0, 8)

    def loss(params):
        model = session.graph.merge(params)
        logits = model.logits(model.forward(jax.tree.map(jnp.asarray, batch)).hidden)
        chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), batch.targets[..., None], -1)[..., 0]
        return -(chosen * batch.loss_weights).sum() / batch.loss_weights.sum()

    matrices = {name: sum(axis != "layers" for axis in session.graph.axes[name]) >= 2 for name in params}
    optimizer = optax.chain(optax.clip_by_global_norm(0.5), optax.adamw(1e-2, weight_decay=0.1, mask=matrices))

    @jax.jit
    def by_hand(params):
        value, grads = jax.value_and_grad(loss)(params)
        updates, _ = optimizer.update(grads, optimizer.init(params), params)
        return value, optax.tree.norm(grads), optax.apply_updates(params, updates)

    value, norm, wanted = by_hand(params)
    state, (metrics,) = run_steps(session, state, range(1))
    np.testing.assert_allclose(metrics.loss, value, rtol=1e-5)
    np.testing.assert_allclose(metrics.grad_norm, norm, rtol=1e-4)
    for name in wanted:
        close = np.isclose(np.asarray(state.trained[name]), np.asarray(wanted[name]), atol=1e-4)
        assert close.mean() > 0.99, name  # the rest: gradients at the edge of rounding, see above


def test_frozen_parameters_stay_and_cost_nothing(in_parts):
    session = in_parts
    state = first_state(session)
    before = host(state.frozen)
    trained = host(state.trained)
    assert before
    assert all(name.startswith("vision.") for name in before)
    # Adam keeps two numbers for each trained one, and nothing for the others.
    sizes = [leaf.size for leaf in jax.tree.leaves(state.optimizer) if leaf.ndim]
    assert sum(sizes) == 2 * sum(x.size for x in state.trained.values())
    state, _ = run_steps(session, state, range(3))
    for name, value in before.items():
        np.testing.assert_array_equal(state.frozen[name], value, err_msg=name)
    assert all((np.asarray(state.trained[name]) != value).any() for name, value in trained.items())


@pytest.mark.slow
def test_frozen_parameters_get_no_gradient():
    """The compiled step is cheaper by the tower's backward pass."""
    flops = {}
    for name, groups in (("all", ()), ("no tower", (TOWER,))):
        session = session_of(OptimizerConfig(groups=groups))
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), random_batch(0, 8))
        with use_mesh(session.mesh):
            flops[name] = session.step.lower(session.state, shapes).cost_analysis()["flops"]
    assert flops["no tower"] < 0.8 * flops["all"]


def test_groups_have_their_own_rates():
    groups = (
        ParameterGroup("slow", r"^embed", learning_rate=0.1),
        ParameterGroup("fast", r"\.mlp\.", learning_rate=3.0),
    )
    config = OptimizerConfig(learning_rate=1e-3, decay="none", clip_norm=None, groups=groups)
    session = session_of(config, config=TEXT)
    state = first_state(session, TEXT)
    before = host(state.trained)
    after, _ = run_steps(session, state, range(1), patches=0)
    moved = {name: np.abs(np.asarray(after.trained[name]) - before[name]).max() for name in before}
    # The first step of Adam moves every number with a gradient by the learning rate.
    for name, distance in moved.items():
        if name.endswith("query_proj"):
            assert distance == 0  # its gradient starts when key_proj has left zero
            continue
        multiplier = 0.1 if name.startswith("embed") else 3.0 if ".mlp." in name else 1.0
        np.testing.assert_allclose(distance, 1e-3 * multiplier, rtol=1e-2, err_msg=name)


def test_a_phase_ends_without_a_new_program(in_parts):
    session = in_parts
    state, _ = run_steps(session, first_state(session), range(2))
    gates = {name: np.asarray(x) for name, x in state.trained.items() if "mechanisms" in name}
    others = host({name: x for name, x in state.trained.items() if name not in gates})
    assert any(value.any() for name, value in gates.items() if name.endswith("key_proj"))
    state, _ = run_steps(session, state, range(2, 4))
    for name, value in gates.items():
        np.testing.assert_array_equal(state.trained[name], value, err_msg=name)
    assert all((np.asarray(state.trained[name]) != value).any() for name, value in others.items())
    assert session.step._cache_size() == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    "mesh",
    [
        pytest.param(MeshConfig(data=8, fsdp=1), id="data"),
        pytest.param(MeshConfig(fsdp=8), id="fsdp"),
        pytest.param(MeshConfig(fsdp=2, tensor=4), id="tensor"),
        pytest.param(MeshConfig(fsdp=2, context=2, tensor=2), id="context"),
    ],
)
def test_meshes_give_the_losses_of_one_device(mesh, one_device):
    # Tokens of the residual stream over `tensor` in one of the two that have it.
    options = dataclasses.replace(OPTIONS, sequence_parallel=mesh.context > 1)
    session = session_of(PLAIN, make_mesh(mesh), options=options)
    state = first_state(session)
    split = [x for x in state.trained.values() if not x.sharding.is_fully_replicated]
    assert bool(split) == (mesh.data != 8)
    _, metrics = run_steps(session, state, range(3))
    for ours, theirs in zip(metrics, one_device, strict=True):
        np.testing.assert_allclose(ours.loss, theirs.loss, rtol=1e-6)
        assert ours.tokens == theirs.tokens
        assert ours.target_tokens == theirs.target_tokens


def test_a_bad_step_changes_nothing_and_stops_those_after_it(clipped):
    session = clipped
    state, _ = run_steps(session, first_state(session), range(1))
    before = host(state)
    with use_mesh(session.mesh):
        bad = random_batch(1, 8)
        bad.loss_weights[0, -2] = np.nan
        state, metrics = session.step(state, global_batch(lambda s: rows_of(bad, s.start, s.stop), session.mesh, 8))
        assert metrics.bad_step == 1
        assert np.isnan(metrics.loss)
    state, (metrics,) = run_steps(session, state, range(2, 3))
    assert metrics.bad_step == 1
    assert state.step == 1
    jax.tree.map(np.testing.assert_array_equal, host(state._replace(bad_step=jnp.int32(-1))), before)


def test_a_batch_without_targets_is_no_error(clipped):
    session = clipped
    state = first_state(session)
    with use_mesh(session.mesh):
        empty = random_batch(0, 8)
        empty.loss_weights[:] = 0
        _, metrics = session.step(state, global_batch(lambda s: rows_of(empty, s.start, s.stop), session.mesh, 8))
    assert metrics.loss == 0
    assert metrics.bad_step == -1


def test_rows_that_do_not_divide_are_refused():
    with pytest.raises(ConfigError, match=r"data rows is 12, expected a multiple of 16.*\(8\).*\(2\)"):
        session_of(OptimizerConfig(accumulation=2), make_mesh(MeshConfig()), rows=12)


def test_a_run_that_trains_nothing_is_refused():
    with pytest.raises(ConfigError, match="leave something to train"):
        session_of(OptimizerConfig(groups=(ParameterGroup("all", "", frozen=True),)))


def test_table_says_what_trains():
    gate = ParameterGroup("gate", "mechanisms", learning_rate=3.0, freeze_after=2)
    config = OptimizerConfig(learning_rate=1e-3, groups=(TOWER, gate))
    rows = {row.group: row for row in group_rows(session_of(config), config)}
    assert rows["tower"].state == "frozen"
    assert rows["tower"].optimizer_bytes == 0
    assert rows["gate"].state == "trained until step 2"
    assert rows["gate"].learning_rate == pytest.approx(3e-3)
    assert rows["gate"].optimizer_bytes == 2 * rows["gate"].bytes
    total = sum(x.size for x in jax.tree.leaves(session_of(config).graph.shapes))
    assert sum(row.parameters for row in rows.values()) == total


def test_context_tokens_are_in_the_table():
    config = OptimizerConfig(groups=(ParameterGroup("context", r"^context\.", learning_rate=2.0),))
    session = session_of(config, options=ModelOptions(context=ContextTokens(3)))
    rows = {row.group: row for row in group_rows(session, config)}
    assert rows["context"].parameters == 3 * CONFIG.text.hidden_size and rows["context"].state == "trained"


def test_the_head_takes_part_in_the_loss():
    """Tied: the embedding's gradient has a part for every word, not only for those in the batch."""
    session = session_of(PLAIN, config=TEXT)
    state = first_state(session, TEXT)
    batch = jax.tree.map(jnp.asarray, random_batch(0, 8, patches=0))

    def loss(trained):
        model = session.graph.merge(trained)
        return chunked_cross_entropy(
            model.forward(batch).hidden, model.head_weight(), batch.targets, batch.loss_weights, 10
        ).loss

    rest, embed = dict(state.trained), state.trained["embed.weight"]
    grads = jax.jit(jax.grad(lambda embed: loss(rest | {"embed.weight": embed})))(embed)
    assert (np.abs(grads).max(axis=1) > 0).all()
    assert TEXT.text.tie_embeddings
    assert OPTIONS.mechanisms


@pytest.mark.slow
def test_half_precision_trains_adapters_beside_whole_numbers():
    """Weights and activations in bfloat16, only the adapters trained; their moments stay float32 as asked."""
    options = ModelOptions(param_dtype="bfloat16", compute_dtype="bfloat16", lora=Lora(rank=2))
    groups = (
        ParameterGroup("adapter", r"\.adapter\.", learning_rate=2.0),
        ParameterGroup("backbone", "", frozen=True),
    )
    session = session_of(OptimizerConfig(learning_rate=1e-2, decay="none", groups=groups), options=options)
    state = first_state(session, options=options)
    assert all(".adapter." in name for name in state.trained)
    assert len(state.trained) == 4, "down and up, of query and of key"
    before = host((state.trained, state.frozen))
    state, metrics = run_steps(session, state, range(3))
    assert all(np.isfinite(each.loss) for each in metrics)
    for name, value in before[1].items():
        np.testing.assert_array_equal(state.frozen[name], value, err_msg=name)
    for name, value in state.trained.items():
        assert value.dtype == jnp.bfloat16
        assert (np.asarray(value) != before[0][name]).any(), name
    assert {leaf.dtype for leaf in jax.tree.leaves(state.optimizer) if leaf.ndim > 1} == {jnp.dtype("float32")}
    whole = ModelOptions(lora=Lora(rank=2))
    wide = session_of(OptimizerConfig(learning_rate=1e-2, decay="none", groups=groups), options=whole)
    exact = run_steps(wide, first_state(wide, options=whole), range(3))[1]
    np.testing.assert_allclose([m.loss for m in metrics], [m.loss for m in exact], rtol=0.02)

"""Algorithms of the optimizer: what each does to a tiny model, what it keeps, and where."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rave_jax import config as configs
from rave_jax.config import ConfigError
from rave_jax.parallel.mesh import MeshConfig, make_mesh
from rave_jax.parallel.sharding import Axes
from rave_jax.training.algorithms import Adafactor, AdamW, Algorithm, Muon, is_matrix, matrix_sides
from rave_jax.training.optimizers import OptimizerConfig, ParameterGroup, assign_groups, make_optimizer
from rave_jax.training.rounding import Quantised
from rave_jax.training.state import parameter_of
from tests.training.small import session_of

AXES: dict[str, Axes] = {
    "decoder.layer_runs.0.layers.mlp.up.weight": ("layers", "mlp", "embed"),
    "decoder.layer_runs.0.layers.mlp_norm.weight": ("layers", None),
    "embed.weight": ("vocab", "embed"),
}
UP, NORM, EMBED = AXES
SHAPES = {UP: (2, 256, 64), NORM: (2, 64), EMBED: (128, 64)}
IN_8_BITS = AdamW(first_moment="8-bit", second_moment="8-bit")


def optimizer_of(algorithm: Algorithm, **fields: Any) -> optax.GradientTransformation:
    config = OptimizerConfig(
        **{"learning_rate": 0.02, "decay": "none", "clip_norm": None, **fields}, algorithm=algorithm
    )
    return make_optimizer(config, 400, assign_groups(SHAPES, config), AXES)


def drawn(seed: int) -> dict[str, jax.Array]:
    rng = np.random.default_rng(seed)
    return {name: jnp.asarray(0.3 * rng.standard_normal(shape), jnp.float32) for name, shape in SHAPES.items()}


def loss(params: dict[str, jax.Array], tokens: jax.Array, wanted: jax.Array) -> jax.Array:
    """Two layers of a wide mlp without a way back, on embedded tokens."""
    x = params[EMBED][tokens]
    for n in range(2):
        x = x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6) * (1 + params[NORM][n])
        hidden = jax.nn.silu(x @ params[UP][n].T)
        x = x + hidden.reshape(*hidden.shape[:-1], 4, 64).mean(-2)
    logits = x @ params[EMBED].T
    return optax.losses.softmax_cross_entropy_with_integer_labels(logits, wanted).mean()


def trained(algorithm: Algorithm, steps: int = 200) -> tuple[float, float]:
    """Loss before and after, learning which token follows which."""
    optimizer = optimizer_of(algorithm, learning_rate=3e-3)
    tokens = jnp.arange(128)
    wanted = jax.random.permutation(jax.random.key(1), 128)

    @jax.jit
    def run(params: Any) -> tuple[jax.Array, jax.Array]:
        def body(_: Any, carry: Any) -> Any:
            params, state = carry
            updates, state = optimizer.update(jax.grad(loss)(params, tokens, wanted), state, params)
            return optax.apply_updates(params, updates), state

        end, _ = jax.lax.fori_loop(0, steps, body, (params, optimizer.init(params)))
        return loss(params, tokens, wanted), loss(end, tokens, wanted)

    before, after = run(drawn(0))
    return float(before), float(after)


@pytest.fixture(scope="module")
def by_adam() -> tuple[float, float]:
    return trained(AdamW())


@pytest.mark.parametrize(
    "algorithm",
    [
        pytest.param(IN_8_BITS, id="8-bit"),
        pytest.param(AdamW(first_moment="bfloat16", second_moment="bfloat16"), id="bfloat16", marks=pytest.mark.slow),
        pytest.param(Adafactor(smallest=32), id="Adafactor", marks=pytest.mark.slow),
        pytest.param(Muon(), id="Muon", marks=pytest.mark.slow),
    ],
)
def test_learns_as_adamw_in_float32_does(algorithm: Algorithm, by_adam: tuple[float, float]) -> None:
    before, after = trained(algorithm)
    start, wanted = by_adam
    assert before == start and wanted < start / 20
    assert after < 1.25 * wanted + 0.02


def state_of(optimizer: optax.GradientTransformation, params: Any) -> dict[str, list[Any]]:
    """Shapes that are kept for each parameter."""
    found: dict[str, list[Any]] = {name: [] for name in SHAPES}
    shapes = jax.eval_shape(optimizer.init, params)
    for path, leaf in jax.tree_util.tree_flatten_with_path(shapes)[0]:
        if name := parameter_of(path, SHAPES):
            found[name].append((leaf.shape, str(leaf.dtype)))
    return found


def test_what_is_kept_of_a_parameter() -> None:
    kept = {
        type(one).__name__: state_of(optimizer_of(one), drawn(0)) for one in (AdamW(), Adafactor(smallest=32), Muon())
    }
    kept["8-bit"] = state_of(optimizer_of(IN_8_BITS), drawn(0))
    assert kept["AdamW"][UP] == [((2, 256, 64), "float32")] * 2
    assert kept["8-bit"][UP] == [
        ((2, 256, 64), "int8"),
        ((2, 8, 64), "float32"),
        ((2, 256, 64), "uint8"),
        ((2, 8, 64), "float32"),
    ]
    assert kept["8-bit"][NORM] == [((2, 64), "float32")] * 2, "few numbers"
    assert kept["Adafactor"][UP] == [((2, 64), "float32"), ((2, 256), "float32"), ((1,), "float32")]
    assert kept["Muon"][UP] == [((2, 256, 64), "float32")] and kept["Muon"][EMBED] == [((128, 64), "float32")] * 2


def test_muon_moves_matrices_orthogonally_and_the_rest_as_adamw_does() -> None:
    gradients, params = drawn(1), drawn(0)
    ours, adam = (optimizer_of(one) for one in (Muon(), AdamW()))
    updates, of_adam = (jax.jit(one.update)(gradients, one.init(params), params)[0] for one in (ours, adam))
    for name in (NORM, EMBED):
        np.testing.assert_array_equal(updates[name], of_adam[name])
    sizes = np.linalg.svd(np.asarray(updates[UP]) / 0.02, compute_uv=False)
    # The iteration leaves singular values between 0.7 and 1.2; [256, 64] times 0.2 sqrt(256) has a size of 0.2.
    assert sizes.shape == (2, 64) and sizes.min() > 0.5 * 3.2 and sizes.max() < 1.3 * 3.2
    np.testing.assert_allclose(np.sqrt(np.mean(np.square(updates[UP]))) / 0.02, 0.2, rtol=0.2)


@pytest.mark.parametrize(
    ("axes", "inputs", "outputs"),
    [
        (("layers", "heads", "head_dim", "embed"), (3,), (1, 2)),
        (("layers", "embed", "heads", "head_dim"), (2, 3), (1,)),
        (("layers", None, "heads", "head_dim", "embed"), (4,), (2, 3)),
        (("layers", "heads", None, "head_dim", "embed"), (4,), (1, 2, 3)),
        (("layers", "experts", None, "embed"), (3,), (2,)),
        (("layers", "experts", "embed", None), (3,), (2,)),
        (("layers", "rank", "heads", "head_dim"), (2, 3), (1,)),
        (("layers", "heads", "head_dim", "rank"), (3,), (1, 2)),
        (("mlp", "embed"), (1,), (0,)),
    ],
)
def test_the_sides_of_a_matrix(axes: Axes, inputs: tuple[int, ...], outputs: tuple[int, ...]) -> None:
    assert matrix_sides(axes) == (inputs, outputs)


@pytest.mark.parametrize("axes", [("layers", None), ("layers", "channels", None), ("vocab",)])
def test_no_matrix(axes: Axes) -> None:
    assert not is_matrix(axes)


def test_adafactor_clips_each_layer_by_itself() -> None:
    gradients = drawn(1)
    gradients[UP] = gradients[UP].at[0, 0, 0].set(1e6)
    optimizer = optimizer_of(Adafactor(smallest=32), learning_rate=1.0)
    update = np.asarray(jax.jit(optimizer.update)(gradients, optimizer.init(drawn(0)), drawn(0))[0][UP])
    sizes = np.sqrt(np.mean(np.square(update), axis=(1, 2)))
    assert (sizes <= 1 + 1e-5).all() and sizes[1] > 0.9


@pytest.mark.parametrize("algorithm", [IN_8_BITS, Adafactor(smallest=16), Muon(rest=IN_8_BITS)], ids=repr)
def test_state_lies_with_its_parameter_on_a_mesh(algorithm: Algorithm) -> None:
    """Each device has its share of every large array of the state."""
    groups = (ParameterGroup("tower", r"^vision\.", learning_rate=0.1),)
    mesh = make_mesh(MeshConfig(data=1, fsdp=4, tensor=2))
    session = session_of(OptimizerConfig(algorithm=algorithm, groups=groups), mesh)
    whole = []
    for path, leaf in jax.tree_util.tree_flatten_with_path(session.state.optimizer)[0]:
        name = parameter_of(path, session.state.trained)
        if name is None or leaf.size < 512:
            continue
        param = session.state.trained[name]
        if leaf.shape == param.shape:
            assert leaf.sharding == param.sharding
        elif leaf.sharding.is_fully_replicated and not param.sharding.is_fully_replicated:
            whole.append((name, leaf.shape))
    assert not whole


def test_old_configs_have_the_fields_of_adamw_beside_the_others() -> None:
    new = OptimizerConfig(learning_rate=0.5, algorithm=AdamW(beta2=0.95, first_moment="bfloat16"))
    data = configs.to_json(new)
    old = {**data, **data.pop("algorithm")} | {"type": "OptimizerConfig"}
    del old["algorithm"], old["second_moment"]
    assert configs.from_json(OptimizerConfig, old) == new
    assert configs.from_json(OptimizerConfig, configs.to_json(new)) == new
    with pytest.raises(ConfigError, match=r"config\.algorithm\.beta2 is 'x', expected a number"):
        configs.from_json(OptimizerConfig, old | {"beta2": "x"})


def test_adamw_keeps_what_checkpoints_before_other_algorithms_hold() -> None:
    state = optimizer_of(AdamW(), clip_norm=1.0, groups=(ParameterGroup("up", "mlp.up"),)).init(drawn(0))
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_flatten_with_path(state)[0]]
    assert [path for path in paths if "'up'" in path] == [
        "[1].inner_states['up'].inner_state[0].count",
        f"[1].inner_states['up'].inner_state[0].mu['{UP}']",
        f"[1].inner_states['up'].inner_state[0].nu['{UP}']",
        "[1].inner_states['up'].inner_state[2].count",
    ]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: AdamW(first_moment="int8"), "first_moment is 'int8', expected one of 'float32', 'bfloat16', '8-bit'"),
        (lambda: Muon(pattern="("), "pattern is '\\(', expected a regular expression"),
        (lambda: Adafactor(clip=0.0), "clip is 0.0, expected above 0, or null"),
    ],
)
def test_refusals(make: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()


def test_eight_bits_take_a_quarter_of_the_memory() -> None:
    params = drawn(0)
    sizes = [
        sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(jax.eval_shape(optimizer_of(one).init, params)))
        for one in (AdamW(), IN_8_BITS)
    ]
    assert sizes[1] < 0.4 * sizes[0]
    packed = jax.eval_shape(optimizer_of(IN_8_BITS).init, params)
    assert any(isinstance(x, Quantised) for x in jax.tree.leaves(packed, is_leaf=lambda x: isinstance(x, Quantised)))


def test_one_rate_for_both_in_a_group() -> None:
    """A group's learning rate holds for what Muon moves and for what AdamW moves in it."""
    groups = (ParameterGroup("fast", "", learning_rate=3.0),)
    params, gradients = drawn(0), drawn(1)
    slow, fast = (optimizer_of(Muon(), groups=one) for one in ((), groups))
    one, three = (jax.jit(o.update)(gradients, o.init(params), params)[0] for o in (slow, fast))
    for name in SHAPES:
        np.testing.assert_allclose(three[name], 3 * one[name], rtol=1e-5)

"""Mixture of experts: a router chooses some of many mlps for each token (arXiv 2101.03961, 2401.06066).

Every choice is computed: tokens are sorted by expert, and each expert multiplies the rows that it was given
(`kernels.grouped`). On a mesh the experts are split over the `experts` axis of the sharding rules. A device computes
what its own experts add to its tokens, and the parts are summed, as those of an mlp that is split over the mesh axis
`tensor`. Devices along the mesh axis `expert` have different rows: they gather each other's tokens before, and the sum
leaves each device those of its own rows.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec

from rave_jax.families.config import ExpertsConfig
from rave_jax.kernels.grouped import grouped_product
from rave_jax.kernels.saved import GROUPED
from rave_jax.models.initial import normal
from rave_jax.models.layers import Adapter, Axes, keep_inputs, product
from rave_jax.parallel import residual
from rave_jax.parallel.exchange import gathered
from rave_jax.parallel.residual import WHOLE, Stream
from rave_jax.parallel.sharding import current_mesh, names_of, partition_spec, shard
from rave_jax.typing import Array, Bool, Float, Int


class Choice(NamedTuple):
    """What the router makes of each token, N experts of E.

    Fields:
        expert: numbers of the chosen experts, the best first.
        weight: what each of them counts.
        probability: of every expert.
    """

    expert: Int[Array, "B T N"]
    weight: Float[Array, "B T N"]
    probability: Float[Array, "B T E"]


class RouterSums(NamedTuple):
    """What the loss of routers is made of: sums over tokens, which layers add up.

    Fields:
        chosen: how often each expert was chosen.
        probability: of each expert.
    """

    chosen: Float[Array, "E"]
    probability: Float[Array, "E"]


class ExpertMatrix(NamedTuple):
    """A matrix [out, in] for each of E experts, as they are multiplied: weight + up down.

    Fields:
        weight: without an adapter.
        down, up: low-rank factors of what an adapter adds to each, the scale in `up`; None without one.
    """

    weight: Float[Array, "E O I"]
    down: Float[Array, "E r I"] | None = None
    up: Float[Array, "E O r"] | None = None


class ExpertAdapter(nnx.Module):
    """A low-rank update of the matrix of each expert: down [E,r,in], up [E,out,r], up zero at the start."""

    def __init__(
        self, shape: tuple[int, ...], axes: Axes, *, rank: int, scale: float, dtype: jnp.dtype, key: jax.Array
    ):
        (E, out, into), (of_experts, of_out, of_into) = shape, axes
        self.down = nnx.Param(normal(key, (E, rank, into), into**-0.5, dtype), axes=(of_experts, "rank", of_into))
        self.up = nnx.Param(jnp.zeros((E, out, rank), dtype), axes=(of_experts, of_out, "rank"))
        self.scale = scale


class ExpertWeights(nnx.Module):
    """A matrix [out, in] for each of E experts."""

    def __init__(self, shape: tuple[int, int, int], axes: Axes, *, dtype: jnp.dtype, key: jax.Array):
        self.weight = nnx.Param(normal(key, shape, shape[-1] ** -0.5, dtype), axes=axes)
        self.adapter: ExpertAdapter | None = nnx.data(None)

    def adapt(self, rank: int, scale: float, dtype: jnp.dtype, key: jax.Array) -> None:
        """Add an adapter of its own to each expert."""
        shape, axes = self.weight.shape, self.weight.get_metadata()["axes"]
        self.adapter = ExpertAdapter(shape, axes, rank=rank, scale=scale, dtype=dtype, key=key)

    def matrix(self, dtype: jnp.dtype) -> ExpertMatrix:
        """All of it in this number type."""
        weight = self.weight[...].astype(dtype)
        if self.adapter is None:
            return ExpertMatrix(weight)
        up = self.adapter.scale * self.adapter.up[...].astype(jnp.float32)
        return ExpertMatrix(weight, self.adapter.down[...].astype(dtype), up.astype(dtype))


class Router(nnx.Module):
    """Scores of every expert from a token."""

    def __init__(self, count: int, width: int, *, dtype: jnp.dtype, key: jax.Array):
        # A row for each expert: whole on every device but for its width.
        self.weight = nnx.Param(normal(key, (count, width), width**-0.5, dtype), axes=(None, "embed"))
        self.adapter: Adapter | None = nnx.data(None)

    def adapt(self, rank: int, scale: float, dtype: jnp.dtype, key: jax.Array) -> None:
        """Add an adapter."""
        (E, D), axes = self.weight.shape, self.weight.get_metadata()["axes"]
        self.adapter = Adapter((E,), (D,), axes, rank=rank, scale=scale, dtype=dtype, key=key)

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T E"]:
        """Float32 scores."""
        scores = product(x, self.weight[...].astype(x.dtype), jnp.dtype(jnp.float32))
        return scores if self.adapter is None else scores + self.adapter(x).astype(jnp.float32)


class Experts(nnx.Module):
    """The sum over the chosen experts of weight * down(silu(gate(x)) * up(x)), in place of a layer's mlp."""

    def __init__(self, config: ExpertsConfig, width: int, *, dtype: jnp.dtype, key: jax.Array):
        E, F = config.count, config.mlp_size
        keys = jax.random.split(key, 4)
        # Among the mesh axes of "experts" is that of "mlp": an expert's width is not split.
        into, out = ("experts", None, "expert_embed"), ("experts", "expert_embed", None)
        self.router = Router(E, width, dtype=dtype, key=keys[0])
        self.gate = ExpertWeights((E, F, width), into, dtype=dtype, key=keys[1])
        self.up = ExpertWeights((E, F, width), into, dtype=dtype, key=keys[2])
        self.down = ExpertWeights((E, width, F), out, dtype=dtype, key=keys[3])
        self.chosen = config.chosen
        self.normalise = config.normalise

    def choose(self, x: Float[Array, "B T D"]) -> Choice:
        """The experts of each token, and what they count. Scores and probabilities are float32."""
        probability = jax.nn.softmax(shard(self.router(x), "batch", "length", None), axis=-1)
        weight, expert = jax.lax.top_k(probability, self.chosen)
        if self.normalise:
            weight = weight / jnp.sum(weight, axis=-1, keepdims=True)
        return Choice(expert, weight, probability)

    def __call__(self, x: Float[Array, "B T D"], choice: Choice, stream: Stream = WHOLE) -> Float[Array, "B T D"]:
        """What the chosen experts make of each token, in x's number type. Tokens lie as `stream` says, and stay so."""
        matrices = [part.matrix(x.dtype) for part in (self.gate, self.up, self.down)]
        mesh = current_mesh()
        if mesh is None or mesh.size == 1:
            return _of_experts(x, choice.expert, choice.weight, *matrices)
        rows = partition_spec(("batch", "length", None), x.shape, mesh)
        (axes,) = partition_spec(("experts",), matrices[0].weight.shape[:1], mesh)
        exchanged = tuple(name for name in names_of(axes) if name in names_of(rows[0]))
        shared = tuple(name for name in names_of(axes) if name not in exchanged)
        split = shared if stream.splits(x) and shared == (residual.AXIS,) else ()

        def on_device(x: Array, expert: Array, weight: Array, *own: ExpertMatrix) -> Array:
            if axes is None:
                return _of_experts(x, expert, weight, *own)
            x = gathered(x, 1, split)
            if exchanged:
                x, expert, weight = (jax.lax.all_gather(y, exchanged, tiled=True) for y in (x, expert, weight))
            first = jax.lax.axis_index(axes) * own[0].weight.shape[0]
            made = _of_experts(x, expert - first, weight, *own, others=True)
            made = jax.lax.psum_scatter(made, exchanged, tiled=True) if exchanged else made
            if split:
                return jax.lax.psum_scatter(made, split, scatter_dimension=1, tiled=True)
            return jax.lax.psum(made, shared) if shared else made

        of_x = partition_spec(("batch", stream.tokens, None), x.shape, mesh) if split else rows
        run = jax.shard_map(
            on_device,
            mesh=mesh,
            in_specs=(of_x, rows, rows, *(PartitionSpec(axes),) * 3),
            out_specs=of_x,
            check_vma=False,  # loops over blocks of rows do not say how their results vary
        )
        return run(x, choice.expert, choice.weight, *matrices)


def router_sums(choice: Choice, real: Bool[Array, "B T"]) -> RouterSums:
    """Sums over the tokens that are real, which padding is not."""
    count, real = choice.probability.shape[-1], real[..., None]
    # A sum of comparisons, not a scatter: E is small.
    chosen = choice.expert[..., None] == jnp.arange(count)
    return RouterSums(
        jnp.sum(chosen & real[..., None], axis=(0, 1, 2), dtype=jnp.float32),
        jnp.sum(jnp.where(real, choice.probability, 0.0), axis=(0, 1)),
    )


def balance_loss(sums: RouterSums, config: ExpertsConfig) -> Float[Array, ""]:
    """The load-balancing loss of these tokens, weighted, times their number: equations 4 to 6 of arXiv 2101.03961.

    Per token it is `balance` * E * sum over e of f[e] p[e], where f is the share of tokens that expert e was chosen for
    and p its mean probability, over all layers with experts, as in transformers' `load_balancing_loss_func`. f has no
    gradient.
    """
    tokens = jnp.maximum(jnp.sum(sums.chosen) / config.chosen, 1.0)
    return config.balance * config.count * jnp.sum(sums.chosen * sums.probability) / tokens


def _of_experts(
    x: Float[Array, "B T D"],
    expert: Int[Array, "B T N"],
    weight: Float[Array, "B T N"],
    gate: ExpertMatrix,
    up: ExpertMatrix,
    down: ExpertMatrix,
    *,
    others: bool = False,
) -> Float[Array, "B T D"]:
    """What these experts add to each token.

    Args:
        expert: numbers of the chosen experts, of which those from 0 to E - 1 are these.
        others: may there be other numbers?
    """
    E, N = gate.weight.shape[0], expert.shape[-1]
    number = expert.reshape(-1)
    number = jnp.where((number >= 0) & (number < E), number, E) if others else number
    order = jnp.argsort(number, stable=True)
    place = jnp.argsort(order)
    sizes = jnp.sum(number[:, None] == jnp.arange(E), axis=0, dtype=jnp.int32)
    mine = (jnp.arange(order.size) < jnp.sum(sizes))[:, None] if others else None

    def own(rows: Array) -> Array:
        # Rows behind all groups are undefined after a product, and so are their gradients.
        return rows if mine is None else jnp.where(mine, rows, 0)

    def multiplied(rows: Array, by: ExpertMatrix) -> Array:
        made = own(grouped_product(rows, by.weight, sizes))
        if by.down is None or by.up is None:
            return made
        return made + own(grouped_product(own(grouped_product(rows, by.down, sizes)), by.up, sizes))

    rows = own(_to_experts(x.reshape(-1, x.shape[-1]), order, place, N))
    counts = own(weight.reshape(-1)[order].astype(x.dtype)[:, None])

    def rest(gated: Array, upped: Array) -> Array:
        return multiplied(jax.nn.silu(gated) * upped * counts, down)

    both = (checkpoint_name(multiplied(rows, matrix), GROUPED) for matrix in (gate, up))
    made = keep_inputs(rest)(*both)
    return _to_tokens(made, order, place, N).reshape(x.shape)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _to_experts(x: Float[Array, "M D"], order: Int[Array, "A"], place: Int[Array, "A"], N: int) -> Float[Array, "A D"]:
    """Each token's row N times, in the order of experts. `place` is where each choice stands in that order."""
    return x[order // N]


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _to_tokens(y: Float[Array, "A D"], order: Int[Array, "A"], place: Int[Array, "A"], N: int) -> Float[Array, "M D"]:
    """The sum of the N rows of each token: the transpose of `_to_experts`."""
    return jnp.sum(y[place].reshape(-1, N, y.shape[-1]), axis=1, dtype=jnp.float32).astype(y.dtype)


# A gather each way: the compiler would make a scatter of the gradient of a gather.
_to_experts.defvjp(
    lambda x, order, place, N: (_to_experts(x, order, place, N), (order, place)),
    lambda N, kept, gradient: (_to_tokens(gradient, *kept, N), None, None),
)
_to_tokens.defvjp(
    lambda y, order, place, N: (_to_tokens(y, order, place, N), (order, place)),
    lambda N, kept, gradient: (_to_experts(gradient, *kept, N), None, None),
)

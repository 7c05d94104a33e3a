"""Leaf modules: linear, context embedding, norms, mlps. Weights keep the [out, in] orientation of HF checkpoints."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from rave_jax.batch import Kind, TokenInfo
from rave_jax.models.initial import normal
from rave_jax.models.weight_gradient import on_mesh
from rave_jax.parallel.sharding import shard
from rave_jax.typing import Array, Float

Axes = tuple[str | None, ...]

FEW_ROWS = 32
"""With more rows the order of a product's sides makes little difference on a CPU."""


class Adapter(nnx.Module):
    """A low-rank update of one linear (LoRA, arXiv 2106.09685): down [r, *in], up [*out, r], up zero at the start."""

    def __init__(
        self,
        out_shape: tuple[int, ...],
        in_shape: tuple[int, ...],
        axes: Axes,
        *,
        rank: int,
        scale: float,
        dtype: jnp.dtype,
        key: jax.Array,
    ):
        n = len(out_shape)
        down = normal(key, (rank, *in_shape), math.prod(in_shape) ** -0.5, dtype)
        self.down = nnx.Param(down, axes=("rank", *axes[n:]))
        self.up = nnx.Param(jnp.zeros((*out_shape, rank), dtype), axes=(*axes[:n], "rank"))
        self.scale = scale

    def __call__(self, x: Array, n: int | None = None) -> Array:
        """The update of the linear's output for the same x; with n, of entry n of its first axis."""
        up = self.up[...] if n is None else self.up[n]
        of_up = _axes(self.up) if n is None else _axes(self.up)[1:]
        return self.scale * contract(contract(x, self.down[...], axes=_axes(self.down)), up, 1, of_up)

    def times(self, x: Array) -> Array:
        """The update of rows of a table, from the same rows x of `up`."""
        return self.scale * product(x, self.down[...].T.astype(x.dtype), x.dtype)

    def low_rank(self) -> LowRank:
        """The update as a matrix [O,I] of one axis each, with the scale in it."""
        up = self.up[...]
        return LowRank(self.down[...], (self.scale * up.astype(jnp.float32)).astype(up.dtype))


class LowRank(NamedTuple):
    """A matrix [O,I] as up [O,r] times down [r,I]."""

    down: Float[Array, "r I"]
    up: Float[Array, "O r"]


class Linear(nnx.Module):
    """y[..., *out] = sum over *in of weight[*out, *in] x[..., *in], plus bias[*out].

    Args:
        out_shape, in_shape: axes of the result and of the summed input, heads as axes of their own.
        axes: logical axes of the weight, one per axis of out_shape + in_shape.
        bias: whether there is one; zero at the start.
    """

    def __init__(
        self,
        out_shape: tuple[int, ...],
        in_shape: tuple[int, ...],
        axes: Axes,
        *,
        bias: bool,
        dtype: jnp.dtype,
        key: jax.Array,
    ):
        n = len(out_shape)
        weight = normal(key, (*out_shape, *in_shape), math.prod(in_shape) ** -0.5, dtype)
        self.weight = nnx.Param(weight, axes=axes)
        self.bias = nnx.data(nnx.Param(jnp.zeros(out_shape, dtype), axes=axes[:n]) if bias else None)
        self.adapter: Adapter | None = nnx.data(None)
        self.num_in = len(in_shape)

    @property
    def out_shape(self) -> tuple[int, ...]:
        """Axes of the result beside the batch ones."""
        return self.weight.shape[: -self.num_in]

    @property
    def in_shape(self) -> tuple[int, ...]:
        """Axes that are summed over."""
        return self.weight.shape[-self.num_in :]

    def adapt(self, rank: int, scale: float, dtype: jnp.dtype, key: jax.Array) -> None:
        """Add an adapter."""
        axes = _axes(self.weight)
        self.adapter = Adapter(self.out_shape, self.in_shape, axes, rank=rank, scale=scale, dtype=dtype, key=key)

    def part(self, x: Array, n: int) -> Array:
        """Entry n of the first output axis, without the others."""
        y = contract(x, self.weight[n], self.num_in, _axes(self.weight)[1:])
        if self.bias is not None:
            y = y + self.bias[n].astype(x.dtype)
        return y if self.adapter is None else y + self.adapter(x, n)

    def __call__(self, x: Array) -> Array:
        """Computes in x's number type."""
        y = contract(x, self.weight[...], self.num_in, _axes(self.weight))
        if self.bias is not None:
            y = y + self.bias[...].astype(x.dtype)
        return y if self.adapter is None else y + self.adapter(x)


class TiedHead(nnx.Module):
    """The output head of a model whose head is the embedding table: of its own it has an adapter at most, which the
    embedding of tokens does not see."""

    def __init__(self, vocab_size: int, width: int):
        self.shape = (vocab_size, width)
        self.adapter: Adapter | None = nnx.data(None)

    def adapt(self, rank: int, scale: float, dtype: jnp.dtype, key: jax.Array) -> None:
        """Add an adapter."""
        (V, D), axes = self.shape, ("vocab", "embed")
        self.adapter = Adapter((V,), (D,), axes, rank=rank, scale=scale, dtype=dtype, key=key)


def _axes(param: nnx.Param) -> Axes:
    return param.get_metadata()["axes"]


def contract(x: Array, weight: Array, num_in: int | None = None, axes: Axes | None = None) -> Array:
    """Sum over the last `num_in` axes of x and of weight; without a number, all of weight's but its first.

    Where `axes`, the logical axes of the weight, are given, its gradient is summed onto its shards.
    """
    num_in = weight.ndim - 1 if num_in is None else num_in
    multiply = functools.partial(_as_matrix, num_in=num_in)
    return whole_gradient(multiply(x, weight) if axes is None else on_mesh(multiply, x, weight, axes, num_in))


def _as_matrix(x: Array, weight: Array, num_in: int) -> Array:
    rows, out, into = x.shape[: x.ndim - num_in], weight.shape[:-num_in], weight.shape[-num_in:]
    # As a plain matrix: with heads as an axis of its own the CPU compiler copies the weight into another order.
    matrix = weight.reshape(math.prod(out), math.prod(into)).astype(x.dtype)
    return product(x.reshape(*rows, -1), matrix, x.dtype).reshape(*rows, *out)


def product(x: Float[Array, "*rows I"], matrix: Float[Array, "O I"], dtype: jnp.dtype) -> Float[Array, "*rows O"]:
    """Sum over I, in number type `dtype`.

    The CPU's code for a float32 product first copies its right side into another order. With few rows, as in decoding,
    that costs much if the right side is the weight; so there it is x.

    In bfloat16 a CPU is quick with the weight on the right, but not for a single row, which is taken twice there.
    """

    def weight_right(x: Array, matrix: Array) -> Array:
        return jnp.einsum("...i,oi->...o", x, matrix, preferred_element_type=dtype)

    def weight_left(x: Array, matrix: Array) -> Array:
        columns = x.reshape(-1, x.shape[-1]).T
        y = jnp.matmul(matrix, columns, preferred_element_type=dtype)
        # Without this the compiler turns the transposed product back into one with the sides exchanged.
        return jax.lax.optimization_barrier(y).T.reshape(*x.shape[:-1], -1)

    def row_twice(x: Array, matrix: Array) -> Array:
        return weight_right(jnp.broadcast_to(x.reshape(1, -1), (2, x.size)), matrix)[0].reshape(*x.shape[:-1], -1)

    rows = math.prod(x.shape[:-1])
    if x.dtype == jnp.float32 and 1 < rows <= FEW_ROWS:
        on_cpu = weight_left
    elif x.dtype == jnp.bfloat16 and rows == 1:
        on_cpu = row_twice
    else:
        return weight_right(x, matrix)
    return jax.lax.platform_dependent(x, matrix, cpu=on_cpu, default=weight_right)


def keep_inputs[**P, R](function: Callable[P, R]) -> Callable[P, R]:
    """`function`, keeping only its inputs for the backward pass, which computes again what it needs from inside.

    For what is elementwise and cheap, alone or before a last matmul, whose result no gradient needs.
    """
    return jax.checkpoint(function, prevent_cse=False)


@jax.custom_vjp
def whole_gradient(x: Array) -> Array:
    """x; its gradient is computed once, as an array of its own.

    Two matmuls read the gradient of a linear's output. Without this the CPU compiler computes it again for each, for
    one of them in transposed order, which costs about as much as the matmul itself.
    """
    return x


whole_gradient.defvjp(lambda x: (x, None), lambda _, gradient: (jax.lax.optimization_barrier(gradient),))


class ContextEmbedding(nnx.Module):
    """A table [count, D] of learnable tokens, shared by all pictures and frames."""

    def __init__(self, count: int, width: int, *, dtype: jnp.dtype, key: jax.Array):
        # A few rows are whole on every device; only their width is split.
        self.weight = nnx.Param(normal(key, (count, width), 0.02, dtype), axes=(None, "embed"))

    def __call__(self, x: Float[Array, "B T D"], info: TokenInfo) -> Float[Array, "B T D"]:
        """x with the table's rows in the places of context tokens, in x's number type."""
        table, context = self.weight[...], info.kind == Kind.CONTEXT
        # Beyond the table for all others: their gradient is dropped there instead of added up as zeros.
        number = jnp.where(context, info.row, len(table))
        rows = jnp.take(table, number, axis=0, mode="fill", fill_value=0)
        return jnp.where(context[..., None], rows.astype(x.dtype), x)


class RmsNorm(nnx.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last axis, in float32; with `plus_one`, times 1 + weight."""

    def __init__(self, width: int, *, eps: float, dtype: jnp.dtype, plus_one: bool = False):
        # Whole on every device: splitting a vector this small would only add communication.
        start = jnp.zeros if plus_one else jnp.ones
        self.weight = nnx.Param(start((width,), dtype), axes=(None,))
        self.eps = eps
        self.plus_one = plus_one

    def __call__(self, x: Array) -> Array:
        """The same shape and number type as x."""
        norm = functools.partial(_rms_norm, eps=self.eps, plus_one=self.plus_one)
        return keep_inputs(norm)(x, self.weight[...])


def _rms_norm(x: Array, weight: Array, *, eps: float, plus_one: bool) -> Array:
    wide, weight = x.astype(jnp.float32), weight.astype(jnp.float32)
    scale = jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + eps)
    return (wide * scale * (1 + weight if plus_one else weight)).astype(x.dtype)


class LayerNorm(nnx.Module):
    """(x - mean(x)) / sqrt(variance(x) + eps) * weight + bias over the last axis, in float32."""

    def __init__(self, width: int, *, eps: float, dtype: jnp.dtype):
        self.weight = nnx.Param(jnp.ones((width,), dtype), axes=(None,))
        self.bias = nnx.Param(jnp.zeros((width,), dtype), axes=(None,))
        self.eps = eps

    def __call__(self, x: Array) -> Array:
        """The same shape and number type as x."""
        return keep_inputs(functools.partial(_layer_norm, eps=self.eps))(x, self.weight[...], self.bias[...])


def _layer_norm(x: Array, weight: Array, bias: Array, *, eps: float) -> Array:
    wide = x.astype(jnp.float32)
    wide = wide - jnp.mean(wide, axis=-1, keepdims=True)
    scale = jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + eps)
    return (wide * scale * weight.astype(jnp.float32) + bias.astype(jnp.float32)).astype(x.dtype)


def quick_gelu(x: Array) -> Array:
    """x * sigmoid(1.702 x), the GELU of CLIP (arXiv 1606.08415)."""
    return x * jax.nn.sigmoid(1.702 * x)


ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_pytorch_tanh": functools.partial(jax.nn.gelu, approximate=True),
    "quick_gelu": quick_gelu,
}
"""What HF configs call the functions between two linears."""


class Mlp(nnx.Module):
    """second(activation(first(x))), both with a bias: the mlp of most vision towers.

    Args:
        width: of x and of the result.
        hidden: width in between.
        activation: a name of `ACTIVATIONS`.
    """

    def __init__(self, width: int, hidden: int, activation: str, *, dtype: jnp.dtype, key: jax.Array):
        keys = jax.random.split(key)
        self.first = Linear((hidden,), (width,), ("mlp", "embed"), bias=True, dtype=dtype, key=keys[0])
        self.second = Linear((width,), (hidden,), ("embed", "mlp"), bias=True, dtype=dtype, key=keys[1])
        self.activation = activation

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """The same shape as x."""

        def rest(hidden: Array) -> Array:
            return self.second(shard(ACTIVATIONS[self.activation](hidden), "batch", "length", "mlp"))

        return keep_inputs(rest)(self.first(x))


class SwiGlu(nnx.Module):
    """down(silu(gate(x)) * up(x)), the mlp of the decoder and of the tower."""

    def __init__(self, width: int, hidden: int, *, bias: bool, dtype: jnp.dtype, key: jax.Array):
        keys = jax.random.split(key, 3)
        self.gate = Linear((hidden,), (width,), ("mlp", "embed"), bias=bias, dtype=dtype, key=keys[0])
        self.up = Linear((hidden,), (width,), ("mlp", "embed"), bias=bias, dtype=dtype, key=keys[1])
        self.down = Linear((width,), (hidden,), ("embed", "mlp"), bias=bias, dtype=dtype, key=keys[2])

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """The same shape as x."""

        def rest(gate: Array, up: Array) -> Array:
            return self.down(shard(jax.nn.silu(gate) * up, "batch", "length", "mlp"))

        return keep_inputs(rest)(self.gate(x), self.up(x))

"""The loss: cross-entropy over the vocabulary in chunks, so that no float32 [B,T,V] array exists."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from rave_jax.models.layers import LowRank
from rave_jax.parallel.exchange import MeshAxes, gathered, summed_onto_shard
from rave_jax.parallel.sharding import current_mesh, names_of, partition_spec
from rave_jax.typing import Array, Float, Int


class TokenSums(NamedTuple):
    """Float32 sums over tokens; divide by a total weight to get means. Gradients flow from `loss` alone.

    Fields:
        loss: negative log-likelihoods and z-loss.
        correct: right guesses.
        weight: weights.
        z: the z-loss in `loss`.
    """

    loss: Float[Array, ""]
    correct: Float[Array, ""]
    weight: Float[Array, ""]
    z: Float[Array, ""]


class Gradients(NamedTuple):
    """Of `TokenSums.loss`."""

    hidden: Float[Array, "B T D"]
    head: Float[Array, "V D"]
    adapter: LowRank | None = None


class Places(NamedTuple):
    """Mesh axes by what they split; all empty on one device."""

    tokens: MeshAxes = ()
    """Rows of the batch, or the tokens of a row."""
    vocab: MeshAxes = ()
    embed: MeshAxes = ()


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def chunked_cross_entropy(
    hidden: Float[Array, "B T D"],
    head: Float[Array, "V D"],
    targets: Int[Array, "B T"],
    weights: Float[Array, "B T"],
    chunk: int,
    z_loss: float = 0.0,
    adapter: LowRank | None = None,
) -> TokenSums:
    """Weighted sums of the negative log-likelihood and of right guesses.

    Logits exist for `chunk` tokens of each row at a time, in float32. Where gradients are asked for, they are computed
    with the loss, chunk by chunk, so that no logits are computed twice. T need not be a multiple of the chunk.

    On a mesh, each device has its rows and its part of the vocabulary. The width of the head is gathered once, in
    hidden's dtype, and the head's gradient is summed in float32 on each device over all chunks and sent to its shards
    once. For that a device keeps V/tensor x D numbers in hidden's dtype, and with gradients as many in float32.

    Args:
        hidden: output of the final norm.
        head: rows of the vocabulary; taken in hidden's dtype, products summed in float32.
        targets: the id that each position predicts.
        weights: weight of each prediction. They have no gradient.
        chunk: tokens of a row per chunk.
        z_loss: coefficient of the square of the log-sum-exp, which is added to the negative log-likelihood (section 5
            of PaLM, arXiv 2204.02311).
        adapter: what is added to the head; its factors are multiplied with hidden states in turn, and it is never a
            matrix [V,D].
    """
    return _on_devices(hidden, Head(head, adapter), targets, weights, chunk, z_loss, gradients=False)[0]


class Head(NamedTuple):
    """A head's weight and what LoRA adds to it."""

    weight: Float[Array, "V D"]
    adapter: LowRank | None


def _forward(
    hidden: Array,
    head: Array,
    targets: Array,
    weights: Array,
    chunk: int,
    z_loss: float,
    adapter: LowRank | None,
) -> tuple[TokenSums, Gradients]:
    sums, gradients = _on_devices(hidden, Head(head, adapter), targets, weights, chunk, z_loss, gradients=True)
    assert gradients is not None
    like = Gradients(hidden, head, adapter)
    return sums, jax.tree.map(lambda x, of: x.astype(of.dtype), gradients, like)


def _backward(
    chunk: int, z_loss: float, gradients: Gradients, of_sums: TokenSums
) -> tuple[Array, Array, None, None, LowRank | None]:
    hidden, head, adapter = jax.tree.map(lambda x: (of_sums.loss * x.astype(jnp.float32)).astype(x.dtype), gradients)
    return hidden, head, None, None, adapter


chunked_cross_entropy.defvjp(_forward, _backward)


def _on_devices(
    hidden: Array, head: Head, targets: Array, weights: Array, chunk: int, z_loss: float, *, gradients: bool
) -> tuple[TokenSums, Gradients | None]:
    """The sums, and the gradients of the loss, over the current mesh."""
    mesh = current_mesh()
    of_device = functools.partial(_of_device, chunk=chunk, z_loss=z_loss, gradients=gradients)
    if mesh is None or mesh.size == 1:
        return of_device(hidden, head, targets, weights, places=Places())
    of_tokens = partition_spec(("batch", "length"), targets.shape, mesh)
    of_hidden = PartitionSpec(*of_tokens, None)
    of_head = partition_spec(("vocab", "embed"), head.weight.shape, mesh)
    rows, length = map(names_of, of_tokens)
    places = Places(rows + length, *map(names_of, of_head))
    # Specs stand in the trees of the results, in the place of arrays.
    whole: Any = PartitionSpec()
    down: Any = PartitionSpec(None, of_head[1])
    up: Any = PartitionSpec(of_head[0], None)
    of_parts: Any = (of_head, None if head.adapter is None else LowRank(down, up))
    of_gradients: Any = (of_hidden, *of_parts)
    split = jax.shard_map(
        functools.partial(of_device, places=places),
        mesh=mesh,
        in_specs=(of_hidden, Head(*of_parts), of_tokens, of_tokens),
        out_specs=(TokenSums(*(whole,) * 4), Gradients(*of_gradients) if gradients else None),
        check_vma=False,  # that a gathered array is the same on all devices is not inferred
    )
    return split(hidden, head, targets, weights)


def _of_device(
    hidden: Float[Array, "B T D"],
    head: Head,
    targets: Int[Array, "B T"],
    weights: Float[Array, "B T"],
    *,
    chunk: int,
    z_loss: float,
    gradients: bool,
    places: Places,
) -> tuple[TokenSums, Gradients | None]:
    """Sums over all devices and gradients of the parts that this one has, from its rows and its part of the head."""
    T, chunk = hidden.shape[1], min(chunk, hidden.shape[1])
    whole = T // chunk * chunk
    own = Head(*jax.tree.map(lambda x: x.astype(hidden.dtype), head))
    # `up` has no width to gather.
    head = Head(gathered(own.weight, 1, places.embed), own.adapter and _whole_down(own.adapter, places.embed))
    Total = tuple[TokenSums, Gradients | None]

    def with_chunk(total: Total, start: Array | int, size: int) -> Total:
        def cut(x: Array) -> Array:
            return jax.lax.dynamic_slice_in_dim(x, start, size, axis=1)

        sums, so_far = total
        of_tokens = cut(hidden), cut(targets), cut(weights)
        more, gradient = _of_chunk(*of_tokens, head, z_loss, places.vocab, gradients)
        sums = jax.tree.map(jnp.add, sums, more)
        if so_far is None or gradient is None:
            return sums, None
        of_hidden = jax.lax.dynamic_update_slice_in_dim(so_far.hidden, gradient.hidden, start, axis=1)
        added = jax.tree.map(jnp.add, so_far[1:], gradient[1:])
        return sums, Gradients(of_hidden, *added)

    zero = jnp.zeros((), jnp.float32)
    of_parts = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), tuple(head))
    nothing = Gradients(jnp.zeros_like(hidden), *of_parts) if gradients else None
    total: Total = TokenSums(zero, zero, zero, zero), nothing
    total = jax.lax.fori_loop(0, whole // chunk, lambda n, total: with_chunk(total, n * chunk, chunk), total)
    if whole < T:
        total = with_chunk(total, whole, T - whole)
    sums, found = total
    sums = jax.lax.psum(sums, places.tokens) if places.tokens else sums
    if found is None:
        return sums, None
    of_hidden = jax.lax.psum(found.hidden, places.vocab) if places.vocab else found.hidden
    of_head = summed_onto_shard(found.head, 1, places.embed, places.tokens)
    if found.adapter is None:
        return sums, Gradients(of_hidden, of_head)
    # Of `down` each device has what comes by way of its part of the vocabulary.
    down = summed_onto_shard(found.adapter.down, 1, places.embed, places.tokens + places.vocab)
    up = summed_onto_shard(found.adapter.up, 1, (), places.tokens)
    return sums, Gradients(of_hidden, of_head, LowRank(down, up))


def _whole_down(adapter: LowRank, embed: MeshAxes) -> LowRank:
    return adapter._replace(down=gathered(adapter.down, 1, embed))


def _of_chunk(
    hidden: Float[Array, "B T D"],
    targets: Int[Array, "B T"],
    weights: Float[Array, "B T"],
    head: Head,
    z_loss: float,
    vocab: MeshAxes,
    gradients: bool,
) -> tuple[TokenSums, Gradients | None]:
    """One chunk. The sums are over the whole vocabulary; the gradients are those by way of this device's part of it."""
    V = len(head.weight)
    ways = jax.lax.axis_size(vocab) if vocab else 1
    first = jax.lax.axis_index(vocab) * V if vocab else 0

    def over_vocab(x: Array) -> Array:
        return jax.lax.psum(x, vocab) if vocab else x

    logits = _product(hidden, head.weight)
    low = None if head.adapter is None else _product(hidden, head.adapter.down).astype(hidden.dtype)
    if head.adapter is not None and low is not None:
        logits = logits + _product(low, head.adapter.up)
    top = jnp.max(logits, axis=-1)
    guess = first + jnp.argmax(logits, axis=-1).astype(targets.dtype)
    if vocab:
        of_device, top = top, jax.lax.pmax(top, vocab)
        # The first of equal logits, as `argmax` has it.
        guess = jax.lax.pmin(jnp.where(of_device == top, guess, V * ways), vocab)
    shifted = logits - top[..., None]
    # A comparison and not a gather: the gradient needs it too.
    at_target = first + jax.lax.broadcasted_iota(targets.dtype, logits.shape, 2) == targets[..., None]
    chosen = over_vocab(jnp.sum(jnp.where(at_target, shifted, 0.0), axis=-1))
    # An id that the vocabulary does not have must not pass for a loss: training stops at NaN.
    chosen = jnp.where((targets >= 0) & (targets < V * ways), chosen, jnp.nan)
    exp = jnp.exp(shifted)
    total = over_vocab(jnp.sum(exp, axis=-1))
    log_sum = jnp.log(total)
    weights = weights.astype(jnp.float32)
    z = z_loss * jnp.square(top + log_sum) if z_loss else jnp.zeros_like(top)
    loss = jnp.sum((log_sum - chosen + z) * weights)
    sums = TokenSums(loss, jnp.sum((guess == targets) * weights), jnp.sum(weights), jnp.sum(z * weights))
    if not gradients:
        return sums, None
    of_log_sum = 1.0 + 2.0 * z_loss * (top + log_sum) if z_loss else 1.0
    of_logits = exp * (weights * of_log_sum / total)[..., None] - jnp.where(at_target, weights[..., None], 0.0)
    # Two products read it. Without this the CPU's compiler computes it for each.
    of_logits = jax.lax.optimization_barrier(of_logits)
    of_hidden, of_head = _product(of_logits, head.weight, 0), _over_tokens(of_logits, hidden)
    if head.adapter is None or low is None:
        return sums, Gradients(of_hidden.astype(hidden.dtype), of_head)
    of_low = _product(of_logits, head.adapter.up, 0)
    of_adapter = LowRank(_over_tokens(of_low, hidden), _over_tokens(of_logits, low))
    of_hidden = of_hidden + _product(of_low, head.adapter.down, 0)
    return sums, Gradients(of_hidden.astype(hidden.dtype), of_head, of_adapter)


def _product(x: Float[Array, "B T c"], matrix: Float[Array, "V D"], dim: int = 1) -> Float[Array, "B T n"]:
    """Float32 sums over this dimension of the matrix."""
    return jax.lax.dot_general(x, matrix, (((2,), (dim,)), ((), ())), preferred_element_type=jnp.float32)


def _over_tokens(x: Float[Array, "B T O"], y: Float[Array, "B T I"]) -> Float[Array, "O I"]:
    return jax.lax.dot_general(x, y, (((0, 1), (0, 1)), ((), ())), preferred_element_type=jnp.float32)

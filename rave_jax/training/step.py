"""One training step: a pure function of state and batch, with shardings and donation."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import optax

from rave_jax.attention import ChoiceSums
from rave_jax.attention.choices import figures
from rave_jax.batch import Batch, Kind, TokenInfo
from rave_jax.models.forward import Output, Want
from rave_jax.models.layers import LowRank
from rave_jax.parallel.compiler import compiler_options
from rave_jax.parallel.rows import batch_axis
from rave_jax.training.averages import Ema
from rave_jax.training.objective import TokenSums, chunked_cross_entropy
from rave_jax.training.optimizers import ParameterGroup, Schedule
from rave_jax.training.state import ModelGraph, Params, TrainState
from rave_jax.typing import Array, Float, Int


class Trainable(Protocol):
    """What a step needs of a model."""

    def forward(self, batch: Batch, want: Want) -> Output:
        """Hidden states, and the sums of further terms of the loss by name."""

    def loss_weights(self, info: TokenInfo) -> dict[str, jax.Array]:
        """What those sums are divided by, by name, from the token codes of all rows of the batch."""

    def head_weight(self) -> jax.Array:
        """[V,D]."""

    def head_adapter(self) -> LowRank | None:
        """What LoRA adds to it; None without LoRA."""


class StepMetrics(NamedTuple):
    """What one step reports, over the whole batch.

    Fields:
        loss: mean negative log-likelihood of a target token, weighted.
        losses: what mechanisms add to it, by name, weighted: the step descends the sum of all of them.
        accuracy: share of target tokens guessed right, weighted.
        grad_norm: norm of the gradient of all trained parameters, before clipping.
        learning_rate: rate of a group with multiplier 1.
        tokens: tokens that are not padding.
        target_tokens: tokens with a loss.
        bad_step: -1, or the step whose loss or gradient was not finite.
        fill: share of the tokens of all rows that are not padding.
        images: pictures and videos.
        group_norms: norm of the gradient of each group of parameters, by its name.
        mechanisms: root mean square of the mechanisms' trained parameters before the step, over all layers, by the
            parameter's own name. Those of a gate that starts as nothing tell how far it has opened.
        routing: what queries choose, by the mechanism and the figure (`attention/choices.py`).
    """

    loss: Float[Array, ""]
    losses: dict[str, Float[Array, ""]]
    accuracy: Float[Array, ""]
    grad_norm: Float[Array, ""]
    learning_rate: Float[Array, ""]
    tokens: Int[Array, ""]
    target_tokens: Int[Array, ""]
    bad_step: Int[Array, ""]
    fill: Float[Array, ""]
    images: Int[Array, ""]
    group_norms: dict[str, Float[Array, ""]]
    mechanisms: dict[str, Float[Array, ""]]
    routing: dict[str, Float[Array, ""]]


Choices = dict[str, ChoiceSums]


class BatchSums(NamedTuple):
    """What micro-batches add up: sums over tokens, and the mechanisms' losses, already over their whole weights."""

    tokens: TokenSums
    losses: dict[str, Float[Array, ""]]


class BatchWeights(NamedTuple):
    """What a whole batch divides its sums by; 1 where there is nothing to divide."""

    targets: Float[Array, ""]
    losses: dict[str, Float[Array, ""]]


Z_LOSS = "z"
"""Name of the z-loss among those that are added to the loss."""

Step = Callable[[TrainState, Batch], tuple[TrainState, StepMetrics]]


def micro_batches(batch: Batch, count: int) -> Batch:
    """Split rows into `count` micro-batches on a new leading axis.

    Micro-batch i takes rows i, i + count, ...: each device cuts its own rows and none move.
    """

    def split(axis: int, x: jax.Array) -> jax.Array:
        rows = x.shape[axis] // count
        parts = x.reshape(*x.shape[:axis], rows, count, *x.shape[axis + 1 :])
        return jnp.moveaxis(parts, axis + 1, 0)

    return jax.tree.map(split, batch_axis(), batch)


def make_step(
    graph: ModelGraph,
    groups: Mapping[str, ParameterGroup],
    optimizer: optax.GradientTransformation,
    schedule: Schedule,
    *,
    steps: int,
    accumulation: int,
    loss_chunk: int,
    z_loss: float = 0.0,
    ema: Ema | None = None,
) -> Step:
    """The step as a pure function, not yet compiled.

    The loss is the weighted mean over the target tokens of the whole batch, whatever the accumulation, and so are the
    mechanisms' losses, which are added, each over its own weights, and the z-loss. A step
    whose loss or gradient is not finite changes nothing but `bad_step`, and neither does any step after it, so
    that the caller, who reads metrics late, still holds the state before the bad update.
    """
    last_step = {name: group.freeze_after for name, group in groups.items() if group.freeze_after is not None}

    def objective(
        trained: Params, frozen: Params, batch: Batch, weights: BatchWeights, progress: jax.Array
    ) -> tuple[jax.Array, tuple[BatchSums, Choices]]:
        model: Trainable = graph.merge(trained | frozen)
        out = model.forward(batch, Want(losses=True, choices=True, progress=progress))
        head, of_tokens = model.head_weight(), (batch.targets, batch.loss_weights)
        sums = chunked_cross_entropy(out.hidden, head, *of_tokens, loss_chunk, z_loss, model.head_adapter())
        means = {name: x / weights.losses[name] for name, x in out.losses.items()}
        # The z-loss stands in `sums.loss` with the likelihood, and is told beside it.
        whole = functools.reduce(jnp.add, means.values(), sums.loss / weights.targets)
        means |= {Z_LOSS: sums.z / weights.targets} if z_loss > 0 else {}
        return whole, (BatchSums(sums._replace(loss=sums.loss - sums.z), means), out.choices or {})

    def gradients(state: TrainState, batch: Batch) -> tuple[BatchSums, Choices, Params]:
        # With master copies, gradients are of the copies, in their number type.
        trained = graph.computed(state.trained)
        model: Trainable = graph.merge(trained | state.frozen)
        targets = jnp.sum(batch.loss_weights, dtype=jnp.float32)
        of_losses = model.loss_weights(batch.info) | ({Z_LOSS: targets} if z_loss > 0 else {})
        weights = BatchWeights(targets, of_losses)
        weights = jax.tree.map(lambda x: jnp.where(x > 0, x, 1.0), weights)
        # Of `steps` steps the first has progress 0 and the last nearly 1.
        progress = state.step.astype(jnp.float32) / steps
        of_batch = jax.value_and_grad(objective, has_aux=True)
        if accumulation == 1:
            (_, (sums, choices)), grads = of_batch(trained, state.frozen, batch, weights, progress)
            return sums, choices, grads

        def body(carry: tuple[BatchSums, Params], micro: Batch) -> tuple[tuple[BatchSums, Params], Choices]:
            (_, (sums, choices)), grads = of_batch(trained, state.frozen, micro, weights, progress)
            return jax.tree.map(lambda a, b: a + b.astype(a.dtype), carry, (sums, grads)), choices

        zero = jnp.zeros((), jnp.float32)
        nothing = BatchSums(TokenSums(zero, zero, zero, zero), dict.fromkeys(weights.losses, zero))
        empty = {name: jnp.zeros(x.shape, jnp.float32) for name, x in state.trained.items()}
        (sums, grads), choices = jax.lax.scan(body, (nothing, empty), micro_batches(batch, accumulation))
        choices = jax.tree.map(lambda x: jnp.sum(x, axis=0), choices)
        return sums, choices, {name: grad.astype(state.trained[name].dtype) for name, grad in grads.items()}

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, StepMetrics]:
        (sums, losses), choices, grads = gradients(state, batch)

        def in_phase(tree: Any) -> Params:
            return {
                name: jnp.where(state.step < last_step[name], x, 0) if name in last_step else x
                for name, x in tree.items()
            }

        grads = in_phase(grads)
        norm = optax.tree.norm(jax.tree.map(lambda g: g.astype(jnp.float32), grads))
        updates, moments = optimizer.update(grads, state.optimizer, state.trained)
        # Momentum and decay would go on moving a group after its phase: its update is zero too.
        moved: Any = optax.apply_updates(state.trained, in_phase(updates))

        finite = jnp.isfinite(functools.reduce(jnp.add, losses.values(), sums.loss)) & jnp.isfinite(norm)
        bad_step = jnp.where((state.bad_step < 0) & ~finite, state.step, state.bad_step)
        ok = bad_step < 0

        def keep(new: jax.Array, old: jax.Array) -> jax.Array:
            return jnp.where(ok, new, old)

        after = TrainState(
            step=state.step + ok,
            bad_step=bad_step,
            trained=jax.tree.map(keep, moved, state.trained),
            frozen=state.frozen,
            optimizer=jax.tree.map(keep, moments, state.optimizer),
            ema={} if ema is None else jax.tree.map(keep, ema.after(state.ema, moved, state.step), state.ema),
        )
        weight = jnp.where(sums.weight > 0, sums.weight, 1.0)
        return after, StepMetrics(
            loss=sums.loss / weight,
            losses=losses,
            accuracy=sums.correct / weight,
            grad_norm=norm,
            learning_rate=schedule(state.step),
            tokens=jnp.sum(batch.info.kind != Kind.PAD),
            target_tokens=jnp.sum(batch.loss_weights > 0),
            bad_step=bad_step,
            fill=jnp.mean(batch.info.kind != Kind.PAD, dtype=jnp.float32),
            images=jnp.sum(jnp.max(batch.info.image, axis=1)),
            group_norms=_norms_by_group(grads, groups),
            mechanisms=_sizes_of_mechanisms(state.trained),
            routing=figures(choices),
        )

    return step


def moved_for_step(step: Step, on_devices: TrainState, at_rest: TrainState) -> Step:
    """The step on a state whose optimizer part lies elsewhere between steps: moved in before, and out after.

    Args:
        step: from `make_step`.
        on_devices: shardings of the state that `step` takes and gives.
        at_rest: shardings of the state between steps.
    """

    def part(state: TrainState) -> Any:
        return state.optimizer, state.ema

    @functools.wraps(step)  # a program is found by its name, and this is the step still
    def moved(state: TrainState, batch: Batch) -> tuple[TrainState, StepMetrics]:
        optimizer, ema = jax.device_put(part(state), part(on_devices))
        after, metrics = step(state._replace(optimizer=optimizer, ema=ema), batch)
        optimizer, ema = jax.device_put(part(after), part(at_rest))
        return after._replace(optimizer=optimizer, ema=ema), metrics

    return moved


def _norms_by_group(grads: Params, groups: Mapping[str, ParameterGroup]) -> dict[str, Float[Array, ""]]:
    by_group: dict[str, Params] = {}
    for name, grad in grads.items():
        by_group.setdefault(groups[name].name, {})[name] = grad.astype(jnp.float32)
    return {group: optax.tree.norm(part) for group, part in by_group.items()}


def _sizes_of_mechanisms(trained: Params) -> dict[str, Float[Array, ""]]:
    by_name: dict[str, list[jax.Array]] = {}
    for path, value in trained.items():
        if ".mechanisms." in path:
            by_name.setdefault(path.rpartition(".")[2], []).append(value.astype(jnp.float32))
    return {name: optax.tree.norm(of) / sum(x.size for x in of) ** 0.5 for name, of in by_name.items()}


def compile_step(step: Step, states: Any, batches: Any, metrics: jax.sharding.NamedSharding) -> Step:
    """The step under jit, with the compiler's options of the chip. The state is donated.

    Args:
        step: from `make_step`.
        states: shardings of the state.
        batches: shardings of the batch.
        metrics: sharding of every metric.
    """
    return jax.jit(
        step,
        in_shardings=(states, batches),
        out_shardings=(states, metrics),
        donate_argnums=0,
        compiler_options=compiler_options(metrics.mesh) or None,
    )

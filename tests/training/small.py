"""The smallest model that has every kind of parameter, and batches for it without files."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from rave_jax.attention import Rave
from rave_jax.batch import Batch, Kind, Patches, Role, TokenInfo
from rave_jax.data.pipeline import Rows
from rave_jax.families.config import TextConfig, VlmConfig
from rave_jax.families.qwen2_5_vl.config import VisionConfig
from rave_jax.models.config import ModelOptions
from rave_jax.models.vlm import Vlm
from rave_jax.parallel.mesh import MeshConfig, make_mesh
from rave_jax.parallel.rows import batch_axis, global_batch
from rave_jax.parallel.sharding import use_mesh
from rave_jax.training.optimizers import OptimizerConfig
from rave_jax.training.session import Session, make_session
from rave_jax.training.state import TrainState
from rave_jax.training.step import StepMetrics

VOCAB, LENGTH, PATCHES = 64, 24, 16
CONFIG = VlmConfig(
    text=TextConfig(vocab_size=VOCAB, hidden_size=32, head_dim=8, mlp_size=64),
    vision=VisionConfig(
        depth=1,
        hidden_size=32,
        num_heads=2,
        mlp_size=64,
        patch_size=4,
        window_size=16,
        full_attention_blocks=(0,),
        out_size=32,
    ),
    family="qwen2_5_vl",
)
OPTIONS = ModelOptions(mechanisms=(Rave(rank=4),))


TEXT = dataclasses.replace(CONFIG, text=dataclasses.replace(CONFIG.text, num_layers=1), vision=None)


def abstract_model(config: VlmConfig = CONFIG, options: ModelOptions = OPTIONS) -> Vlm:
    """The model without its numbers."""
    return jax.eval_shape(lambda key: Vlm(config, options, key=key), jax.random.key(0))


def rows_of(batch: Batch, start: int, stop: int) -> Batch:
    """Some rows of a batch."""
    return jax.tree.map(lambda axis, x: x[(slice(None),) * axis + (slice(start, stop),)], batch_axis(), batch)


def random_batch(seed: int, rows: int, patches: int = PATCHES) -> Batch:
    """One image of 2x2 visual tokens and a few target tokens in each row, more of them in some rows."""
    rng = np.random.default_rng(seed)
    zero = np.zeros((rows, LENGTH), np.int32)
    visual = np.zeros((rows, LENGTH), bool)
    visual[:, 2:6] = True
    info = TokenInfo(*[zero] * len(TokenInfo._fields))._replace(
        document=zero + 1,
        offset=np.broadcast_to(np.arange(LENGTH, dtype=np.int32), (rows, LENGTH)),
        kind=np.where(visual, Kind.VISUAL, Kind.TEXT).astype(np.int32),
        role=np.full_like(zero, Role.QUESTION),
        image=visual.astype(np.int32),
    )
    weights = np.zeros((rows, LENGTH), np.float32)
    for row in range(rows):
        weights[row, -2 - row % 5 : -1] = 1
    tokens = rng.integers(0, VOCAB, (rows, LENGTH)).astype(np.int32)
    index = zero.copy()
    index[:, 2:6] = np.arange(4)
    place = np.stack(np.divmod(np.arange(patches, dtype=np.int32), 4), axis=-1)
    return Batch(
        tokens=tokens,
        targets=np.roll(tokens, -1, 1),
        loss_weights=weights,
        info=info,
        positions=np.broadcast_to(np.arange(LENGTH, dtype=np.int32), (3, rows, LENGTH)),
        visual_index=index,
        patches=Patches(
            pixels=rng.integers(0, 256, (rows, patches, CONFIG.vision.patch_width)).astype(np.uint8),
            frame=np.ones((rows, patches), np.int32),
            place=np.broadcast_to(place, (rows, patches, 2)),
            window=np.ones((rows, patches), np.int32),
            source=np.zeros((rows, 0, 0), np.int32),
            weight=np.zeros((rows, 0, 0), np.float32),
        ),
    )


class RandomSource:
    """A data pipeline of `random_batch`, a pure function of the step."""

    def __init__(self, rows: int, poison: int | None = None, patches: int = PATCHES):
        """`poison`: the batch of this step has an infinite loss weight. `patches` 0 is for `TEXT`."""
        self._rows, self._poison, self._patches = rows, poison, patches

    def load(self, step: int, start: int, stop: int) -> Rows:
        """Rows start..stop-1 of `step`."""
        batch = random_batch(step, self._rows, self._patches)
        if step == self._poison:
            batch.loss_weights[0, -2] = np.inf
        return Rows(rows_of(batch, start, stop))

    def count(self, rows: Rows) -> None:
        """Nothing is skipped."""

    def state(self, step: int) -> dict[str, Any]:
        """JSON-ready."""
        return {"step": step}


def session_of(
    optimizer: OptimizerConfig,
    mesh: Mesh | None = None,
    *,
    steps: int = 4,
    rows: int = 8,
    config: VlmConfig = CONFIG,
    options: ModelOptions = OPTIONS,
    z_loss: float = 0.0,
) -> Session:
    """A session on one device, or on a mesh."""
    mesh = mesh or make_mesh(MeshConfig(), jax.devices()[:1])
    model = abstract_model(config, options)
    return make_session(model, optimizer, mesh, steps=steps, rows=rows, loss_chunk=10, z_loss=z_loss)


@functools.cache
def first_values(config: VlmConfig = CONFIG, options: ModelOptions = OPTIONS) -> tuple[np.ndarray, ...]:
    """The numbers of a new model from a seed, made once for every session of it: an initialiser is long to compile."""
    make = jax.jit(lambda key: jax.tree.leaves(Vlm(config, options, key=key)))
    return tuple(np.asarray(x) for x in make(jax.random.key(0)))


def first_state(session: Session, config: VlmConfig = CONFIG, options: ModelOptions = OPTIONS) -> TrainState:
    """State before the first step, from a seed."""
    with use_mesh(session.mesh):
        shardings = session.graph.shardings(session.mesh)
        values = dict(zip(session.graph.names, first_values(config, options), strict=True))
        placed = {
            name: jax.make_array_from_callback(x.shape, shardings[name], lambda at, x=x: np.array(x[at]))
            for name, x in values.items()
        }
        return session.first_state(placed)


def run_steps(
    session: Session, state: TrainState, steps: range, rows: int = 8, patches: int = PATCHES
) -> tuple[TrainState, list[StepMetrics]]:
    """The state after some steps on random batches, and the metrics of each on the host."""
    metrics = []
    with use_mesh(session.mesh):
        for step in steps:
            whole = random_batch(step, rows, patches)
            batch = global_batch(lambda span, b=whole: rows_of(b, span.start, span.stop), session.mesh, rows)
            state, measured = session.step(state, batch)
            metrics.append(jax.device_get(measured))
    return state, metrics

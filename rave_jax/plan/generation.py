"""What answering takes on a topology, by formula: weights and cache of a chip, what fits, and bytes of a decoding step.

Nothing is compiled here. An entry of the cache is the key and value of one token in every layer that attends; layers of
the gated delta rule keep one float32 state for a row. Kv heads are split over the mesh axis `tensor` where it divides
them, rows over the axes that split rows. A decoding step reads the weights of its chip once, without the tower and
the embedding table, and of each row what the mechanisms say that a query reads (`rave_jax/attention/cost.py`). What
axes that split rows hold of these weights elsewhere comes over the links between chips in every step.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
from jax.sharding import AbstractMesh

from rave_jax.attention import LayerReading, PicturesBefore
from rave_jax.checkpoint.target import abstract_model, parameter_shardings
from rave_jax.config import require
from rave_jax.families.config import VlmConfig
from rave_jax.models.config import attention_dims
from rave_jax.models.parameters import named_parameters, param_axes
from rave_jax.parallel.mesh import abstract_mesh
from rave_jax.parallel.rows import row_ways
from rave_jax.parallel.sharding import Axes, names_of, partition_spec
from rave_jax.plan.chips import Topology
from rave_jax.plan.program import largest_row
from rave_jax.training.config import TrainConfig

ROOM = 0.9
"""Share of a chip's HBM that weights and cache may take; the rest is for a chunk of a prompt that is read."""
MOST_CONTEXT = 2**31 - 1


@dataclasses.dataclass(frozen=True)
class Answering:
    """Bytes are those of one chip.

    Args:
        weights: in the number type that the model computes in.
        decoded: those of them that a decoding step reads.
        gathered: weights that come from other chips in a decoding step.
        entry: of the cache, for one token.
        state: of a row, whatever its length.
        context, visual: tokens of a row, and the visual tokens among them.
        row_ways: into how many parts the mesh splits the rows.
        rows: the most rows of this context that fit, over all chips; 0 where the weights alone do not.
        longest: the longest context of one row for each part of the mesh; 0 likewise.
        dense, sparse: bytes that a decoding step of these rows reads, without mechanisms that skip, and with them.
        capacity, bandwidth: of the chip's HBM.
        links: bytes/s of all links of a chip to its neighbours, in one direction.
    """

    weights: int
    decoded: int
    gathered: int
    entry: float
    state: int
    context: int
    visual: int
    row_ways: int
    rows: int
    longest: int
    dense: float
    sparse: float
    capacity: int
    bandwidth: float
    links: float

    def as_json(self) -> dict[str, Any]:
        """As plain values."""
        return dataclasses.asdict(self) | {"what": "by formula, not compiled and not measured"}

    def lines(self) -> Iterator[str]:
        """For a terminal."""
        gib = 2**30
        yield "answering, by formula, not compiled and not measured:"
        weights = f"weights on a chip {self.weights / gib:.2f} GiB of {self.capacity / gib:.0f}"
        yield f"  {weights}; cache of a token {self.entry:,.0f} bytes"
        if not self.rows:
            yield f"  not one row of {self.context:,} tokens fits beside the weights into {ROOM:.0%} of the chip"
            return
        yield f"  rows of {self.context:,} tokens, {self.visual:,} of them visual: at most {self.rows:,} at once"
        yield f"  one row for each of {self.row_ways} parts of the mesh: at most {self.longest:,} tokens"
        yield f"  a step of these rows reads {self.dense / gib:.4g} GiB: at least {self.dense / self.bandwidth:.4g} s"
        if self.sparse < self.dense:
            read = f"{self.sparse / gib:.4g} GiB: at least {self.sparse / self.bandwidth:.4g} s"
            yield f"  without the visual tokens that mechanisms skip, {read}"
        if self.gathered:
            come = f"{self.gathered / gib:.4g} GiB: at least {self.gathered / self.links:.4g} s"
            yield f"  weights that come from other chips in a step, {come}; with mesh.tensor alone none do"


def answering(config: TrainConfig, vlm: VlmConfig, topology: Topology) -> Answering:
    """Plan generation with the model of a config, its largest row as context, on its mesh.

    Raises:
        ConfigError: the mesh does not fit the devices, or context is split over an axis.
    """
    require(config.mesh.context == 1, "mesh.context", config.mesh.context, "1: the cache is not split over it")
    mesh = abstract_mesh(config.mesh, topology.devices)
    model, text, size = abstract_model(vlm, config.model), vlm.text, config.model.compute.itemsize
    params = named_parameters(model)
    places = parameter_shardings(model, mesh)
    held = {path: math.prod(places[path].shard_shape(param.shape)) * size for path, param in params.items()}
    weights = sum(held.values())
    table = set() if text.tie_embeddings else {"embed.weight"}
    aside = {path for path in held if path.startswith("vision.")} | table
    decoded = {path: count for path, count in held.items() if path not in aside}
    gathered = sum(
        count * (_ways_of_rows(param_axes(params[path]), params[path].shape, mesh) - 1)
        for path, count in decoded.items()
    )
    neighbours = sum(min(size - 1, 2) for size in topology.shape)
    dims, split = attention_dims(text), mesh.shape["tensor"]
    split = split if text.num_kv_heads % split == 0 else 1
    entry = 2 * text.num_kv_heads * text.head_dim * size * len(text.attention_layers) / split
    state = 0 if text.delta is None else _state(vlm)
    context, patches = largest_row(config)
    visual = min(context, patches // (vlm.vision.merge_unit if vlm.vision else 1))
    room, ways = topology.chip.hbm * ROOM - weights, row_ways(mesh)
    each = max(0, int(room // (entry * context + state)))
    skipped = _read(config, vlm, visual, size, dims) / split
    of_row = entry * context + state
    return Answering(
        weights=weights,
        decoded=sum(decoded.values()),
        gathered=gathered,
        entry=entry,
        state=state,
        context=context,
        visual=visual,
        row_ways=ways,
        rows=each * ways,
        longest=min(MOST_CONTEXT, max(0, int((room - state) // entry))),
        dense=sum(decoded.values()) + each * of_row,
        sparse=sum(decoded.values()) + each * (of_row - entry * visual + skipped),
        capacity=topology.chip.hbm,
        bandwidth=topology.chip.hbm_bandwidth,
        links=max(1, neighbours) * topology.chip.link_bandwidth,
    )


def _ways_of_rows(axes: Axes, shape: tuple[int, ...], mesh: AbstractMesh) -> int:
    """Into how many parts axes that split rows too split a parameter."""
    spec = partition_spec(axes, shape, mesh)
    split = [entry for name, entry in zip(axes, spec, strict=True) if name in ("embed", "expert_embed")]
    return math.prod(mesh.shape[axis] for entry in split for axis in names_of(entry))


def _state(vlm: VlmConfig) -> int:
    delta = vlm.text.delta
    assert delta is not None
    return 4 * len(delta.layers) * delta.value_heads * delta.key_dim * delta.value_dim


def _read(config: TrainConfig, vlm: VlmConfig, visual: int, size: int, dims: Any) -> float:
    """Bytes that one query reads of so many visual tokens in whole regions, in all layers, on one chip of no split."""
    text, regions = vlm.text, config.model.layout.regions
    tokens = visual if regions is None else regions.tokens
    count = max(1, visual // max(1, tokens))
    before = PicturesBefore(np.array([visual]), np.full(count, tokens), np.ones((1, count), bool))
    each = 2 * text.num_kv_heads * text.head_dim * size * visual
    layers = dict.fromkeys(text.attention_layers, float(each))
    for mechanism in config.model.mechanisms:
        # A layer with other regions than those of the layout reads all visual keys.
        if mechanism.layout.regions not in (None, regions):
            continue
        found: LayerReading | None = mechanism.reading(before, dims, size)
        for n in mechanism.layers_of(text.attention_layers) if found is not None else ():
            assert found is not None
            layers[n] = float(found.bytes[0])
    return sum(layers.values())

"""The layers of the decoder: pre-norm attention or the gated delta rule, then SwiGLU or experts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from rave_jax import attention
from rave_jax.attention import ChoiceSums, Features, LayerKeys, Statistics, StoredStates, WantedStatistics
from rave_jax.attention.plan import LayeredConfig
from rave_jax.attention.rotation import Rope, Rotation, rotate
from rave_jax.attention.tokens import Deciding
from rave_jax.batch import TokenInfo
from rave_jax.families.config import LayerKind, TextConfig
from rave_jax.kernels.attention import MaskCodes
from rave_jax.models import extra_mlp, lora
from rave_jax.models.config import ModelOptions, attention_dims
from rave_jax.models.delta import Delta, DeltaState, InTurn
from rave_jax.models.experts import Choice, Experts, RouterSums, router_sums
from rave_jax.models.forward import HIDDEN, Want
from rave_jax.models.layers import Linear, RmsNorm, SwiGlu
from rave_jax.parallel import context
from rave_jax.parallel.residual import Stream
from rave_jax.parallel.sharding import shard
from rave_jax.typing import Array, Bool, Float, Int


class LayerCache(NamedTuple):
    """What a whole layer run keeps, which of its layers is meant, and how many regions a row has room for."""

    stored: LayerKeys | StoredStates
    layer: Int[Array, ""]
    regions: int


class Situation(NamedTuple):
    """What all layers of a run share: where queries and keys stand and who may see whom."""

    rotation: Rotation
    rope: Rope
    """What the rotation was made from."""
    codes: MaskCodes
    info_q: TokenInfo
    info_k: TokenInfo
    entries: Any
    """Where the queries' tokens go in the cache; None without one."""
    queries: Int[Array, "B N"] | None
    progress: Float[Array, ""] | None
    wanted: Int[Array, "B N"] | None = None
    """Tokens, by index, of which alone the layer's output is wanted; None: of all."""
    unit: Int[Array, "B T"] | None = None
    """As in `Embedded`."""
    turn: InTurn | None = None
    """How layers with the gated delta rule go through the tokens; None where none is in the run."""
    deciding: Deciding | None = None
    """Which tokens decide about which; None where none leaves after the run."""
    statistics: WantedStatistics | None = None
    """As in `Want`."""


class Projected(NamedTuple):
    """What attention projects of tokens: features, and what their heads' outputs are multiplied by, or None."""

    features: Features
    gate: Float[Array, "B T H h"] | None


class Asked(NamedTuple):
    """What of a layer was asked for beside its output; None of what it does not have."""

    attention: Float[Array, "B N H S"] | None
    losses: dict[str, Float[Array, ""]]
    chosen: Bool[Array, "B N H R"] | None
    inputs: Float[Array, "B T D"] | None = None
    """What entered the layer."""
    router: RouterSums | None = None
    gates: Float[Array, "B T H"] | None = None
    """What heads' outputs were multiplied by."""
    statistics: Statistics | None = None
    """Sums over rows and columns of the map."""
    received: Float[Array, "B T"] | None = None
    """As in `AttentionOutput`."""
    kept: Bool[Array, "B T"] | None = None
    """Which tokens stay behind the layer; None where all do."""
    choices: ChoiceSums | None = None
    """Sums over what queries chose."""


class LayerOutput(NamedTuple):
    """What a layer gives."""

    x: Float[Array, "B T D"]
    asked: Asked


class Attention(nnx.Module):
    """Projections of one attention layer; what happens between them is `attention.attend`.

    With an output gate the query projection has [query, gate] of each head side by side, as checkpoints have it.
    """

    def __init__(self, config: TextConfig, *, dtype: jnp.dtype, key: jax.Array):
        H, K, h, D = attention_dims(config)
        keys = jax.random.split(key, 4)
        query_axes, kv_axes = ("heads", "head_dim", "embed"), ("kv_heads", "head_dim", "embed")
        bias, query = config.qkv_bias, (H, h)
        if config.output_gate:
            query, query_axes = (H, 2, h), ("heads", None, "head_dim", "embed")
        self.query = Linear(query, (D,), query_axes, bias=bias, dtype=dtype, key=keys[0])
        self.key = Linear((K, h), (D,), kv_axes, bias=bias, dtype=dtype, key=keys[1])
        self.value = Linear((K, h), (D,), kv_axes, bias=bias, dtype=dtype, key=keys[2])
        self.output = Linear((D,), (H, h), ("embed", "heads", "head_dim"), bias=False, dtype=dtype, key=keys[3])
        if config.qk_norm:
            self.query_norm, self.key_norm = norm(h, config, dtype), norm(h, config, dtype)
        self.qk_norm = config.qk_norm
        self.output_gate = config.output_gate

    def project(self, x: Float[Array, "B T D"], hidden: Float[Array, "B T D"], at: Situation) -> Projected:
        """q, k, v of the tokens in x, q, k before RoPE, and the gate; `hidden` is x before its norm."""
        both, gate = self.query(x), None
        if self.output_gate:
            both, gate = both[..., 0, :], jax.nn.sigmoid(both[..., 1, :])
        q0 = shard(both, "batch", "length", "heads", None)
        k0 = self.keys(x)
        v = shard(self.value(x), "batch", "length", "kv_heads", None)
        if self.qk_norm:
            q0 = self.query_norm(q0)
        q, k = rotate(q0, at.rotation), rotate(k0, at.rotation)
        return Projected(Features(q, k, v, q0, k0, hidden, at.rope), gate)

    def keys(self, x: Float[Array, "B T D"]) -> Float[Array, "B T K h"]:
        """Keys before RoPE."""
        keys = shard(self.key(x), "batch", "length", "kv_heads", None)
        return self.key_norm(keys) if self.qk_norm else keys

    def gated(self, heads: Float[Array, "B T H h"], gate: Float[Array, "B T H h"] | None) -> Float[Array, "B T H h"]:
        """What goes into the output projection."""
        return heads if gate is None else heads * gate


class DecoderLayer(nnx.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(
        self,
        config: TextConfig,
        kind: LayerKind,
        mechanisms: Sequence[LayeredConfig],
        options: ModelOptions,
        key: jax.Array,
    ):
        dtype, D = options.params, config.hidden_size
        # Mechanisms take keys of their own, so that a model with and one without start with equal weights.
        keys = jax.random.split(key, 4)
        self.attention = Attention(config, dtype=dtype, key=keys[0])
        self.mlp = _mlp(config, kind, dtype, keys[1])
        self.attention_norm, self.mlp_norm = norm(D, config, dtype), norm(D, config, dtype)
        self.mechanisms = attention.build_mechanisms(mechanisms, attention_dims(config), keys[2])
        attention.check_kernels(self.mechanisms, options.attention, attention_dims(config))
        self.implementation = options.attention
        self.stream = Stream(options.sequence_parallel)
        self.max_regions = options.layout.max_regions
        self.extra_mlp = nnx.data(extra_mlp.made(options.extra_mlp, D, dtype, keys[3]))
        lora.attach(self, "decoder.", options.lora, dtype, keys[3])

    def __call__(
        self,
        x: Float[Array, "B T D"],
        at: Situation,
        want: Want = HIDDEN,
        dealt: bool = False,
    ) -> LayerOutput:
        """The layer on whole rows.

        Args:
            x: hidden states that enter it.
            at: what all layers of a run share.
            want: its `losses`, `gates` and `choices` say which of its mechanisms' are given too.
            dealt: do x and what `at` says of queries stand in `context.dealt_order`? Keys are put in the order of rows.
        """
        found, gate = self.attention.project(self.stream.gathered(self.attention_norm(x)), x, at)
        keys = attention.remember(self.mechanisms, found)
        keys = jax.tree.map(context.gather_in, keys) if dealt else keys
        seen = attention.attend(
            found,
            keys._replace(summary=attention.summarise(self.mechanisms, found, at.info_q.region, self.max_regions)),
            at.codes,
            at.info_q,
            at.info_k,
            self.mechanisms,
            implementation=self.implementation,
            queries=at.queries,
            losses=want.losses,
            gates=want.gates,
            statistics=at.statistics,
            regions=self.max_regions,
            progress=at.progress,
            deciding=at.deciding,
            choices=want.choices,
            dealt=dealt,
        )
        heads = self.attention.gated(seen.out, gate)
        out, choice = _after(self, self.attention.output, x, heads, at.wanted)
        router = router_sums(choice, at.info_q.document > 0) if want.losses and choice is not None else None
        asked = Asked(seen.attention, seen.losses, seen.chosen, None, router, seen.gates, seen.statistics)
        asked = asked._replace(received=seen.received, choices=seen.choices)
        return LayerOutput(out, asked)

    def extend(self, x: Float[Array, "B T D"], at: Situation, cache: LayerCache) -> tuple[LayerOutput, LayerKeys]:
        """The layer on tokens that follow what a cache holds, and what the run's layers keep, with the tokens in it."""
        assert not isinstance(cache.stored, StoredStates)
        found, gate = self.attention.project(self.stream.gathered(self.attention_norm(x)), x, at)
        seen, stored = cache.stored.attend(
            found,
            attention.remember(self.mechanisms, found),
            cache.layer,
            at.entries,
            at.codes,
            at.info_q,
            at.info_k,
            self.mechanisms,
            regions=cache.regions,
            implementation=self.implementation,
            queries=at.queries,
            progress=at.progress,
            deciding=at.deciding,
        )
        heads = self.attention.gated(seen.out, gate)
        out, _ = _after(self, self.attention.output, x, heads, at.wanted)
        asked = Asked(seen.attention, seen.losses, seen.chosen, received=seen.received)
        return LayerOutput(out, asked), stored


class DeltaLayer(nnx.Module):
    """x + delta(norm(x)), then x + mlp(norm(x)). No mechanism changes it."""

    def __init__(self, config: TextConfig, kind: LayerKind, options: ModelOptions, key: jax.Array):
        assert config.delta is not None
        dtype, D = options.params, config.hidden_size
        keys = jax.random.split(key, 4)
        self.delta = Delta(config.delta, D, eps=config.rms_norm_eps, dtype=dtype, key=keys[0])
        self.mlp = _mlp(config, kind, dtype, keys[1])
        self.delta_norm, self.mlp_norm = norm(D, config, dtype), norm(D, config, dtype)
        self.mechanisms = nnx.List([])
        self.stream = Stream(options.sequence_parallel)
        self.extra_mlp = nnx.data(extra_mlp.made(options.extra_mlp, D, dtype, keys[3]))
        lora.attach(self, "decoder.", options.lora, dtype, keys[3])

    def __call__(
        self,
        x: Float[Array, "B T D"],
        at: Situation,
        want: Want = HIDDEN,
        dealt: bool = False,
    ) -> LayerOutput:
        """The layer on whole rows. If `want` asks for losses, those of its router are computed too; it has no gates and
        no choices, and reads tokens in the order of rows."""
        assert not dealt
        out, choice, _ = self._read(x, at, self.delta.empty_state(x.shape[0], x.dtype))
        router = router_sums(choice, at.info_q.document > 0) if want.losses and choice is not None else None
        return LayerOutput(out, Asked(None, {}, None, router=router))

    def extend(self, x: Float[Array, "B T D"], at: Situation, cache: LayerCache) -> tuple[LayerOutput, StoredStates]:
        """The layer on tokens that follow those whose state a cache holds, and the states with the tokens in them."""
        assert isinstance(cache.stored, StoredStates)
        out, _, state = self._read(x, at, cache.stored.of_layer(cache.layer))
        return LayerOutput(out, Asked(None, {}, None)), cache.stored.with_layer(cache.layer, state)

    def _read(
        self, x: Float[Array, "B T D"], at: Situation, state: DeltaState
    ) -> tuple[Float[Array, "B N D"], Choice | None, DeltaState]:
        assert at.turn is not None
        heads, state = self.delta(self.stream.gathered(self.delta_norm(x)), at.turn, state)
        return *_after(self, self.delta.output, x, heads, at.wanted), state


Layer = DecoderLayer | DeltaLayer


def norm(width: int, config: TextConfig, dtype: jnp.dtype) -> RmsNorm:
    """A norm of the decoder."""
    return RmsNorm(width, eps=config.rms_norm_eps, dtype=dtype, plus_one=config.norm_plus_one)


def _after(
    layer: Layer,
    output: Linear,
    x: Float[Array, "B T D"],
    heads: Float[Array, "B T H h"],
    wanted: Int[Array, "B N"] | None,
) -> tuple[Float[Array, "B N D"], Choice | None]:
    """What a layer makes of x and of what its heads read, for the wanted tokens; and the experts of each."""
    if wanted is not None:
        x, heads = attention.pick(x, wanted), attention.pick(heads, wanted)
    heads = shard(heads, "batch", "length", "heads", None)
    x = layer.stream.placed(x + layer.stream.scattered(output(heads)))
    hidden, mlp = layer.mlp_norm(x), layer.mlp
    if layer.extra_mlp is not None:
        x = x + layer.extra_mlp(hidden)
    if isinstance(mlp, Experts):
        choice = mlp.choose(hidden)
        return layer.stream.placed(x + mlp(hidden, choice, layer.stream)), choice
    added = layer.stream.scattered(mlp(layer.stream.gathered(hidden)))
    return layer.stream.placed(x + added), None


def _mlp(config: TextConfig, kind: LayerKind, dtype: jnp.dtype, key: jax.Array) -> SwiGlu | Experts:
    """What a layer of this kind does behind its attention."""
    if kind.mlp == "experts":
        assert config.experts is not None
        return Experts(config.experts, config.hidden_size, dtype=dtype, key=key)
    return SwiGlu(config.hidden_size, config.mlp_size, bias=False, dtype=dtype, key=key)

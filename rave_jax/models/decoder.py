"""The text decoder: pre-norm layers of attention or the gated delta rule and SwiGLU, in runs of equal layers."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from rave_jax import attention
from rave_jax.attention import Cache, CacheType, ChoiceSums, Features, Keys, RegionMemory, ShortKeys, StoredStates
from rave_jax.attention.plan import LayeredConfig
from rave_jax.attention.rotation import Rope
from rave_jax.batch import TokenInfo
from rave_jax.config import ConfigError, require
from rave_jax.families.config import LayerKind, TextConfig
from rave_jax.kernels.attention import MaskCodes
from rave_jax.models import leaving
from rave_jax.models.config import ModelOptions, attention_dims, window_mechanisms
from rave_jax.models.decoder_layer import Asked, DecoderLayer, DeltaLayer, Layer, LayerCache, Situation, norm
from rave_jax.models.delta import STATE_AXES, DeltaState, in_turn
from rave_jax.models.experts import Experts, balance_loss
from rave_jax.models.forward import HIDDEN, Embedded, Output, Want
from rave_jax.models.rope import text_frequencies, text_rotation
from rave_jax.models.stack import LayerRun
from rave_jax.parallel import context
from rave_jax.parallel.residual import Stream
from rave_jax.parallel.sharding import current_mesh
from rave_jax.typing import Array, Float, Int

ROUTER = "router"
"""Name of the routers' loss."""


class Decoder(nnx.Module):
    """All layers and the final norm. Global layer n stands in the layer run with start <= n < stop.

    Behind each of the first `deep_layers` layers, features of the pictures are added to the visual tokens (DeepStack,
    arXiv 2406.04334). These layers have runs of their own.
    """

    def __init__(self, config: TextConfig, options: ModelOptions, deep_layers: int = 0, *, key: jax.Array):
        mechanisms = (*window_mechanisms(config), *options.laid_out, *options.context_mechanisms)
        keys = jax.random.split(key, config.num_layers)
        leaves = next((one.called for one in options.mechanisms if one.drops), None)
        if config.delta is not None and leaves is not None:
            raise ConfigError(
                f"mechanisms: {leaves} lets tokens leave, and every token writes to the state of this model's layers "
                f"with the gated delta rule; remove {leaves}"
            )
        if config.delta is not None and options.context is not None:
            expected = "None: layers with the gated delta rule let a context token read all that stands before it"
            require(False, "context", options.context, expected)
        layer_kinds = config.layer_kinds
        kinds = [(kind, n < deep_layers) for n, kind in enumerate(layer_kinds)]
        plans = attention.plan_layer_runs(
            mechanisms, config.num_layers, options.scan_layers, kinds, config.attention_layers
        )

        def made(kind: LayerKind, chosen: Sequence[LayeredConfig]) -> Callable[[jax.Array], Layer]:
            if kind.mixer == "delta":
                return functools.partial(DeltaLayer, config, kind, options)
            return functools.partial(DecoderLayer, config, kind, chosen, options)

        def run(start: int, stop: int, chosen: Sequence[LayeredConfig]) -> LayerRun[Layer]:
            try:
                return LayerRun(start, stop, made(layer_kinds[start], chosen), keys)
            except ConfigError as error:
                layers = f"layer {start}" if stop - start == 1 else f"layers {start} to {stop - 1}"
                raise ConfigError(f"decoder {layers}: {error}") from error

        self.layer_runs = nnx.List(run(*plan) for plan in plans)
        self.norm = norm(config.hidden_size, config, options.params)
        self.experts = config.experts
        self.balances = config.experts is not None and config.experts.balance > 0
        self.head_dim, self.rotary_dim = config.head_dim, config.rotary_dim
        self.attention_dims = attention_dims(config)
        self.hidden_size = config.hidden_size
        self.rope_theta = config.rope_theta
        self.mrope_section = config.mrope_section
        self.rope_scaling = config.rope_scaling
        self.mrope_interleaved = config.mrope_interleaved
        self.remat = options.remat
        self.layout = options.layout
        self.implementation = options.attention

    def __call__(
        self, tokens: Embedded, info: TokenInfo, positions: Int[Array, "3 B T"], want: Want = HIDDEN
    ) -> Output:
        """Whole rows at once, causal inside each document.

        Args:
            tokens: as they are embedded.
            info, positions: of the tokens.
            want: what is asked for beside hidden states.
        """
        base, own = attention.causal_codes(info), _indices(info)
        dealt, found, left = self._deals(want, info.document.shape[1]), [], None
        x = context.deal(tokens.x) if dealt else tokens.x
        unit = context.dealt(tokens.unit) if dealt and tokens.unit is not None else tokens.unit
        for run in self.layer_runs:
            at = self._situation(
                run, base, info, info, positions, own=own, queries=want.queries, progress=want.progress, dealt=dealt
            )._replace(unit=unit, statistics=want.statistics)
            at = leaving.with_left(at, left)
            if leaving.drops(run):
                at = at._replace(deciding=leaving.deciding(info, own, left))

            def body(layer: Layer, x: Array, deep: Array | None, at: Situation) -> tuple[Array, Asked]:
                out = layer(x, at, want, dealt)
                after = _added_deep(out.x, deep, at, layer.stream)
                return after, leaving.decided(layer, after, at, out.asked._replace(inputs=x if want.inputs else None))

            x, of_run = run.scan(body, x, _deep_of(run, tokens), at, self.remat)
            left = leaving.left_behind(left, of_run)
            found.append(of_run)
        out = _output(self.norm(context.gather_in(x) if dealt else x), found)
        out = out._replace(choices=_choices(self.layer_runs, found) if want.choices else None)
        routers = [jax.tree.map(lambda x: jnp.sum(x, axis=0), one.router) for one in found if one.router is not None]
        if self.experts is None or not self.balances or not routers:
            return out
        balance = balance_loss(jax.tree.map(lambda *x: sum(x), *routers), self.experts)
        return out._replace(losses=out.losses | {ROUTER: balance})

    def _deals(self, want: Want, tokens: int) -> bool:
        """Are queries dealt out to the devices of the mesh axis `context`? Not where something is asked for by the
        places of tokens, nor beside layers that read tokens in turn or let them leave."""
        by_place = want.queries is not None or want.inputs or want.gates or want.statistics is not None
        in_turn = any(isinstance(run.layers, DeltaLayer) or leaving.drops(run) for run in self.layer_runs)
        parts = context.ways()
        return parts > 1 and tokens % (2 * parts) == 0 and not by_place and not in_turn

    def loss_weights(self, info: TokenInfo) -> dict[str, Float[Array, ""]]:
        """What the sums of the mechanisms' and routers' losses over these rows are divided by, by name; empty where
        none has any."""
        total: dict[str, Array] = {}
        for run in self.layer_runs:
            layers = run.stop - run.start
            for mechanism in run.layers.mechanisms:
                total = _added(total, {name: layers * x for name, x in mechanism.loss_weights(info).items()})
            if self.balances and isinstance(run.layers.mlp, Experts):
                total = _added(total, {ROUTER: layers * jnp.sum(info.document > 0, dtype=jnp.float32)})
        return total

    def extend[C: Cache](
        self,
        tokens: Embedded,
        info: TokenInfo,
        positions: Int[Array, "3 B T"],
        cache: C,
        region_offset: Int[Array, "B T"] | None = None,
        wanted: Int[Array, "B N"] | None = None,
        want: Want = HIDDEN,
        lengths: tuple[leaving.Sizes, ...] | None = None,
    ) -> tuple[Output, C]:
        """Tokens that follow what the cache holds, one document per row, padding on the right.

        Where `looks_ahead` names mechanisms, the tokens that one may see have to be given with it or before it; of
        pictures they stand in the order of their offsets.

        Args:
            tokens: as they are embedded.
            info, positions: of the tokens.
            cache: what came before. Rows of a cache without regions for which `cache.index` + T is beyond its size are
                not written.
            region_offset: with regions, how many tokens of its region stand before each token; None where no token is
                visual.
            wanted: tokens, by index, whose hidden states are wanted; None: all. Where the last layer stands apart, what
                follows its attention is computed for them alone.
            want: what is asked for beside hidden states. A single token whose attention is asked for reads all visual
                keys, also where it would otherwise read the regions that it chose and nothing else.
            lengths: for each layer behind which tokens leave, in order, the sizes that what stays of a row is gathered
                into; the last holds it in any case. The cache has so many entries there. None: those of the cache.

        Returns:
            what was asked for, with hidden states of the wanted tokens after the final norm and the attention of
            queries over the entries of `cache.codes`, and the cache with the tokens in it.

        Raises:
            ValueError: losses, gates, statistics or sums over choices are asked for.
        """
        if want.losses or want.gates or want.choices or want.statistics is not None:
            raise ValueError(
                "losses, gates or choices of mechanisms were asked for beside a cache, or statistics of the map; they "
                "are of whole documents: call forward"
            )
        entered = cache.admit(info, region_offset, self._summaries_of_nothing)
        base = attention.cached_codes(info, entered.info)
        kept, regions = list(entered.cache.layer_runs), cache.num_regions
        found, total = [], info.document.shape[1]
        here = leaving.Here(tokens.x, None)
        sizes = iter(lengths or ())
        for n, run in enumerate(self.layer_runs):
            picks = run is self.layer_runs[-1] and run.stop - run.start == 1 and _deep_of(run, tokens) is None
            at = self._situation(
                run,
                base,
                info,
                entered.info,
                positions,
                own=entered.own,
                entries=entered.entries,
                queries=want.queries,
                progress=want.progress,
            )._replace(unit=tokens.unit, wanted=wanted if picks else None)
            # A token alone decides about none.
            if leaving.drops(run) and total > 1:
                at = at._replace(deciding=leaving.deciding(info, entered.own, None))
            through = functools.partial(self._through, run, _deep_of(run, tokens), want.inputs, regions)
            if isinstance(kept[n], ShortKeys):
                here, kept[n], of_run = leaving.through_short(through, here, kept[n], at, entered.own)
            else:
                x, kept[n], of_run = through(here.x, kept[n], at)
                here = here._replace(x=x)
            if leaving.drops(run):
                here = leaving.gathered(here, of_run, info, next(sizes, None))
            found.append(of_run)
            wanted = None if picks else wanted
        x = here.whole(total) if wanted is None else attention.pick(here.x, here.places(wanted, total))
        return _output(self.norm(x), found), entered.cache.with_layers(tuple(kept))

    def _through(
        self,
        run: LayerRun[Layer],
        deep: Float[Array, "L B U D"] | None,
        inputs: bool,
        regions: int,
        x: Float[Array, "B T D"],
        kept: Any,
        at: Situation,
    ) -> tuple[Float[Array, "B T D"], Any, Asked]:
        """A layer run beside what it keeps."""

        def body(layer: Layer, carry: Any, each: Any, at: Situation) -> tuple[Any, Any]:
            x, kept = carry
            out, kept = layer.extend(x, at, LayerCache(kept, each[0], regions))
            asked = out.asked._replace(inputs=x if inputs else None)
            # A carry keeps its shape.
            if at.wanted is not None:
                return (x, kept), (asked, out.x)
            after = _added_deep(out.x, each[1], at, layer.stream)
            return (after, kept), (leaving.decided(layer, after, at, asked), None)

        # The keys ride in the carry: each layer writes its new ones in place, nothing else is copied.
        numbers = jnp.arange(run.stop - run.start, dtype=jnp.int32)
        (x, kept), (of_run, last) = run.scan(body, (x, kept), (numbers, deep), at, "none")
        return x if last is None else last[0], kept, of_run

    def _summaries_of_nothing(self, regions: int) -> list[Any]:
        """What the routers of each run's layers say of regions without a token [L,1,R,K,...]; None without keys."""
        return [self._summary_of_nothing(run, regions) for run in self.layer_runs]

    def _summary_of_nothing(self, run: LayerRun[Layer], regions: int) -> Any:
        """What the router of each layer says of regions without a token [L,1,R,K,...]."""

        def of_layer(layer: Layer) -> Any:
            x = self._zeros(1, 1, jnp.dtype(jnp.float32))
            return attention.summarise(layer.mechanisms, x, jnp.zeros((1, 1), jnp.int32), regions)

        return jax.vmap(of_layer)(run.layers)

    @property
    def looks_ahead(self) -> tuple[str, ...]:
        """Names of the mechanisms that let a token see later ones."""
        declared = [m.declared for run in self.layer_runs for m in run.layers.mechanisms]
        return tuple(dict.fromkeys(one.called for one in declared if one is not None and one.looks_ahead))

    def stays(self, visual: int, pictures: int) -> tuple[leaving.Sizes, ...]:
        """For each layer behind which tokens leave, in order, bounds of how many visual tokens of a prompt are left."""
        found = []
        for run in filter(leaving.drops, self.layer_runs):
            declared = [m.declared for m in run.layers.mechanisms if m.declared is not None and m.declared.drops]
            bounds = declared[0].stays(visual, pictures) if declared else None
            found.append((visual,) if bounds is None else bounds)
            visual = found[-1][-1]
        return tuple(found)

    def reaches(self, reach: int, lengths: Sequence[leaving.Sizes] | None) -> tuple[int, ...] | None:
        """Entries of each layer run, where `reach` are those of the first and `lengths` as in `extend`."""
        if lengths is None:
            return None
        after = [reach, *(sizes[-1] for sizes in lengths)]
        return tuple(after[count] for count in self._drops_before())

    def _drops_before(self) -> list[int]:
        """How many drops there are before each layer run."""
        return [0, *itertools.accumulate(map(leaving.drops, self.layer_runs))][:-1]

    def empty_cache(
        self,
        rows: int,
        size: int,
        kind: CacheType,
        dtype: jnp.dtype,
        regions_in: RegionMemory = "device",
        max_kept: int | None = None,
    ) -> Cache:
        """A cache for `rows` documents of at most `size` tokens, of which at most `max_kept` (None: all) are there
        behind the first drop; `dtype` is the compute type.

        Raises:
            ConfigError: `regions_in` is "host", and no mechanism keeps regions or the mesh has several devices; or the
                attention is "pallas_tpu", whose kernel for decoding cannot read such regions.
        """
        regions = self.layout.regions
        if regions_in == "host":
            require(regions is not None, "regions_in", regions_in, "device: no mechanism of the model keeps regions")
            mesh = current_mesh()
            # A region is found by its number among all rows and heads, which no device of several has to itself.
            ways = 1 if mesh is None else mesh.size
            require(ways == 1, "regions_in", regions_in, f"device on a mesh of {ways} devices")
        if regions is not None:
            attention.check_decoding(self.implementation, regions.tokens, self.head_dim, kind, dtype, regions_in)

        def keys(layer: DecoderLayer, entries: int) -> Keys:
            x = self._zeros(rows, entries, dtype)
            found = attention.remember(layer.mechanisms, x)
            region = jnp.zeros((rows, entries), jnp.int32)
            summary = attention.summarise(layer.mechanisms, x, region, self.layout.max_regions)
            return found._replace(summary=summary)

        def states(layer: DeltaLayer) -> DeltaState:
            return layer.delta.empty_state(rows, dtype)

        def shapes(run: LayerRun[Layer], entries: int) -> Keys | StoredStates:
            if isinstance(run.layers, DeltaLayer):
                return StoredStates(jax.eval_shape(jax.vmap(states), run.layers), STATE_AXES)
            return jax.eval_shape(jax.vmap(functools.partial(keys, entries=entries)), run.layers)

        behind = [count > 0 for count in self._drops_before()]
        sizes = [max_kept if after and max_kept is not None else size for after in behind]
        cache = attention.empty_cache(tuple(map(shapes, self.layer_runs, sizes)), kind)
        if regions is None:
            return attention.with_short_keys(cache, behind)
        entries = self.layout.max_regions * regions.tokens
        kept = [shapes(run, entries) for run in self.layer_runs]
        far = tuple(None if isinstance(one, StoredStates) else one for one in kept)
        return attention.empty_region_cache(cache, far, kind, regions.tokens, regions_in)

    def _zeros(self, rows: int, tokens: int, dtype: jnp.dtype) -> Features:
        """Features of nothing, for their shapes."""
        H, K, h, _ = self.attention_dims
        q, k = jnp.zeros((rows, tokens, H, h), dtype), jnp.zeros((rows, tokens, K, h), dtype)
        hidden = jnp.zeros((rows, tokens, self.hidden_size), dtype)
        rope = Rope(jnp.zeros((3, rows, tokens), jnp.int32), jnp.zeros(self.rotary_dim // 2))
        return Features(q, k, k, q, k, hidden, rope)

    def _situation(
        self,
        run: LayerRun[Layer],
        base: MaskCodes,
        info_q: TokenInfo,
        info_k: TokenInfo,
        positions: Int[Array, "3 B T"],
        *,
        own: Int[Array, "B T"],
        entries: Any = None,
        queries: Int[Array, "B N"] | None = None,
        progress: Float[Array, ""] | None = None,
        dealt: bool = False,
    ) -> Situation:
        # The hooks `positions` and `mask` read no parameters, so the stacked mechanisms may answer for all layers.
        mechanisms = run.layers.mechanisms
        placed = attention.positions(mechanisms, info_q, info_k, own, positions)
        codes = attention.mask_codes(mechanisms, info_q, info_k, base)
        if dealt:
            placed, info_q = context.dealt(placed, axis=2), jax.tree.map(context.dealt, info_q)
            codes = codes._replace(**{name: context.dealt(getattr(codes, name)) for name in ("lo", "hi", "open_q")})
        rotation = text_rotation(
            placed,
            self.rotary_dim,
            self.rope_theta,
            self.mrope_section,
            interleaved=self.mrope_interleaved,
            scaling=self.rope_scaling,
        )
        rope = Rope(placed, text_frequencies(self.rotary_dim, self.rope_theta, self.rope_scaling))
        delta = isinstance(run.layers, DeltaLayer)
        turn = in_turn(info_q, by_region=self.layout.regions is not None) if delta else None
        return Situation(rotation, rope, codes, info_q, info_k, entries, queries, progress, turn=turn)


def _deep_of(run: LayerRun[Layer], tokens: Embedded) -> Float[Array, "L B U D"] | None:
    """What is added behind each layer of a run; None where nothing is."""
    of_layers = tokens.deep[run.start : run.stop]
    return jnp.stack(of_layers) if of_layers else None


def _added_deep(
    x: Float[Array, "B T D"], deep: Float[Array, "B U D"] | None, at: Situation, stream: Stream
) -> Float[Array, "B T D"]:
    """What a layer gives, with the features of their merge unit added to the visual tokens."""
    if deep is None or at.unit is None:
        return x
    # Tokens that get nothing have a unit beyond the last, which is filled with zeros and has no gradient.
    of_tokens = jnp.take_along_axis(deep, at.unit[..., None], axis=1, mode="fill", fill_value=0)
    return stream.placed(x + of_tokens.astype(x.dtype))


def _output(hidden: Float[Array, "B N D"], found: Sequence[Asked]) -> Output:
    """What all layers gave, run by run with the layer axis in front."""

    def joined(parts: Sequence[Array | None]) -> Array | None:
        some = [x for x in parts if x is not None]
        return jnp.concatenate(some) if some else None

    total: dict[str, Array] = {}
    for one in found:
        total = _added(total, jax.tree.map(jnp.sum, one.losses))
    attention, chosen, inputs, gates = (
        joined([getattr(one, name) for one in found]) for name in ("attention", "chosen", "inputs", "gates")
    )
    counted = [one.statistics for one in found if one.statistics is not None]
    statistics = jax.tree.map(lambda *x: jnp.concatenate(x), *counted) if counted else None
    return Output(hidden, attention, chosen, total, inputs, gates, statistics)


def _choices(runs: Sequence[LayerRun[Layer]], found: Sequence[Asked]) -> dict[str, ChoiceSums]:
    """Sums over choices [L] by the mechanism that routes; of several of one class, the first layer is part of each
    name."""
    by_mechanism: list[tuple[Any, str, int, list[ChoiceSums]]] = []
    for run, one in zip(runs, found, strict=True):
        router = attention.router_of(run.layers.mechanisms)
        if one.choices is None or router is None:
            continue
        same = next((sums for config, _, _, sums in by_mechanism if config == router.declared), None)
        if same is None:
            same = []
            by_mechanism.append((router.declared, attention.name_of(router), run.start, same))
        same.append(one.choices.over_rows())
    called = [name for _, name, _, _ in by_mechanism]
    return {
        name if called.count(name) == 1 else f"{name}/{start}": jax.tree.map(lambda *x: jnp.concatenate(x), *sums)
        for _, name, start, sums in by_mechanism
    }


def _indices(info: TokenInfo) -> Int[Array, "B T"]:
    """Where each token lies in its row."""
    return jnp.broadcast_to(jnp.arange(info.document.shape[1], dtype=jnp.int32), info.document.shape)


def _added(total: dict[str, Array], found: dict[str, Array]) -> dict[str, Array]:
    """Sums by name."""
    return total | {name: total[name] + x if name in total else x for name, x in found.items()}

"""One attention, whatever the mechanisms: the hooks in their order around one kernel."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp

from rave_jax.attention.base import Features, KeyFactor, Keys, Mechanism, Parts, overrides
from rave_jax.attention.choices import ChoiceSums, choice_sums
from rave_jax.attention.heads import head_gates, scaled
from rave_jax.attention.merge import log_weights, merged, partition_of, parts_of, with_factor
from rave_jax.attention.queries import QueryChoice, attention_of, choice_of_queries, chosen_regions
from rave_jax.attention.reweigh import reweighed, reweighing, with_reweighed
from rave_jax.attention.scores import Scores, by_view, scores_of, without_gradient
from rave_jax.attention.statistics import Statistics, WantedStatistics, statistics_of
from rave_jax.attention.tokens import Deciding, received
from rave_jax.batch import TokenInfo
from rave_jax.kernels import attention as attention_kernels
from rave_jax.kernels import routed
from rave_jax.kernels.attention import Implementation, MaskCodes
from rave_jax.kernels.routed import Routing, of_regions
from rave_jax.typing import Array, Bool, Float, Int


class AttentionOutput(NamedTuple):
    """What `attend` gives: heads' outputs, of the asked-for queries the attention over all keys and which regions
    they chose (None if not asked, or where nothing routes), the sums of the mechanisms' losses by name (none if not
    asked), what heads were multiplied by (None if not asked), sums over rows and columns of the map (None if not
    asked), the attention that tokens get from those that decide about them (None where no mechanism ranks by it), and
    sums over what all queries choose (None if not asked, or where nothing routes).
    """

    out: Float[Array, "B T H h"]
    attention: Float[Array, "B N H S"] | None
    losses: dict[str, Float[Array, ""]]
    chosen: Bool[Array, "B N H R"] | None = None
    gates: Float[Array, "B T H"] | None = None
    statistics: Statistics | None = None
    received: Float[Array, "B T"] | None = None
    choices: ChoiceSums | None = None


def positions(
    mechanisms: Sequence[Mechanism],
    info_q: TokenInfo,
    info_k: TokenInfo,
    own: Int[Array, "B T"],
    positions: Int[Array, "3 B T"],
) -> Int[Array, "3 B T"]:
    """Rotary positions after every mechanism's `positions` hook; `own` is where queries stand among the keys."""
    for mechanism in mechanisms:
        positions = mechanism.positions(info_q, info_k, own, positions)
    return positions


def mask_codes(mechanisms: Sequence[Mechanism], info_q: TokenInfo, info_k: TokenInfo, codes: MaskCodes) -> MaskCodes:
    """Mask codes after every mechanism's `mask` hook, whatever the order they are listed in: last comes who owns the
    order or `hi`, from which the others count."""
    for mechanism in sorted(mechanisms, key=lambda mechanism: bool({"order", "hi"} & {*mechanism.OWNS})):
        codes = mechanism.mask(info_q, info_k, codes)
    return codes


def remember(mechanisms: Sequence[Mechanism], x: Features) -> Keys:
    """The tokens of x as keys, with what each mechanism wants kept of them."""
    return Keys(x.k, x.v, tuple(mechanism.remember(x) for mechanism in mechanisms))


def router_of(mechanisms: Sequence[Mechanism]) -> Mechanism | None:
    """The one mechanism that routes, or None."""
    return next((mechanism for mechanism in mechanisms if overrides(mechanism, "route")), None)


def summarise(mechanisms: Sequence[Mechanism], x: Features, region: Int[Array, "B T"], regions: int) -> Any:
    """What the layer's router wants of the R regions that these tokens are in; None where nothing routes."""
    router = router_of(mechanisms)
    return None if router is None else router.summarise(x, region, regions)


def combine(mechanisms: Sequence[Mechanism], old: Any, new: Any) -> Any:
    """What `summarise` gives of the tokens of both."""
    router = router_of(mechanisms)
    return None if router is None else router.combine(old, new)


def attend(
    x: Features,
    keys: Keys,
    codes: MaskCodes,
    info_q: TokenInfo,
    info_k: TokenInfo,
    mechanisms: Sequence[Mechanism],
    *,
    implementation: Implementation = "auto",
    queries: Int[Array, "B N"] | None = None,
    losses: bool = False,
    gates: bool = False,
    statistics: WantedStatistics | None = None,
    regions: int = 0,
    progress: Float[Array, ""] | None = None,
    deciding: Deciding | None = None,
    choices: bool = False,
    dealt: bool = False,
) -> AttentionOutput:
    """Attention of one layer under its mechanisms.

    Args:
        x: projected features of the queries' tokens; q is rotated already.
        keys: all keys that may be seen, rotated, those of the tokens in x among them.
        codes: mask codes after the `mask` hooks.
        info_q, info_k: token codes of the queries and of the keys (the same without a cache).
        mechanisms: of this layer; what has one owner is claimed once (`check_owners`).
        implementation: kernel backend.
        queries: queries, by index, whose attention over all keys is wanted. Costs O(N S).
        losses: are the mechanisms' losses wanted? Costs one run of the kernel for each key group they ask for.
        gates: is it wanted what the outputs of heads are multiplied by?
        statistics: which sums over rows and columns of the map are wanted; None: none.
        regions: R, the most regions that keys can be in.
        progress: of the training run, 0 to 1, for what is scheduled; None is its end.
        deciding: which tokens decide about which, where some may leave after the layer.
        choices: are sums wanted over what queries choose?
        dealt: do queries stand in `context.dealt_order`?

    Returns:
        outputs before the output projection, the queries' attention and the regions they chose, the losses and the
        gates.
    """
    losses = losses and any(overrides(mechanism, "losses") for mechanism in mechanisms)
    scores = scores_of(x, keys, codes, info_q, info_k, mechanisms)
    partition = partition_of(mechanisms, x, keys.remembered, info_k, losses)
    groups, factor = partition.key_groups, key_factor(mechanisms, x, info_q, info_k)
    routing = routing_of(mechanisms, x, keys, info_q, info_k, scores, regions, progress)
    attention = attention_kernels.attention if routing is None else functools.partial(routed.attention, routing=routing)
    of_views = [
        attention(
            view.q,
            view.k,
            keys.v,
            view.codes,
            view.terms.parts,
            scale=view.scale,
            key_bias=view.terms.per_key,
            key_groups=groups,
            implementation=implementation,
        )
        for view in by_view(scores)
    ]
    out, lse = of_views[0] if len(of_views) == 1 else merged(*(jnp.stack(x, 2) for x in zip(*of_views, strict=True)))
    weights, found = None, {}
    if groups is not None or factor is not None or losses:
        if groups is None:
            out, lse = out[:, :, None], lse[:, :, None]
        if factor is not None:
            of = None if groups is None else groups.of
            out, lse = with_factor(out, lse, keys.v, scores, factor, of, routing)
        if groups is not None:
            weights = log_weights(mechanisms, x, parts_of(lse, partition), partition, info_q, info_k)
        lse = lse if weights is None else lse + weights
        found = named_losses(mechanisms, x, parts_of(lse, partition), info_q, info_k) if losses else {}
        out, lse = (out[:, :, 0], lse[:, :, 0]) if groups is None else merged(out, lse)
    changing = reweighing(mechanisms)

    def choice_of(some: Int[Array, "B N"]) -> QueryChoice | None:
        return None if routing is None else choice_of_queries(scores, some, routing)

    def rows_of(some: Int[Array, "B N"], choice: QueryChoice | None = None) -> Float[Array, "B N H S"]:
        rows = attention_of(scores, lse, some, factor, groups, weights, choice or choice_of(some))
        return reweighed(changing, rows, some, info_q, info_k) if changing else rows

    out = with_reweighed(changing, rows_of, out, keys.v, info_q) if changing else out
    gate = head_gates(mechanisms, x, out, info_q)
    of_heads = jnp.broadcast_to(jnp.float32(1) if gate is None else gate, out.shape[:3]) if gates else None
    out = scaled(out, gate)
    given = AttentionOutput(out, None, found, None, of_heads)
    if statistics is not None:
        given = given._replace(statistics=statistics_of(rows_of, info_q, info_k, statistics, scores.q.shape[2]))
    if deciding is not None and any(mechanism.RANKS for mechanism in mechanisms):
        of, norm, key, parts, logs = without_gradient((scores, lse, factor, groups, weights))
        ranked = received(lambda some: attention_of(of, norm, some, key, parts, logs), deciding)
        given = given._replace(received=ranked)
    if choices and routing is not None:
        given = given._replace(choices=choice_sums(scores, info_k, routing, dealt=dealt))
    if queries is None:
        return given
    asked = choice_of(queries)
    wanted = rows_of(queries, asked)
    router = router_of(mechanisms)
    of_layout = asked is not None and router is not None and not router.OWN_REGIONS
    chosen = chosen_regions(asked, scores.q.shape[2]) if of_layout else None
    return given._replace(attention=wanted, chosen=chosen)


def routing_of(
    mechanisms: Sequence[Mechanism],
    x: Features,
    keys: Keys,
    info_q: TokenInfo,
    info_k: TokenInfo,
    scores: Scores,
    regions: int,
    progress: Float[Array, ""] | None,
) -> Routing | None:
    """What the layer's router says, with the terms of the scores where its rule asks for it; None where nothing
    routes."""
    router = router_of(mechanisms)
    if router is None:
        return None
    own = next(n for n, one in enumerate(mechanisms) if one is router)
    summary = router.pool(keys, own, info_k) if router.OWN_REGIONS else keys.summary
    routing = router.route(x, summary, info_q, info_k, scores.codes, regions, progress)
    if routing is None or not routing.rule.with_bias:
        return routing
    bias = of_regions(scores.terms.parts, routing.routes.keys, regions)
    return routing._replace(routes=routing.routes._replace(bias=bias))


def key_factor(mechanisms: Sequence[Mechanism], x: Features, info_q: TokenInfo, info_k: TokenInfo) -> KeyFactor | None:
    """What the one mechanism that may change a key's weight says."""
    said = [mechanism.factor(x, info_q, info_k) for mechanism in mechanisms if overrides(mechanism, "factor")]
    return said[0] if said else None


def named_losses(
    mechanisms: Sequence[Mechanism], x: Features, parts: Sequence[Parts], info_q: TokenInfo, info_k: TokenInfo
) -> dict[str, Float[Array, ""]]:
    """What all mechanisms say, summed where they use one name."""
    total: dict[str, Array] = {}
    for mechanism, own in zip(mechanisms, parts, strict=True):
        for name, value in mechanism.losses(x, own, info_q, info_k).items():
            total[name] = total.get(name, jnp.zeros((), jnp.float32)) + value
    return total

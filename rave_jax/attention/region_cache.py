"""Attention against a cache that keeps visual keys region by region (`RegionCache`).

A chunk of a prompt meets all keys, and its text chooses regions by the mask, as in training. A single token of text, as
in decoding, reads text and context keys, the descriptors, and the regions that it chose: nothing else.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from rave_jax.attention import kv_cache
from rave_jax.attention.attend import AttentionOutput, attend, combine, router_of, routing_of, summarise
from rave_jax.attention.base import Features, Keys, Mechanism, overrides
from rave_jax.attention.cache import CacheType, RegionMemory
from rave_jax.attention.checks import name_of
from rave_jax.attention.heads import head_gates, scaled
from rave_jax.attention.kv_cache import Quantised, StoredKeys, quantise
from rave_jax.attention.merge import merged
from rave_jax.attention.scores import scores_of
from rave_jax.attention.tokens import Deciding
from rave_jax.batch import TokenInfo
from rave_jax.config import ConfigError
from rave_jax.kernels import attention as attention_kernels
from rave_jax.kernels.attention import Implementation, MaskCodes
from rave_jax.kernels.attention.base import tile_allow
from rave_jax.kernels.routed import HostRegions, Stack, choice_of, gather_attention
from rave_jax.kernels.routed.gather import pallas_tpu
from rave_jax.typing import Array, Float, Int

log = logging.getLogger(__name__)


def check_decoding(
    implementation: Implementation, tokens: int, head_dim: int, kind: CacheType, dtype: jnp.dtype, place: RegionMemory
) -> None:
    """Refuse a cache by regions that the kernel for decoding cannot read where it alone is asked for.

    Args:
        implementation: of all attention.
        tokens: m, entries of a region.
        head_dim: of keys and values.
        kind, place: of the cache.
        dtype: compute type.

    Raises:
        ConfigError: names the reason.
    """
    if implementation != "pallas_tpu":
        return
    against = pallas_tpu.against_shapes(tokens, (head_dim, head_dim), dtype)
    if place == "host":
        against = "regions_in is 'host'"
    elif kind != "compute" and jnp.dtype(kind) != dtype:
        against = f"the cache is {kind}, and the model computes in {dtype}"
    if against is not None:
        raise ConfigError(
            f"attention is 'pallas_tpu', whose kernel cannot decode over regions: {against}; set attention to "
            "'auto' or 'xla'"
        )


class ChunkEntries(NamedTuple):
    """Where the tokens of a chunk go: an entry of the row's other part, or of its regions (None: no token is visual);
    numbers beyond them go nowhere."""

    near: Int[Array, "B T"]
    far: Int[Array, "B T"] | None


class StoredRegions(NamedTuple):
    """What is kept of a run's layers: keys [L,B,K,R*m,...], and of each region what the layer's router summarised
    [L,B,K,R,...], from which its descriptors come: they are never computed twice."""

    keys: StoredKeys
    summary: Any


class LayerRegions(NamedTuple):
    """What the layers of a run keep beside each other: keys of no region, and of regions."""

    near: StoredKeys
    far: StoredRegions

    def attend(
        self,
        x: Features,
        keys: Keys,
        layer: Int[Array, ""],
        entries: ChunkEntries,
        codes: MaskCodes,
        info_q: TokenInfo,
        info_k: TokenInfo,
        mechanisms: Sequence[Mechanism],
        *,
        regions: int,
        implementation: Implementation,
        queries: Int[Array, "B N"] | None = None,
        progress: Float[Array, ""] | None = None,
        deciding: Deciding | None = None,
    ) -> tuple[AttentionOutput, LayerRegions]:
        """As `LayerKeys` says. `codes` and `info_k` have the entries of no region first."""
        near, far = _write_at(self.near, layer, entries.near, keys), self.far
        if entries.far is None:
            stored, summary = LayerRegions(near, far), _summary(far, layer)
            against = against_gathering(mechanisms, x, queries, progress)
            if against is None:
                out = _gathered(x, stored, layer, codes, info_q, info_k, mechanisms, regions, implementation)
                return AttentionOutput(scaled(out, head_gates(mechanisms, x, out, info_q)), None, {}), stored
            _say_once(f"decoding reads all visual keys: {against}")
        else:
            summary = combine(mechanisms, _summary(far, layer), summarise(mechanisms, x, info_q.region, regions))
            kept = jax.tree.map(
                lambda old, new: jax.lax.dynamic_update_index_in_dim(old, jnp.swapaxes(new, 1, 2), layer, 0),
                far.summary,
                summary,
            )
            far = StoredRegions(_write_at(far.keys, layer, entries.far, keys), kept)
            stored = LayerRegions(near, far)
        dtype = x.q.dtype
        both = joined(kv_cache.read(near, layer, dtype), kv_cache.read(far.keys, layer, dtype))
        seen = attend(
            x,
            both._replace(summary=summary),
            codes,
            info_q,
            info_k,
            mechanisms,
            implementation=implementation,
            queries=queries,
            regions=regions,
            progress=progress,
        )
        return seen, stored


def joined(near: Any, far: Any) -> Any:
    """Arrays [B,S,...] of both parts: entries of no region first."""
    return jax.tree.map(lambda a, b: jnp.concatenate([a, b], axis=1), near, far)


def against_gathering(
    mechanisms: Sequence[Mechanism],
    x: Features,
    queries: Int[Array, "B N"] | None = None,
    progress: Float[Array, ""] | None = None,
) -> str | None:
    """Why a decoding step has to read all visual keys, in a sentence; None where it does not."""
    if queries is not None:
        return "the attention of queries over all keys is asked for"
    if progress is not None:
        return "a training run that has not ended may choose more regions"
    if x.q.shape[1] != 1:
        return f"{x.q.shape[1]} tokens are read at once"
    if router_of(mechanisms) is None:
        return "nothing routes in the layer"
    for mechanism in mechanisms:
        reads = any(overrides(mechanism, hook) for hook in ("score", "merge", "factor", "route", "reweigh"))
        if reads and not _skips_keys(mechanism):
            return f"{name_of(mechanism)} needs them"
    return None


def _skips_keys(mechanism: Mechanism) -> bool:
    return mechanism.declared is not None and mechanism.declared.skips_keys


@functools.cache
def _say_once(line: str) -> None:
    log.info(line)


def _gathered(
    x: Features,
    stored: LayerRegions,
    layer: Int[Array, ""],
    codes: MaskCodes,
    info_q: TokenInfo,
    info_k: TokenInfo,
    mechanisms: Sequence[Mechanism],
    regions: int,
    implementation: Implementation,
) -> Float[Array, "B 1 H h"]:
    """One query: keys of no region by one kernel, those of the chosen regions by another, merged by log-sum-exp."""
    S = stored.near.k[0].shape[3] if isinstance(stored.near.k, Quantised) else stored.near.k.shape[3]

    def part(cut: slice) -> tuple[MaskCodes, TokenInfo]:
        mine = codes._replace(order=codes.order[:, cut], open_k=codes.open_k[:, cut])
        return mine, jax.tree.map(lambda code: code[:, cut], info_k)

    (near_codes, near_info), (far_codes, far_info) = part(slice(None, S)), part(slice(S, None))
    near = kv_cache.read(stored.near, layer, x.q.dtype)
    scores = scores_of(x, near, near_codes, info_q, near_info, mechanisms)
    text = attention_kernels.attention(
        scores.q,
        scores.k,
        near.v,
        near_codes,
        scores.terms.parts,
        scale=scores.scale,
        implementation=implementation,
    )
    # Keys and values of regions are read where they lie.
    nothing = jnp.zeros((*far_info.document.shape, x.k.shape[2], 0), x.q.dtype)
    far = Keys(nothing, nothing, kv_cache.read_remembered(stored.far.keys, layer), _summary(stored.far, layer))
    scores = scores_of(x, far, far_codes, info_q, far_info, mechanisms)
    routing = routing_of(mechanisms, x, far, info_q, far_info, scores, regions, None)
    assert routing is not None
    routes, rule, _ = routing
    choice = choice_of(None, far_codes, routes, rule, scores.scale)

    def by_region(keys: Array) -> Array:
        """[B,R*m,K,...] as [B,K,R,m,...], which is how it is stored."""
        keys = jnp.swapaxes(keys, 1, 2)
        return keys.reshape(*keys.shape[:2], regions, -1, *keys.shape[3:])

    def stack(kept: Array | Quantised | HostRegions) -> Stack:
        """What all layers keep [L,B,K,R*m,...], of which this one is meant."""

        def by_region(x: Array | HostRegions) -> Any:
            return x if isinstance(x, HostRegions) else x.reshape(*x.shape[:3], regions, -1, *x.shape[4:])

        if isinstance(kept, Quantised):
            return Stack(by_region(kept.values), by_region(kept.scale), layer)
        return Stack(by_region(kept), None, layer)

    # Every entry of a region is a key that `real` says of; switches of keys come beside it.
    terms = tuple(
        term.map_queries(lambda x: x[:, 0]).replace(
            w=None if term.w is None else by_region(term.w),
            key={name: by_region(x) for name, x in term.key.items()},
            key_on=None if term.key_on is None else term.key_on.reshape(term.key_on.shape[0], regions, -1),
        )
        for term in scores.terms.parts
    )
    picture = gather_attention(
        x.q[:, 0],
        stack(stored.far.keys.k),
        stack(stored.far.keys.v),
        # A window may cut a region.
        tile_allow(far_codes).reshape(far_info.document.shape[0], regions, -1),
        choice.chosen[..., 0, :],
        rule.most(regions),
        terms,
        scale=scores.scale,
        implementation=implementation,
    )
    out, lse = (jnp.stack([a, b[:, None]], axis=2) for a, b in zip(text, picture, strict=True))
    return merged(out, lse)[0]


def _summary(far: StoredRegions, layer: Int[Array, ""]) -> Any:
    """What the layer's router summarised [B,R,K,...]."""
    return jax.tree.map(
        lambda x: jnp.swapaxes(jax.lax.dynamic_index_in_dim(x, layer, keepdims=False), 1, 2), far.summary
    )


def _write_at(stored: StoredKeys, layer: Array, entries: Int[Array, "B T"], new: Keys) -> StoredKeys:
    """`stored` with the keys `new` [B,T,K,...] of one layer in `entries`; those beyond it are dropped.

    Raises:
        ValueError: the entries lie in host memory.
    """
    rows = jnp.arange(entries.shape[0])[:, None]

    def pack(x: Array, like: Any) -> Any:
        return quantise(x) if isinstance(like, Quantised) else x

    def put(old: Array | HostRegions, x: Array) -> Array:
        if isinstance(old, HostRegions):
            raise ValueError("visual tokens are read where their rows' regions lie on the device: `take` brings them")
        return old.at[layer, rows, :, entries].set(x.astype(old.dtype), mode="drop")

    packed = StoredKeys(pack(new.k, stored.k), pack(new.v, stored.v), new.remembered)
    return jax.tree.map(put, stored, packed, is_leaf=lambda x: isinstance(x, HostRegions))

"""What the queries of whole rows choose, as sums that training adds up: has routing collapsed?

Query i may choose from n_i regions and chooses k_i of them. It has a choice where n_i is more than it would choose once
a schedule has ended. Of each row at most `MEASURED` queries with a choice are measured, evenly spaced among them. Of
those, and of a head (or of a kv head whose query heads choose together):

    read       mean of k_i / n_i over queries
    latest     mean of |chosen_i and latest_i| / k_i over queries    latest_i: the k_i candidates that end last
    unused     share of the regions that some query could choose, and none chose
    effective  mean over documents of exp(H_d) / n_d                 H_d = - sum_r p_r log p_r

p_r is the share of the choices of document d that fell on region r, and n_d counts the regions of d that some query
could choose. exp(H_d) is the perplexity of p. Figures are means over heads, and over what they count in all rows and
layers. Gradients are not for these.

By chance alone `latest` is `read`. If all queries choose the same regions, `effective` falls to about `read`, and
`unused` rises to about 1 - `read`. All are ours.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rave_jax.attention.gaze.places import bounds
from rave_jax.attention.queries import choice_of_queries
from rave_jax.attention.scores import Scores, without_gradient
from rave_jax.batch import TokenInfo
from rave_jax.kernels.routed import RouteRule, Routing
from rave_jax.kernels.routed.base import budget, candidates, choose
from rave_jax.parallel import context
from rave_jax.typing import Array, Bool, Float, Int

MEASURED = 128
"""Most queries of a row that are measured. Ranking them again costs 128 / T of what ranking T queries cost."""


class ChoiceSums(NamedTuple):
    """Float32 sums over the measured queries of each row, for E heads or kv heads; `over_rows` leaves the layers.

    Fields:
        queries: how many were measured.
        read, latest: sums over queries.
        regions: how many some query could choose.
        unused: those of them that none chose.
        documents: how many have a measured query.
        effective: sum over documents.
    """

    queries: Float[Array, "*L B"]
    read: Float[Array, "*L B"]
    latest: Float[Array, "*L B E"]
    regions: Float[Array, "*L B"]
    unused: Float[Array, "*L B E"]
    documents: Float[Array, "*L B"]
    effective: Float[Array, "*L B E"]

    def over_rows(self) -> ChoiceSums:
        """Sums over rows and means over heads, of each layer [L]."""
        by_head = {name: jnp.mean(getattr(self, name), axis=-1) for name in ("latest", "unused", "effective")}
        return jax.tree.map(lambda x: jnp.sum(x, axis=1), self._replace(**by_head))


def choice_sums(scores: Scores, info_k: TokenInfo, routing: Routing, *, dealt: bool) -> ChoiceSums:
    """The sums of one layer.

    Args:
        scores: of all pairs.
        info_k: of the keys.
        routing: what the choice is made from, and how.
        dealt: do queries stand in `context.dealt_order`?
    """
    scores, routing = without_gradient((scores, routing))
    routes, rule, _ = routing
    R = routes.first.shape[1]
    found = candidates(scores.codes, routes)
    choosing = jnp.sum(found, axis=-1) > budget(found, None, rule)
    queries, real = _spaced(choosing[:, 0, 0], dealt)
    choice = choice_of_queries(scores, queries, routing).choice
    B, K, N = choice.chosen.shape[:3]
    chosen = choice.chosen.reshape(B, K * N, *choice.chosen.shape[3:]) & real[:, None, :, None]
    mine = choice.candidate
    last = jnp.broadcast_to(routes.last[:, None, None, None].astype(jnp.float32), mine.shape)
    latest = choose(last, mine, routes.dense, RouteRule(rule.top_k)).chosen[:, 0]
    possible = mine[:, 0, 0] & real[..., None]
    # Not counted in what heads chose: devices that split heads would have to tell each other.
    budgets = jnp.where(real, budget(mine, routes.dense, rule)[:, 0, 0], 0).astype(jnp.float32)
    counts = _count(possible, -1)
    shares = _count(chosen & latest, -1) / jnp.maximum(budgets, 1.0)[:, None]
    used, available = _count(chosen, 2), jnp.any(possible, axis=1)
    document = jnp.maximum(bounds(info_k.document, routes.keys, R)[1], 0)
    seen, effective = _effective(used, available, document, info_k.document.shape[1] + 1)
    return ChoiceSums(
        queries=_count(real, -1),
        read=jnp.sum(budgets / jnp.maximum(counts, 1.0), axis=-1),
        latest=jnp.sum(shares, axis=-1),
        regions=_count(available, -1),
        unused=_count(available[:, None] & (used == 0), -1),
        documents=_count(seen, -1),
        effective=effective,
    )


def figures(sums: Mapping[str, ChoiceSums]) -> dict[str, Float[Array, ""]]:
    """`NAME/read`, `NAME/latest`, `NAME/unused`, `NAME/effective`, and `NAME/least_effective` of the layer where it is
    least, from sums [L] by name; NaN where no query has a choice."""
    found = {}
    for name, of in sums.items():
        total = jax.tree.map(jnp.sum, of)
        by_layer = jnp.where(of.documents > 0, of.effective / of.documents, jnp.inf)
        found[f"{name}/read"] = total.read / total.queries
        found[f"{name}/latest"] = total.latest / total.queries
        found[f"{name}/unused"] = total.unused / total.regions
        found[f"{name}/effective"] = total.effective / total.documents
        found[f"{name}/least_effective"] = jnp.where(total.documents > 0, jnp.min(by_layer), jnp.nan)
    return found


def _spaced(choosing: Bool[Array, "B T"], dealt: bool) -> tuple[Int[Array, "B M"], Bool[Array, "B M"]]:
    """Queries by index, evenly spaced in the row among those that choose, and which of them are real."""
    T = choosing.shape[1]
    place = np.argsort(context.dealt_order(T, context.ways())) if dealt else np.arange(T)
    passed = jnp.cumsum(choosing[:, place], axis=1)
    numbers, total = jnp.arange(min(MEASURED, T)), passed[:, -1:]
    wanted = jnp.where(total > len(numbers), numbers * total // len(numbers), numbers)
    at = jnp.sum(passed[:, None] <= wanted[..., None], axis=-1)
    return jnp.asarray(place)[jnp.minimum(at, T - 1)], at < T


def _effective(
    used: Float[Array, "B E R"], available: Bool[Array, "B R"], document: Int[Array, "B R"], documents: int
) -> tuple[Bool[Array, "B N"], Float[Array, "B E"]]:
    """Which documents were seen, and exp(H) / n summed over them."""

    def of_documents(x: Float[Array, "B R E"]) -> Float[Array, "B N E"]:
        return jax.vmap(lambda rows, at: jax.ops.segment_sum(rows, at, documents))(x, document)

    used = jnp.moveaxis(used, 1, 2)
    total = of_documents(used)
    logs = of_documents(used * jnp.log(jnp.maximum(used, 1.0)))
    regions = of_documents(available[..., None].astype(jnp.float32))
    safe = jnp.maximum(total, 1.0)
    shares = jnp.exp(jnp.log(safe) - logs / safe) / jnp.maximum(regions, 1.0)
    return regions[..., 0] > 0, jnp.sum(jnp.where(regions > 0, shares, 0.0), axis=1)


def _count(x: Bool[Array, "..."], axis: int) -> Float[Array, "..."]:
    return jnp.sum(x, axis=axis, dtype=jnp.float32)

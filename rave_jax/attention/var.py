"""VAR: attention that lies on sinks goes to what the picture shows, in rows and heads that look at the picture.

Source: arXiv 2503.03321 and its released code. With x_j the hidden state of token j that enters the layer, D the sink
dimensions of the base model and P the attention of one row and head:

    phi(x) = max over c in D of |x_c| / sqrt(mean_c x_c^2 + 1e-6)         j is a sink if phi(x_j) > tau
    m_S, m_N, m_V = sums of P over the sinks (text and visual), the visual tokens that are none, all visual tokens
    where m_V >= summ and m_N / m_V >= rho:
        P'_j = (1 - move) P_j  on sinks      P'_j = (1 + move m_S / m_N) P_j  on visual tokens that are none

so that rows still add up to 1. The factors are constant within four key groups, so no map is made. It needs
no training.

Certain: phi, tau and the test, from the code. Not certain: what the paper's p = 0.6 is. A survey of it says the share
that is moved; the code keeps the share p, and moves 0.4. `move_fraction` says it in words, and its default is what the
code does. The code also bounds the share of visual sinks by rho, which is our 1 - rho; at 0.5 they are one.

Our reading: the rows are text tokens that see a picture, which all generated tokens do. The source finds sinks in the
prompt and keeps that set while it decodes, so no token of an answer is a sink here, in earlier turns and in whole rows
too. "No visual sink in the layer, nothing changes" is asked of what a row sees, so that no row reads what comes later.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp

from rave_jax.attention.base import AttentionDims, Features, Mechanism, Parts
from rave_jax.attention.declared import ALL, MechanismConfig, NamedLayers
from rave_jax.attention.merge import log_sum_exp
from rave_jax.batch import Kind, Role, TokenInfo
from rave_jax.config import check_fields, require
from rave_jax.kernels.attention import KeyGroups
from rave_jax.typing import Array, Bool, Float

OTHER, TEXT_SINK, VISUAL, VISUAL_SINK, COUNT = 0, 1, 2, 3, 4
"""Numbers of the key groups; VISUAL are the visual tokens that are no sinks."""


@dataclass(frozen=True)
class Var(MechanismConfig):
    """Redistribute attention from sinks to visual tokens, where a head looks at the picture (VAR)."""

    WORDS: ClassVar = {
        "all": ALL,
        "inner": NamedLayers(slice(2, -1), "all layers that attend but the first two and the last"),
    }
    dims: tuple[int, ...] = ()
    """Sink dimensions of the base model, at least one: 1415, 2533 of LLaMA2-7B; 2100, 4743 of LLaMA2-13B; 458, 2570 of
    Qwen2-VL-7B; 3584 of InternVL2-8B. For others `attention.calibrate.sinks` finds them."""
    tau: float = 20.0
    """A token whose largest sink dimension is above tau times the root mean square of all is a sink."""
    rho: float = 0.5
    """A row and head is changed where at least this share of its attention to visual tokens is not on sinks. The paper
    has 0.8 in general, 0.5 against hallucination, 0.9 for questions of vision alone."""
    summ: float = 0.2
    """A row and head is changed where visual tokens, sinks too, have at least this share of all attention."""
    move_fraction: float = 0.4
    """Share of the sinks' attention that is moved; 0 changes nothing."""
    layers: Literal["inner", "all"] | tuple[int, ...] = "inner"
    """Decoder layers that use it, by global number, or all, or inner: all but the first two and the last, as in the
    source."""

    def __post_init__(self) -> None:
        check_fields(self)
        require(all(n >= 0 for n in self.dims), "dims", self.dims, "numbers of hidden dimensions, from 0 up")
        require(0 < self.tau <= 1e30, "tau", self.tau, "a positive number, at most 1e30")
        for name in ("rho", "summ", "move_fraction"):
            require(0 <= getattr(self, name) <= 1, name, getattr(self, name), "a share between 0 and 1")

    def build(self, dims: AttentionDims, key: jax.Array) -> Mechanism:
        """The mechanism of one layer; one that changes nothing if nothing is moved.

        Raises:
            ConfigError: no sink dimensions.
        """
        needed = "at least one sink dimension of the base model: the help of Var.dims lists those of some models, and "
        needed += "rave_jax.attention.calibrate.sinks finds others"
        require(len(self.dims) > 0, "dims", self.dims, needed)
        return Redistribution(self) if self.move_fraction > 0 else Mechanism()


class Redistribution(Mechanism):
    """Weighs sinks and what is seen beside them. Without parameters."""

    def __init__(self, config: Var):
        self.config = config

    def remember(self, x: Features) -> Bool[Array, "B T K"]:
        """Which tokens are sinks by their hidden state, for every kv head alike."""
        sink = sink_score(x.hidden, self.config.dims) > self.config.tau
        return jnp.broadcast_to(sink[..., None], x.k.shape[:3])

    def key_groups(self, x: Features, remembered: Bool[Array, "B S K"], info_k: TokenInfo) -> KeyGroups:
        """Sinks of the prompt among text and among visual tokens, other visual tokens, the rest."""
        sink = remembered[..., 0] & (info_k.role != Role.RESPONSE)
        visual = info_k.kind == Kind.VISUAL
        of = jnp.where(visual, jnp.where(sink, VISUAL_SINK, VISUAL), jnp.where(sink, TEXT_SINK, OTHER))
        return KeyGroups(of, COUNT)

    def merge(self, x: Features, parts: Parts, info_q: TokenInfo, info_k: TokenInfo) -> Float[Array, "B T N H"]:
        """Logs of both factors where the row and head looks at the picture, else 0."""
        config, mass = self.config, parts.mass
        seen = mass[:, :, VISUAL]
        picture = seen + mass[:, :, VISUAL_SINK]
        row = (info_q.kind == Kind.TEXT)[..., None] & (parts.groups[:, :, VISUAL_SINK] > -jnp.inf)
        looks = row & (seen > 0) & (picture >= config.summ) & (seen >= config.rho * picture)
        less = math.log1p(-config.move_fraction) if config.move_fraction < 1 else -math.inf
        # log(1 + move m_S / m_N) from logs: gradients stay finite however small m_N is.
        sinks = log_sum_exp(jnp.stack([parts.groups[:, :, n] for n in (TEXT_SINK, VISUAL_SINK)], axis=2), (2,))
        ratio = jnp.where(looks, sinks, 0.0) - jnp.where(looks, parts.groups[:, :, VISUAL], 0.0)
        more = jax.nn.softplus(math.log(config.move_fraction) + ratio)
        zero, less = jnp.zeros_like(more), jnp.full_like(more, less)
        by_group = {OTHER: zero, TEXT_SINK: less, VISUAL: more, VISUAL_SINK: less}
        weights = jnp.stack([by_group[n] for n in range(COUNT)], axis=2)
        return jnp.where(looks[:, :, None], weights, 0.0)


def sink_score(hidden: Float[Array, "*tokens D"], dims: tuple[int, ...]) -> Float[Array, "*tokens"]:
    """phi, in float32.

    Raises:
        ConfigError: a dimension that the hidden state does not have.
    """
    D = hidden.shape[-1]
    require(max(dims) < D, "dims", dims, f"numbers from 0 to {D - 1}")
    x = hidden.astype(jnp.float32)
    size = jnp.sqrt(jnp.mean(x**2, axis=-1) + 1e-6)
    return jnp.max(jnp.abs(x[..., jnp.array(dims)]), axis=-1) / size

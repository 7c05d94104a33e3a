"""RAVE-style pair gate: a learned query-key bias on visual keys, from features before RoPE.

Stated by the paper (arXiv 2605.18359, abstract and introduction): a query-key bias from pre-RoPE features is
added to the scores before the softmax, over visual keys only, by a lightweight pair gate trained with the
model. Its functional form is not public to us; everything below that sentence is our own design:

    u_i = q0_i A / sqrt(r)      w_j = k0_j B
    z_ij = <u_i, w_j> + <a, q0_i> + c + <e, k0_j>
    bias_ij = f(z_ij)                               f: see `rave_forms`

With `features="post_rope"`, a control, q_i and k_j after RoPE stand in place of q0_i and k0_j.

A is per query head and B per kv head. z is one pair product: what a cache keeps of a key is w, a one where there is a
query term, and <e, k0> where there is a key term, at most r + 2 numbers per kv head. B, a, c and e start at zero and A
at random: the gate starts as exactly nothing, learns from the first step, and never dies. The query term moves
attention between text and image, the key and pair terms move it within the image.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx

from rave_jax.attention.base import AttentionDims, Features, Mechanism, Score
from rave_jax.attention.declared import Layers, MechanismConfig
from rave_jax.attention.rave_forms import CenteredSigmoid, Form, Linear, LogGate, Tanh, key_side, query_side
from rave_jax.batch import Kind, TokenInfo
from rave_jax.config import check_fields, require
from rave_jax.kernels.attention import Term
from rave_jax.typing import Array, Float

MAX_RANK = 1 << 13
"""The widest pair term that is built; no head is as wide."""


@dataclass(frozen=True)
class Rave(MechanismConfig):
    """A learned query-key bias on visual keys from features before RoPE (RAVE-style; the form is ours)."""

    form: Literal["log_gate", "tanh", "linear", "centered_sigmoid"] = "log_gate"
    """How the gate's z becomes a bias: log_gate is log(2 sigmoid(z)); tanh is bounded by `limit`; linear is z
    itself; centered_sigmoid is gain * (2 sigmoid(z) - 1) with a learned gain per head."""
    terms: Literal["pair", "pair+q", "pair+k", "all"] = "all"
    """Which terms z has beside the pair term: one of the query (and a constant per head), one of the key, or both."""
    rank: int = 16
    """Width of the pair term (r)."""
    limit: float = 4.0
    """Bound of the tanh form, in logits."""
    heads: Literal["all"] | tuple[int, ...] = "all"
    """Query heads that get the bias, by number, or all."""
    layers: Layers = "all"
    """Decoder layers that get the bias, by global number, or all."""
    queries: Literal["all", "text"] = "all"
    """Which queries get the bias: all, or text tokens only."""
    features: Literal["pre_rope", "post_rope"] = "pre_rope"
    """What the gate reads: queries and keys before RoPE, or after it, which is a control: z then knows places too."""
    start: Literal["zero", "random"] = "zero"
    """Zero starts bit-equal to the backbone; random is for controls with a frozen random gate."""

    def __post_init__(self) -> None:
        check_fields(self)
        require(1 <= self.rank <= MAX_RANK, "rank", self.rank, f"a number from 1 to {MAX_RANK:,}")
        require(1e-6 <= self.limit <= 1e6, "limit", self.limit, "a number of logits from 1e-6 to 1e6")
        require(self.heads == "all" or len(self.heads) > 0, "heads", self.heads, "at least one head")

    @property
    def function(self) -> Form:
        """The form as a score function."""
        return {
            "log_gate": LogGate(),
            "tanh": Tanh(self.limit),
            "linear": Linear(),
            "centered_sigmoid": CenteredSigmoid(),
        }[self.form]

    @property
    def skips_keys(self) -> bool:
        """All that it adds to scores is a term of keys that it remembers."""
        return True

    def build(self, dims: AttentionDims, key: jax.Array) -> RaveGate:
        """The gate of one layer.

        Raises:
            ConfigError: a head that the layer does not have.
        """
        if self.heads != "all":
            known = all(0 <= n < dims.num_heads for n in self.heads)
            require(known, "heads", self.heads, f"numbers from 0 to {dims.num_heads - 1}")
        return RaveGate(self, dims, key)


class RaveGate(Mechanism):
    """The gate of one layer. Parameters (only those that the config's terms and form use):

    query_proj [H,h,r] and key_proj [K,h,r] of the pair, query_term [H,h] and constant [H], key_term [K,h],
    gain [H].
    """

    def __init__(self, config: Rave, dims: AttentionDims, key: jax.Array):
        H, K, h, _ = dims
        self.config = config
        keys = jax.random.split(key, 5)
        random = config.start == "random"

        def normal(n: int, shape: tuple[int, ...]) -> jax.Array:
            return jax.random.normal(keys[n], shape) * h**-0.5

        def start(n: int, shape: tuple[int, ...]) -> jax.Array:
            return normal(n, shape) if random else jnp.zeros(shape)

        self.query_proj = nnx.Param(normal(0, (H, h, config.rank)), axes=("heads", "head_dim", "rank"))
        self.key_proj = nnx.Param(start(1, (K, h, config.rank)), axes=("kv_heads", "head_dim", "rank"))
        if config.terms in ("pair+q", "all"):
            self.query_term = nnx.Param(start(2, (H, h)), axes=("heads", "head_dim"))
            self.constant = nnx.Param(jnp.zeros((H,)), axes=("heads",))
        if config.terms in ("pair+k", "all"):
            self.key_term = nnx.Param(start(3, (K, h)), axes=("kv_heads", "head_dim"))
        if config.form == "centered_sigmoid":
            self.gain = nnx.Param(jnp.ones((H,)), axes=("heads",))

    def remember(self, x: Features) -> Float[Array, "B S K channels"]:
        """The key's side of z, in float32."""
        k0 = (x.k0 if self.config.features == "pre_rope" else x.k).astype(jnp.float32)
        key = None
        if self.config.terms in ("pair+k", "all"):
            key = jnp.einsum("BSKh,Kh->BSK", k0, _f32(self.key_term))
        w = jnp.einsum("BSKh,Khr->BSKr", k0, _f32(self.key_proj))
        return key_side(w, key, row_term=self.config.terms in ("pair+q", "all"))

    def score(self, x: Features, remembered: Array, info_q: TokenInfo, info_k: TokenInfo) -> Score:
        """The gate on visual keys."""
        config, row = self.config, None
        q0 = (x.q0 if config.features == "pre_rope" else x.q).astype(jnp.float32)
        H = q0.shape[2]
        if config.terms in ("pair+q", "all"):
            row = jnp.einsum("BTHh,Hh->BTH", q0, _f32(self.query_term)) + _f32(self.constant)
        u = jnp.einsum("BTHh,Hhr->BTHr", q0, _f32(self.query_proj)) * config.rank**-0.5
        selected = (
            jnp.ones(H, bool) if config.heads == "all" else jnp.zeros(H, bool).at[jnp.array(config.heads)].set(True)
        )
        query = info_q.kind == Kind.TEXT if config.queries == "text" else info_q.kind != Kind.PAD
        term = Term(
            config.function,
            u=query_side(config.function, u, row, key_term=config.terms in ("pair+k", "all")),
            w=remembered,
            head={"gain": _f32(self.gain)} if config.form == "centered_sigmoid" else {},
            query_on=query[..., None] & selected,
            key_on=info_k.kind == Kind.VISUAL,
        )
        return Score(terms=(term,))


def _f32(param: nnx.Param) -> jax.Array:
    return param[...].astype(jnp.float32)

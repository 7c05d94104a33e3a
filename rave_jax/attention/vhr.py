"""VHR: the outputs of heads that a picture changes most are multiplied.

Source: arXiv 2412.13949, from notes on the paper. O_h <- alpha O_h before the output projection, with alpha = 2, for
the heads of a layer whose vision-aware head divergence is above the layer's median:

    VHD_h = | O_h(with the picture) - O_h(without it) |_2      of the prompt's last token

The paper chooses heads for each prompt and keeps them while it answers, as `choose="prompt"` does in generation: a pass
before the prompt is read finds them, with the prompt and the same without its pictures side by side. Heads that were
chosen once for all prompts did much less (CHAIR_s 44.7, against 33.3; 49.7 without VHR): those that `rave-jax calibrate
vhr` finds (`rave_jax/attention/calibrate/vhr.py`, which says what is ours of the search).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx

from rave_jax.attention.base import AttentionDims, Features, Mechanism
from rave_jax.attention.declared import MechanismConfig
from rave_jax.attention.heads import ScaledHeads, check_heads
from rave_jax.attention.prompted import Prompted, PromptPass, PromptSizes
from rave_jax.attention.scores import pick
from rave_jax.batch import TokenInfo
from rave_jax.config import check_fields, require
from rave_jax.typing import Array, Bool, Float, Int


@dataclass(frozen=True)
class Vhr(MechanismConfig):
    """The outputs of some heads are multiplied by `alpha` (VHR)."""

    heads: tuple[int, ...] = ()
    """Query heads that are multiplied, by number, as `rave-jax calibrate vhr` finds them; empty changes nothing. For
    other heads in other layers, give the model several of these configs, each with its `layers`."""
    alpha: float = 2.0
    """What these heads' outputs are multiplied by; 1 changes nothing. In the paper 4 breaks the answers."""
    layers: Literal["all", "late"] | tuple[int, ...] = "all"
    """Decoder layers that use it, by global number, or all, or late: the second and the last 14, as in the paper for
    LLaVA models of 32 layers."""
    choose: Literal["given", "prompt"] = "given"
    """Are the heads those of `heads`, or chosen for each prompt that is answered? The latter costs a pass over the
    prompt and one over it without its pictures, and is for generation alone."""

    def __post_init__(self) -> None:
        check_fields(self)
        require(len(set(self.heads)) == len(self.heads), "heads", self.heads, "each head once")
        require(0 <= self.alpha <= 1e6, "alpha", self.alpha, "a number from 0 to 1e6")
        given = self.choose == "given" or not self.heads
        require(given, "heads", self.heads, 'none where choose is "prompt", which finds them')

    def layers_of(self, attending: Sequence[int]) -> Sequence[int]:
        """Late ones are two parts of the layers that attend."""
        if self.layers != "late":
            return super().layers_of(attending)
        return sorted({*attending[1:2], *attending[-14:]})

    @property
    def of_prompt(self) -> bool:
        """Heads may be chosen for each prompt."""
        return self.choose == "prompt" and self.alpha != 1

    def build(self, dims: AttentionDims, key: jax.Array) -> Mechanism:
        """The mechanism of one layer; one that changes nothing if no head is multiplied.

        Raises:
            ConfigError: a head that the layer does not have.
        """
        check_heads(self.heads, dims)
        if self.of_prompt:
            return PromptedHeads(self.alpha)
        scales = tuple(self.alpha if n in self.heads else 1.0 for n in range(dims.num_heads))
        return ScaledHeads(scales) if self.heads and self.alpha != 1 else Mechanism()


class PromptedHeads(Prompted):
    """Heads times numbers of the prompt: [B,L,H] of a model, [B,H] of a layer. The pass that finds them reinforces
    layer by layer what it finds."""

    BLIND = True
    GATES = True

    def __init__(self, alpha: float):
        super().__init__()
        self.alpha = alpha

    def finder(self, layers: int) -> Reinforcing:
        """Chooses the heads."""
        return Reinforcing(self.alpha, jnp.ones(layers, bool))

    def neutral(self, rows: int, sizes: PromptSizes) -> Float[Array, "rows L H"]:
        """Ones."""
        return jnp.ones((rows, len(sizes.layers), sizes.heads), jnp.float32)

    def found(self, prompts: PromptPass, sizes: PromptSizes) -> Float[Array, "N L H"]:
        """What the heads of the prompts were multiplied by."""
        assert prompts.gates is not None
        return jnp.swapaxes(prompts.gates[:, :, 0], 0, 1)

    def of_layers(self, numbers: Float[Array, "B L H"], start: int, count: int) -> Float[Array, "count B H"]:
        """Of these layers."""
        return jnp.swapaxes(numbers[:, start : start + count], 0, 1)

    def head_gate(self, x: Features, out: Float[Array, "B T H h"], info_q: TokenInfo) -> Float[Array, "B 1 H"]:
        """The numbers, for every token of a row."""
        return self.numbers[:, None]


class Reinforcing(Mechanism):
    """Multiplies, in the first half of the rows, the heads that the picture changes most; the second half are the same
    prompts without it. One document a row, padding on its right."""

    def __init__(self, alpha: float, on: Bool[Array, "*L"]):
        self.alpha = alpha
        self.on = nnx.data(on)

    def head_gate(self, x: Features, out: Float[Array, "B T H h"], info_q: TokenInfo) -> Float[Array, "B 1 H"]:
        """alpha on the chosen heads, in layers that are on."""
        last: Int[Array, "B 1"] = jnp.sum(info_q.document > 0, axis=1, keepdims=True) - 1
        seen, blind = jnp.split(pick(out, last)[:, 0].astype(jnp.float32), 2)
        chosen = above_median(divergence(seen, blind)) & self.on
        gates = jnp.where(chosen, self.alpha, 1.0)
        return jnp.concatenate([gates, jnp.ones_like(gates)])[:, None]


def divergence(seen: Float[Array, "N H h"], blind: Float[Array, "N H h"]) -> Float[Array, "N H"]:
    """VHD of each head, 0 for those that surge without the picture."""
    surge = jnp.linalg.norm(blind, axis=-1) - jnp.linalg.norm(seen, axis=-1)
    limit = jnp.mean(surge, axis=-1, keepdims=True) + jnp.std(surge, axis=-1, keepdims=True)
    return jnp.where(surge > limit, 0.0, jnp.linalg.norm(seen - blind, axis=-1))


def above_median(values: Float[Array, "N H"]) -> Bool[Array, "N H"]:
    """Which numbers are above the median of their row."""
    return values > jnp.median(values, axis=-1, keepdims=True)

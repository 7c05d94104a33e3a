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

from rave_jax.attention.base import AttentionDims, Mechanism
from rave_jax.attention.declared import MechanismConfig
from rave_jax.attention.heads import ScaledHeads, check_heads
from rave_jax.attention.prompted import PromptedHeads
from rave_jax.config import check_fields, require


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
        """Of the layers that attend, those that the config means."""
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

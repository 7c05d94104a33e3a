"""VHR: the outputs of heads that a picture changes most are multiplied.

Source: arXiv 2412.13949, from notes on the paper. O_h <- alpha O_h before the output projection, with alpha = 2, for
the heads of a layer whose vision-aware head divergence is above the layer's median:

    VHD_h = | O_h(with the picture) - O_h(without it) |_2      of the prompt's last token

`rave-jax calibrate vhr` finds them (`rave_jax/attention/calibrate/vhr.py`). The paper chooses heads for each prompt and
keeps them while it answers; heads that were chosen once for all prompts did much less (CHAIR_s 44.7, against 33.3; 49.7
without VHR). A config holds one choice: calibrate on the prompt that is answered for the paper's, or on many.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax

from rave_jax.attention.base import AttentionDims, Mechanism
from rave_jax.attention.declared import Layers, MechanismConfig
from rave_jax.attention.heads import ScaledHeads, check_heads
from rave_jax.config import check_fields, require


@dataclass(frozen=True)
class Vhr(MechanismConfig):
    """The outputs of some heads are multiplied by `alpha` (VHR)."""

    heads: tuple[int, ...] = ()
    """Query heads that are multiplied, by number, as `rave-jax calibrate vhr` finds them; empty changes nothing. For
    other heads in other layers, give the model several of these configs, each with its `layers`."""
    alpha: float = 2.0
    """What these heads' outputs are multiplied by; 1 changes nothing. In the paper 4 breaks the answers."""
    layers: Layers = "all"
    """Decoder layers that use it, by global number, or all."""

    def __post_init__(self) -> None:
        check_fields(self)
        require(len(set(self.heads)) == len(self.heads), "heads", self.heads, "each head once")
        require(0 <= self.alpha <= 1e6, "alpha", self.alpha, "a number from 0 to 1e6")

    def build(self, dims: AttentionDims, key: jax.Array) -> Mechanism:
        """The mechanism of one layer; one that changes nothing if no head is multiplied.

        Raises:
            ConfigError: a head that the layer does not have.
        """
        check_heads(self.heads, dims)
        scales = tuple(self.alpha if n in self.heads else 1.0 for n in range(dims.num_heads))
        return ScaledHeads(scales) if self.heads and self.alpha != 1 else Mechanism()

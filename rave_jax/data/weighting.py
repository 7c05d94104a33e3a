"""What a sample counts in the loss beside others."""

from __future__ import annotations

from typing import Literal

import numpy as np

from rave_jax.typing import Float, NpArray

Weighting = Literal["token", "sample", "sqrt"]
"""What all samples are weighted by: their learned tokens, nothing, or the square root of their learned tokens."""


def weighted(loss_mask: Float[NpArray, "T"], weighting: Weighting) -> Float[NpArray, "T"]:
    """The loss mask of an example, multiplied by the weight of its sample.

    A step descends sum(w * loss) / sum(w) over the target tokens of its batch. With x learned tokens in a sample, the
    weights of its tokens are multiplied by

        "token": 1            each token counts the same, so long answers count most;
        "sample": 1 / x       each sample counts the same;
        "sqrt": 1 / sqrt(x)   between the two: each sample counts as the square root of its learned tokens.

    These are token, sample and square averaging of InternVL 2.5 (Chen et al., arXiv 2412.05271, section 3.3). Weights
    of answers stay as factors; tokens of weight 0 are not among the x. The first token is predicted by none.
    """
    learned = int(np.count_nonzero(loss_mask[1:]))
    if weighting == "token" or learned < 2:
        return loss_mask
    return (loss_mask / (learned if weighting == "sample" else np.sqrt(learned))).astype(np.float32)

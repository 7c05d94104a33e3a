"""Rotary positions of text, pictures and videos (M-RoPE).

Text counts on in all three axes. A picture starts where the text stopped: its axes are the frame, row and column of
the merged grid. A video's frames stand `tokens_per_second * seconds` apart, cut to whole numbers.

What follows a picture or video goes on behind its largest position, whichever axis that is on. It is the rule of the
Qwen2-VL paper (arXiv 2409.12191, section 2.1) and of transformers up to 5.2.0. It is also how generation counts: an
answer goes on behind the largest position of its prompt, in transformers too. So a token has one position, whether it
is read in training, in a prompt, or generated.

For a picture the largest position is on its longer side, and prompts of transformers 5.23 have the same positions.
Behind a video, transformers 5.23 lets the prompt go on behind the longer side of the grid however late the last frame
is, and the answer behind the largest position. Its prompts differ from ours where the last frame,
`tokens_per_second * seconds * (frames - 1)`, is beyond that side.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from rave_jax.families.pictures import Visual, grid_coordinates, text_positions
from rave_jax.typing import Int, NpArray


def mrope_positions(length: int, visuals: Sequence[Visual], tokens_per_second: float) -> Int[NpArray, "3 T"]:
    """Positions (temporal, height, width) of one document.

    Args:
        length: number of tokens.
        visuals: its pictures and videos in order, not overlapping.
        tokens_per_second: temporal positions per second of a video.
    """
    positions = np.empty((3, length), np.int32)
    token = position = 0
    for start, grid, seconds in visuals:
        positions[:, token:start] = text_positions(start - token, position)
        position += start - token
        token = start + grid[0] * grid[1] * grid[2]
        places = grid_coordinates(grid)
        if seconds is not None:
            # The original multiplies in float32 and cuts, so 3 * 0.3333333 must be cut alike.
            places[0] = (places[0].astype(np.float32) * (np.float32(tokens_per_second) * np.float32(seconds))).astype(
                np.int32
            )
        positions[:, start:token] = places + position
        position += int(places.max()) + 1
    positions[:, token:] = text_positions(length - token, position)
    return positions

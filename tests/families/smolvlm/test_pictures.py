"""Pictures to tiles and their text: equal to transformers' PIL processor, tile by tile."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil

from rave_jax.checkpoint.tiny import Tiny, tiny_config, token_ids
from rave_jax.config import ConfigError
from rave_jax.data.images import cut_image
from rave_jax.families.pictures import PictureError, ProcessorFiles
from rave_jax.families.smolvlm import FAMILY
from rave_jax.families.smolvlm.config import VisionConfig
from rave_jax.families.smolvlm.pictures import Pictures, pictures
from tests.data.pictures import noise

CONFIG = tiny_config(Tiny(family="smolvlm", patch_size=3, merge_size=4))
VISION = CONFIG.vision
assert isinstance(VISION, VisionConfig)
SIDE = VISION.image_size


@given(st.integers(1, 150), st.integers(1, 150), st.sampled_from([SIDE, 2 * SIDE, 3 * SIDE + 5, 10]), st.booleans())
def test_equals_transformers_on_odd_sizes(height: int, width: int, edge: int, split: bool) -> None:
    image, rules = Image.fromarray(noise(height, width)), Pictures(CONFIG, edge, split)
    ours = cut_image(image, rules)
    theirs = SmolVLMImageProcessorPil(
        size={"longest_edge": edge}, max_image_size={"longest_edge": SIDE}, do_image_splitting=split
    )(images=[image], return_row_col_info=True)
    values = np.asarray(theirs["pixel_values"])[0]
    rows, cols = theirs["rows"][0][0], theirs["cols"][0][0]
    assert ours.grid == rules.image_grid(height, width) == (len(values), 2, 2)
    assert rules.image_grid(height, width).tiles == ((rows, cols) if rows else (1, 1))
    units, merge, p = VISION.token_side, VISION.merge_size, VISION.patch_size
    cells = ours.patches.pixels.reshape(-1, units, units, merge, merge, 3, p, p)
    tiles = cells.transpose(0, 5, 1, 3, 6, 2, 4, 7).reshape(values.shape)
    np.testing.assert_allclose((tiles / 255 - 0.5) / 0.5, values, atol=1e-5)


def test_text_says_where_a_tile_stands() -> None:
    """Rows are apart by a line break, which is one text with what follows it, as a tokenizer may join them."""
    texts: list[str] = []
    rules = Pictures(CONFIG, 2 * SIDE)
    pieces = rules.expand("image", rules.image_grid(SIDE, SIDE), None, lambda text: texts.append(text) or [0])
    around = "<fake_token_around_image>"
    assert texts == [
        f"{around}<row_1_col_1>",
        f"{around}<row_1_col_2>",
        f"\n{around}<row_2_col_1>",
        f"{around}<row_2_col_2>",
        f"\n\n{around}<global-img>",
        around,
    ]
    assert [piece.grid for piece in pieces] == [None, (1, 2, 2)] * 5 + [None]
    texts.clear()
    rules = Pictures(CONFIG, SIDE)
    assert len(rules.expand("image", rules.image_grid(7, 9), None, lambda text: texts.append(text) or [0])) == 3
    assert texts == [f"{around}<global-img>", around]


def test_what_does_not_fill_a_patch_is_cut_off() -> None:
    """The tiles of SmolVLM2-2.2B have 384 pixels, of which 27 patches of 14 take 378."""
    vision = VisionConfig(kind="siglip", activation="gelu", image_size=384, patch_size=14, merge_size=3)
    assert (vision.side, vision.token_side, vision.window_patches, vision.places) == (27, 9, 729, 729)


@pytest.mark.parametrize("size", [(1, 201), (5000, 20)])
def test_stripes_are_refused(size: tuple[int, int]) -> None:
    with pytest.raises(PictureError, match="within a factor of 200 of each other"):
        Pictures(CONFIG).image_grid(*size)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"max_image_size": {"longest_edge": 364}},
            "max_image_size is .*, expected {'longest_edge': 24}, the",
        ),
        ({"size": {"height": 24, "width": 24}}, "size is .*, expected {'longest_edge': pixels}"),
        ({"do_image_splitting": "yes"}, "do_image_splitting is 'yes', expected true or false"),
        ({"resample": 3}, r"resample is 3, expected 1 \(Lanczos\)"),
        ({"do_resize": False}, "do_resize is False, expected True"),
    ],
)
def test_other_processing_is_refused(change: dict[str, Any], message: str) -> None:
    stated = FAMILY.small.files(CONFIG, token_ids(FAMILY.small))["preprocessor_config.json"] | change
    file = Path("preprocessor_config.json")
    with pytest.raises(ConfigError, match=f"^preprocessor_config.json: {message}"):
        pictures(CONFIG, ProcessorFiles(file, stated, file, stated))

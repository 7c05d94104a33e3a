"""The quickstart with Gaze Attention: each query reads a quarter of the picture, in regions, and four context tokens.

The authors' layout in small: 8 x 8 visual tokens in 4 x 4 regions. A cell of a mosaic is a token, and a mosaic of at
most 3 x 3 stands anywhere on the 8 x 8, so that the evidence of a question lies in one region of 16. Colour mosaics
alone: first lists and questions on pictures that a mosaic fills (`quickstart.py` says why), then the larger ones.
Regions are ranked by bounds of their keys (Quest), not by the authors' means, which do not find a cell among four here:
docs/results.md has the figures.
"""

import dataclasses
from functools import partial

import quickstart

from rave_jax.attention import Gaze
from rave_jax.data.config import Stage
from rave_jax.data.synthetic import DigitMosaic, MosaicList, Synthetic
from rave_jax.evaluation.config import Eval, Report
from rave_jax.layout import ContextTokens, FixedRegions
from rave_jax.models.config import ModelOptions
from rave_jax.training.config import TrainConfig
from rave_jax.training.init import Tiny

SIZE, FRAME, SMALL = 128, 8, 48
SmallRows = partial(Stage, tokens=50, patches=12)
QUESTIONS = DigitMosaic(frame=FRAME)


def get_config() -> TrainConfig:
    """About three minutes on two cores."""
    base = quickstart.get_config()
    return dataclasses.replace(
        base,
        output_dir="runs/quickstart_gaze",
        # A patch of 16 pixels is a token: merging four smaller ones would cost the tower four times as much.
        init=Tiny(
            num_layers=3,
            num_heads=8,
            vision_hidden_size=96,
            vision_mlp_size=192,
            patch_size=16,
            merge_size=1,
            window_size=32,
        ),
        model=ModelOptions(
            mechanisms=(Gaze(regions=FixedRegions(2, 2), max_regions=16, top_k=4, descriptor="min_max"),),
            context=ContextTokens(4),
            scan_layers=False,
        ),
        data=dataclasses.replace(
            base.data,
            sources=(
                Synthetic(tasks=(MosaicList(min_grid=3),), image_size=SMALL),
                Synthetic(tasks=(MosaicList(), DigitMosaic()), image_size=SMALL),
                Synthetic(tasks=(QUESTIONS,), image_size=SIZE),
            ),
            stages=(
                SmallRows(0, (1, 0, 0)),
                SmallRows(180, (0, 1, 0)),
                Stage(400, (0, 0, 1)),
            ),
            tokens=108,
            patches=64,
        ),
        optimizer=dataclasses.replace(base.optimizer, groups=()),
        steps=500,
        final=(
            Eval(
                name="heldout",
                data=Synthetic(tasks=(QUESTIONS,), image_size=SIZE, split="heldout"),
                samples=400,
                tokens=96,
                patches=64,
                max_new_tokens=4,
            ),
            Report(title="Quickstart with Gaze Attention"),
        ),
    )

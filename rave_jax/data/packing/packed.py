"""The plan of a config with packing."""

from __future__ import annotations

from collections.abc import Sequence

from rave_jax.config import require
from rave_jax.data.collate import round_up
from rave_jax.data.config import DataConfig, Stage
from rave_jax.data.order import Order
from rave_jax.data.packing.choice import Choice
from rave_jax.data.packing.index import SizeIndex
from rave_jax.data.packing.plan import PackedRows, PackedStage
from rave_jax.data.packing.sizes import Room
from rave_jax.data.processor import Processor
from rave_jax.data.sample import Source

MOST_REGIONS = 2**30


def packed_rows(
    config: DataConfig,
    processor: Processor,
    sources: Sequence[Source],
    order: Order,
    lengths: Sequence[int],
    keeps: bool = True,
) -> PackedRows:
    """The plan of a config with packing.

    Args:
        config: the data, with `packing`.
        processor: of the model.
        sources: of the config.
        order: of the samples, without stages.
        lengths: samples of each source by which `Stage.epochs` mixes.
        keeps: are measured sizes kept beside the data? One process of a job is enough.

    Raises:
        ConfigError: rows are planned for more documents than the visual layout has regions.
    """
    packing, layout = config.packing, processor.layout
    assert packing is not None
    has_regions = layout.regions is not None
    if has_regions:
        require(layout.max_regions > 0, "max_regions", layout.max_regions, "at least 1")

    def planned(stage: Stage) -> PackedStage:
        tokens = config.tokens if stage.tokens is None else stage.tokens
        patches = config.patches if stage.patches is None else stage.patches
        patches = round_up(patches, processor.rules.patch_sizes.window)
        regions = layout.max_regions if has_regions else MOST_REGIONS
        return PackedStage(stage.step, stage.shares(lengths), Room(tokens, patches, regions, packing.documents))

    index = SizeIndex(sources, config.sources, processor, packing.workers, keeps)
    fails = config.on_error == "fail"
    choice = Choice(index, sources, processor, config.filters, packing.long, fails=fails, max_skips=config.max_skips)
    stages = [planned(stage) for stage in config.stages]
    return PackedRows(packing, config.rows, stages, order, choice, has_regions)

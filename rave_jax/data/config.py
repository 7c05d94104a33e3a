"""What a run reads and in which shape: sources, the curriculum, sizes of rows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Literal

from rave_jax.config import ConfigError, check_ranges, require
from rave_jax.data.chat import SpecialTokens
from rave_jax.data.filters import SizeFilter
from rave_jax.data.packing.config import Packing
from rave_jax.data.processor import Processor
from rave_jax.data.sample import SampleError, Source
from rave_jax.data.sources import SourceConfig, Synthetic
from rave_jax.data.state import OnChange
from rave_jax.data.weighting import Weighting
from rave_jax.families.config import VlmConfig
from rave_jax.layout import VisualLayout

MOST_ROWS, MOST_TOKENS, MOST_PATCHES, MOST_PIXELS = 2**20, 2**22, 2**24, 2**28
"""Far above any real training: a larger value is a typing error and would run out of memory."""
MOST_IN_BATCH = 2**30
"""Tokens, or patches, of a batch over all hosts."""


@dataclass(frozen=True)
class Stage:
    """A part of the curriculum."""

    step: int = 0
    """First step of the stage."""
    weights: tuple[float, ...] = ()
    """Share of each source in the samples of the stage, in the order of `sources`; empty for equal shares."""
    epochs: tuple[float, ...] = ()
    """In place of `weights`: how often each source is gone through in one pass of the mixture, as (1, 0.5) for all of
    the first and half of the second. Shares are epochs times lengths."""
    tokens: int | None = None
    """Tokens of a row in this stage; None for those of `data`. Each size of rows is compiled once."""
    patches: int | None = None
    """Patches of a row in this stage; None for those of `data`."""

    def __post_init__(self) -> None:
        check_ranges(self, step=(0, 2**31 - 1), tokens=(1, MOST_TOKENS), patches=(0, MOST_PATCHES))
        for name in ("weights", "epochs"):
            given = getattr(self, name)
            good = not given or (all(0 <= number < math.inf for number in given) and any(given))
            require(good, name, given, "numbers of 0 or more, not all 0")
        alone = "empty where weights are given: a stage mixes its sources by one or by the other"
        require(not (self.weights and self.epochs), "epochs", self.epochs, alone)

    def shares(self, lengths: Sequence[int]) -> tuple[Fraction, ...]:
        """Share of each source in the samples of the stage, as decimals say it.

        Args:
            lengths: samples of each source.
        """
        if self.epochs:
            return tuple(_exact(number) * length for number, length in zip(self.epochs, lengths, strict=True))
        return tuple(map(_exact, self.weights or (1.0,) * len(lengths)))


def _exact(number: float) -> Fraction:
    return Fraction(repr(float(number)))


@dataclass(frozen=True)
class DataConfig:
    """The data of a run and the shape of its batches."""

    sources: tuple[SourceConfig, ...] = (Synthetic(),)
    """Where samples come from."""
    stages: tuple[Stage, ...] = (Stage(),)
    """Curriculum: the share of each source, and perhaps the size of rows, from a step on. The first stage starts at
    step 0. Empty for one stage with equal shares."""
    rows: int = 64
    """Rows of a batch over all hosts."""
    tokens: int = 128
    """Tokens of a row, text and visual together."""
    patches: int = 64
    """Patches of a row, rounded up to whole windows of the tower; 0 for text only."""
    documents_per_row: int = 1
    """Samples packed into a row; each may take an equal part of the row's tokens and patches."""
    packing: Packing | None = None
    """Rows of as many samples as fit, planned by their sizes; None for `documents_per_row` equal parts."""
    weighting: Weighting = "token"
    """What samples count in the loss: as their learned tokens ("token"), each the same ("sample"), or as the square
    root of their learned tokens ("sqrt")."""
    filters: tuple[SizeFilter, ...] = ()
    """Limits of size: samples outside them are left out and counted."""
    seed: int = 0
    """Seed of the order of samples, 0 or more."""
    min_pixels: int | None = None
    """Least pixels of a resized picture; None for the model's own limit."""
    max_pixels: int | None = None
    """Most pixels of a resized picture; None for the model's own limit."""
    special_tokens_in_text: SpecialTokens = "text"
    """How a sample's spelling of a special token such as <|im_end|> is read: as "text", or as the token ("tokens")."""
    on_error: Literal["skip", "fail"] = "skip"
    """What to do with a broken picture, an empty answer, a sample over budget: skip and count it, or fail."""
    max_skips: int = 100
    """Consecutive samples of a process that may be skipped; with more, the run stops."""
    prefetch: int = 2
    """Batches loaded ahead in the background, besides the two that wait on the devices; 0 loads one at a time."""
    workers: int = 1
    """Threads that load them, for each device that has rows of its own; with `processes`, threads of each process."""
    processes: int = 0
    """Processes that load them in place of threads, for each process of the job; worth it where threads cannot keep up
    although cores are idle."""
    on_change: OnChange = "refuse"
    """What to do when a run goes on and a source has grown, shrunk or been reordered: refuse, or continue: the source
    then begins a new epoch of what it holds, and a line says so."""
    cache_mb: int = 256
    """Memory that keeps processed samples for reuse, in MB, of each process that loads; 0 keeps none."""

    def __post_init__(self) -> None:
        require(len(self.sources) > 0, "sources", self.sources, "at least one source, as --data.sources LlavaJson")
        if not self.stages:
            object.__setattr__(self, "stages", (Stage(),))
        alone = "1 with packing: data.packing.documents says how many samples a row has"
        require(self.packing is None or self.documents_per_row == 1, "documents_per_row", self.documents_per_row, alone)
        for number, each in enumerate(self.filters):
            known = each.source is None or each.source < len(self.sources)
            require(known, f"filters.{number}.source", each.source, f"less than the {len(self.sources)} sources")
        require(self.seed >= 0, "seed", self.seed, "0 or more")
        steps = [stage.step for stage in self.stages]
        require(steps[:1] == [0], "stages", steps, "a first stage at step 0")
        require(steps == sorted(set(steps)), "stages", steps, "ascending steps")
        for number, stage in enumerate(self.stages):
            count = len(self.sources)
            for name, what in (("weights", "weight"), ("epochs", "number of epochs")):
                expected = (
                    f"one {what} for each of {count} source{'s' * (count != 1)}; --data.stages [] makes one stage "
                    f"with equal shares, --data.stages.{number}.{name} sets those of this stage"
                )
                require(
                    len(getattr(stage, name)) in (0, count), f"stages.{number}.{name}", getattr(stage, name), expected
                )
        check_ranges(self, rows=(1, MOST_ROWS), tokens=(1, MOST_TOKENS), patches=(0, MOST_PATCHES))
        check_ranges(self, documents_per_row=(1, self.tokens), max_skips=(0, 10**6))
        check_ranges(self, min_pixels=(1, MOST_PIXELS), max_pixels=(1, MOST_PIXELS))
        check_ranges(self, prefetch=(0, 1024), workers=(1, 1024), processes=(0, 1024), cache_mb=(0, 10**7))
        for name in ("tokens", "patches"):
            most = max(getattr(part, name) or 0 for part in (self, *self.stages))
            in_batch = f"{name} of a whole batch: rows {self.rows} times {name} {most}"
            require(self.rows * most <= MOST_IN_BATCH, in_batch, self.rows * most, f"at most {MOST_IN_BATCH}")

    def open_sources(self, readable_among: int = 8) -> tuple[Source, ...]:
        """The sources, each with at least one sample.

        Args:
            readable_among: first samples of a source of which at least one has to be readable; 0 for none.

        Raises:
            ConfigError: one cannot be opened or is empty, or none of its first samples can be read.
        """
        opened = []
        for number, config in enumerate(self.sources):
            try:
                source: Source = config.build()
            except ConfigError as error:
                raise ConfigError(f"data.sources.{number}: {error}") from error
            require(len(source) > 0, f"data.sources.{number} ({source.name})", len(source), "at least one sample")
            _check_readable(source, readable_among, f"data.sources.{number} ({source.name})")
            opened.append(source)
        return tuple(opened)

    def processor(self, directory: str | Path, layout: VisualLayout) -> Processor:
        """The processor of an HF directory, under this config's pixel limits and the layout a model wants."""
        return Processor.from_hf(directory, self.min_pixels, self.max_pixels, layout, self.special_tokens_in_text)


def _check_readable(source: Source, most: int, field: str) -> None:
    """Raise ConfigError where none of the first samples can be read: then the file is not of this kind."""
    errors: list[SampleError] = []
    for index in range(min(most, len(source))):
        try:
            source[index]
            return
        except SampleError as error:
            errors.append(error)
    if errors:
        raise ConfigError(f"{field}: none of its first {len(errors)} samples can be read; the first: {errors[0]}")


def check_takes(model: VlmConfig, source: Source, field: str, most: int = 8) -> None:
    """Refuse samples with pictures for a text model before the first step; each would be skipped.

    Args:
        model: what the model is.
        source: the samples.
        field: names the source in the message.
        most: first samples that are looked at. Where one of them can be used, others may have pictures.

    Raises:
        ConfigError: all of them have pictures, or cannot be read, and the model has no tower.
    """
    if model.vision is not None:
        return
    pictures = False
    for index in range(min(most, len(source))):
        try:
            found = source[index].has_visuals
        except SampleError:
            continue
        if not found:
            return
        pictures = True
    if pictures:
        raise ConfigError(
            f"{field} ({source.name}): its samples have pictures, but {model.family} is a text model; choose a source "
            "of texts, or a model with pictures (init)"
        )

"""Rows of a run: any rows of any step, as a pure function of the config and the step.

The plan says which draws stand in which row, the loader finds the sample of a draw, and collation packs
them. Nothing is remembered between steps: a process asks for the rows its devices own, a resumed run for the step it
stopped at, and both get what an undisturbed single process would have got.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from rave_jax.batch import Batch
from rave_jax.config import ConfigError, require
from rave_jax.data.collate import BatchShape, collate, round_up
from rave_jax.data.config import DataConfig, Stage, check_takes
from rave_jax.data.loading import Loader
from rave_jax.data.order import Order
from rave_jax.data.plan import EqualRows, RowPlan
from rave_jax.data.processor import Processor
from rave_jax.data.sample import Sample, Source
from rave_jax.data.skips import Skip


class Rows(NamedTuple):
    """Some rows of the batch of a step.

    Fields:
        batch: the rows, as numpy arrays.
        skips: samples that could not be used for them.
    """

    batch: Batch
    skips: tuple[Skip, ...]


class Pipeline:
    """Rows of a run.

    Args:
        config: what to read.
        processor: the model's processor; `DataConfig.processor` gives it.
        sources: of `DataConfig.open_sources`, where they are open already.
        plan: which draws stand in which row; None for equal parts of `documents_per_row` samples.

    Raises:
        ConfigError: a source cannot be opened, is empty or has pictures for a text model, or `equal_rows` refuses the
            config.
    """

    def __init__(
        self,
        config: DataConfig,
        processor: Processor,
        sources: Sequence[Source] | None = None,
        plan: RowPlan | None = None,
    ):
        self.config = config
        self.processor = processor
        self.sources: tuple[Source, ...] = config.open_sources() if sources is None else tuple(sources)
        for number, source in enumerate(self.sources):
            check_takes(processor.rules.config, source, f"data.sources.{number}")
        self.plan: RowPlan = equal_rows(config, processor) if plan is None else plan
        equal = (1.0,) * len(self.sources)
        stages = [(self.plan.first_draw(stage.step), stage.weights or equal) for stage in config.stages]
        order = Order([len(source) for source in self.sources], stages, config.seed)
        self._loader = Loader(config, self.sources, order, processor)
        self.skip_log = self._loader.skip_log
        """Says which samples are not used."""
        self.skipped: Counter[str] = Counter()
        """Samples skipped so far in rows that were counted, by reason."""

    def shape(self, step: int) -> BatchShape:
        """Shape of the whole batch of a step, over all hosts."""
        return self.plan.shape(step)

    def load(self, step: int, start: int, stop: int) -> Rows:
        """Rows start..stop-1 of the batch of a step, and no others are loaded. Use it from any thread.

        Raises:
            SampleError: a sample cannot be used and `on_error` is "fail", or too many one after another cannot.
        """
        shape = self.plan.shape(step)
        require(0 <= start < stop <= shape.rows, "rows", (start, stop), f"a range within {shape.rows} rows")
        rows = [[self._loader.load(each) for each in self.plan.row(step, row)] for row in range(start, stop)]
        rules = self.processor.rules
        batch = collate(
            [[each.example for each in row] for row in rows],
            shape._replace(rows=stop - start),
            rules.patch_sizes,
        )
        return Rows(batch, tuple(skip for row in rows for each in row for skip in each.skips))

    def count(self, skips: Sequence[Skip]) -> None:
        """Count the skips of rows that are used: what is loaded ahead and not used does not count."""
        self.skipped.update(skip.reason for skip in skips)

    def rows(self, step: int, start: int, stop: int) -> Batch:
        """Rows start..stop-1 of the batch of a step, as `load` gives them, counted."""
        rows = self.load(step, start, stop)
        self.count(rows.skips)
        return rows.batch

    def samples(self, step: int, row: int) -> list[Sample]:
        """The samples of one row, replacements made, for pictures and tables."""
        found = [self._loader.load(each) for each in self.plan.row(step, row)]
        return [self.sources[each.source][each.index] for each in found]

    def state(self, step: int) -> dict[str, Any]:
        """What to save with a checkpoint before `step` is taken: JSON-ready."""
        return {**self.plan.state(step), "skipped": dict(self.skipped), **self._facts()}

    def _facts(self) -> dict[str, Any]:
        """What the samples of a step depend on, besides the curriculum."""
        lengths = [len(source) for source in self.sources]
        facts = {"seed": self.config.seed, **self.plan.facts(), "samples": lengths}
        return {**facts, "fingerprints": [source.fingerprint for source in self.sources]}

    def restore(self, state: Mapping[str, Any]) -> int:
        """Take up a saved state; returns the step to go on with.

        Raises:
            ConfigError: the state was saved under another seed, or by a run with another number of rows or samples, or
                with other samples or another order of them: its step would not be where it stopped.
        """
        facts = self._facts()
        found = facts.pop("fingerprints")
        saved = state.get("fingerprints", found)  # states of old runs have none
        for name, value in facts.items():
            if name not in state:
                raise ConfigError(
                    f"the data state of the checkpoint has no entry {name}: it is damaged; delete the checkpoint, "
                    "so that the one before it is taken"
                )
            require(
                state.get(name) == value, f"data.{name}", value, f"{state.get(name)!r} as in the run that was saved"
            )
        for number, source in enumerate(self.sources):
            if found[number] != saved[number]:
                raise ConfigError(
                    f"data.sources.{number} ({source.name}) holds other records than in the run that was saved, or the "
                    f"same in another order (fingerprint {found[number]}, expected {saved[number]}): put the data back "
                    "as it was, or start a new run in another output_dir"
                )
        self.skipped = Counter(state.get("skipped", {}))
        return self.plan.restore(state)


def equal_rows(config: DataConfig, processor: Processor) -> EqualRows:
    """The plan of a config: each row in `documents_per_row` equal parts.

    Raises:
        ConfigError: the visual layout has fewer regions than a row has documents.
    """
    most, each = processor.layout.max_regions, config.documents_per_row
    fits = processor.layout.regions is None or each <= most
    require(fits, "data.documents_per_row", each, f"at most max_regions {most}: each document needs a region")

    def size(stage: Stage) -> tuple[int, int, int]:
        tokens = config.tokens if stage.tokens is None else stage.tokens
        patches = config.patches if stage.patches is None else stage.patches
        return stage.step, tokens, round_up(patches, processor.rules.patch_sizes.window)

    return EqualRows(config.rows, tuple(map(size, config.stages)), each, most)

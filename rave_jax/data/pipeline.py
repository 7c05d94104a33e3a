"""Rows of a run: any rows of any step, as a pure function of the config and the step.

The plan says which samples stand in which row, the loader encodes them, and collation packs them. Nothing is remembered
between steps: a process asks for the rows its devices own, a resumed run for the step it stopped at, and both get what
an undisturbed single process would have got.
"""

from __future__ import annotations

import itertools
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from rave_jax.batch import Batch
from rave_jax.config import require
from rave_jax.data.collate import BatchShape, collate, round_up
from rave_jax.data.config import DataConfig, Stage, check_takes
from rave_jax.data.filters import LIMITS
from rave_jax.data.loading import Loader
from rave_jax.data.order import Order
from rave_jax.data.packing.index import Progress
from rave_jax.data.packing.packed import packed_rows
from rave_jax.data.packing.plan import PackedRows
from rave_jax.data.plan import EqualRows, RowPlan
from rave_jax.data.processor import Processor
from rave_jax.data.sample import Sample, SampleError, Source
from rave_jax.data.skips import Skip, SkipLog, describe
from rave_jax.data.state import Origin, resumed, saved

log = logging.getLogger(__name__)


class Rows(NamedTuple):
    """Some rows of the batch of a step.

    Fields:
        batch: the rows, as numpy arrays.
        documents: for each planned document, in the order of the rows: None where it is in its row, and else why its
            sample could not be used.
        left_out: samples that the plan leaves out.
    """

    batch: Batch
    documents: tuple[Skip | None, ...] = ()
    left_out: tuple[Skip, ...] = ()

    @property
    def skips(self) -> tuple[Skip, ...]:
        """Samples that could not be used."""
        return (*self.left_out, *(skip for skip in self.documents if skip is not None))


class Pipeline:
    """Rows of a run.

    Args:
        config: what to read.
        processor: the model's processor; `DataConfig.processor` gives it.
        sources: of `DataConfig.open_sources`, where they are open already.
        plan: which samples stand in which row; None for that of the config.
        keeps: does this process keep what packing measures of samples beside the data? One of a job is enough.

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
        keeps: bool = True,
    ):
        self.config = config
        self.processor = processor
        self.sources: tuple[Source, ...] = config.open_sources() if sources is None else tuple(sources)
        for number, source in enumerate(self.sources):
            check_takes(processor.rules.config, source, f"data.sources.{number}")
        self._given, self._keeps = plan, keeps
        self._origin = Origin(tuple(len(source) for source in self.sources))
        self.plan: RowPlan = self._planned(self._origin)
        self._loader = Loader(config, self.sources, processor)
        self.skip_log = SkipLog()
        """Says which samples are not used."""
        self.skipped: Counter[str] = Counter()
        """Samples skipped so far in rows that were counted, by reason."""
        self._in_a_row: list[Skip] = []

    def _planned(self, origin: Origin) -> RowPlan:
        if self._given is not None:
            return self._given
        order = Order(tuple(len(source) for source in self.sources), self.config.seed, restarts=origin.restarts)
        if self.config.packing is not None:
            return packed_rows(self.config, self.processor, self.sources, order, origin.lengths, self._keeps)
        return equal_rows(self.config, self.processor, order, origin.lengths)

    def shape(self, step: int) -> BatchShape:
        """Shape of the whole batch of a step, over all hosts."""
        return self.plan.shape(step)

    def load(self, step: int, start: int, stop: int) -> Rows:
        """Rows start..stop-1 of the batch of a step, and no others are loaded. Use it from any thread.

        A sample that cannot be used leaves a hole: its row has that much more padding.

        Raises:
            SampleError: a sample cannot be used and `on_error` is "fail".
        """
        shape = self.plan.shape(step)
        require(0 <= start < stop <= shape.rows, "rows", (start, stop), f"a range within {shape.rows} rows")
        rows = [[self._loader.load(each) for each in self.plan.row(step, row)] for row in range(start, stop)]
        batch = collate(
            [[each for each in row if not isinstance(each, Skip)] for row in rows],
            shape._replace(rows=stop - start),
            self.processor.rules.patch_sizes,
        )
        documents = tuple(each if isinstance(each, Skip) else None for row in rows for each in row)
        return Rows(batch, documents, self.plan.left_out(step) if start == 0 else ())

    def count(self, rows: Rows) -> None:
        """Count the skips of rows that are used, and say them: what is loaded ahead and not used does not count.

        Raises:
            SampleError: more than `max_skips` samples one after another cannot be used.
        """
        for skip in rows.skips:
            self.skip_log.add(skip)
            self.skipped[skip.reason] += 1
        for skip in rows.documents:
            if skip is None:
                self._in_a_row.clear()
            elif skip.reason not in LIMITS:
                self._in_a_row.append(skip)
                self._check_skips(self._in_a_row)

    def _check_skips(self, skips: Sequence[Skip]) -> None:
        if len(skips) > self.config.max_skips:
            raise SampleError(
                f"{len(skips)} consecutive samples cannot be used: {describe(skips)}; "
                f"the last: {skips[-1].source}: {skips[-1].message}"
            )

    def rows(self, step: int, start: int, stop: int) -> Batch:
        """Rows start..stop-1 of the batch of a step, as `load` gives them, counted."""
        rows = self.load(step, start, stop)
        self.count(rows)
        return rows.batch

    def samples(self, step: int, row: int) -> list[Sample]:
        """The samples of the documents that `load` puts in a row, for pictures and tables."""
        planned = self.plan.row(step, row)
        used = [each for each in planned if not isinstance(self._loader.load(each), Skip)]
        return [self._loader.sample(each) for each in used]

    def tell(self, progress: Progress | None) -> None:
        """Whom to tell how far measuring is, while rows wait for it."""
        if isinstance(self.plan, PackedRows):
            self.plan.tell(progress)

    def close(self) -> None:
        """Keep what was measured of samples, where that is done."""
        if isinstance(self.plan, PackedRows):
            self.plan.close()

    def check_samples(self) -> None:
        """See that one of the first samples of the run can be used.

        Raises:
            SampleError: none of the first `max_skips` + 1 can, or the first cannot and `on_error` is "fail". Or the
                filters leave no sample over.
        """
        skips: list[Skip] = []
        filtered, most = 0, sum(len(source) for source in self.sources)
        for step in itertools.count():
            for row in range(self.shape(step).rows):
                for document in self.plan.row(step, row):
                    loaded = self._loader.load(document)
                    if not isinstance(loaded, Skip):
                        return
                    if loaded.reason not in LIMITS:
                        skips.append(loaded)
                        self._check_skips(skips)
                        continue
                    filtered += 1
                    if filtered > most:
                        raise SampleError(
                            f"no sample is left over by the filters of data.filters; the last: {loaded.message}"
                        )

    def state(self, step: int) -> dict[str, Any]:
        """What to save with a checkpoint before `step` is taken: JSON-ready."""
        own = saved(self._origin, self._facts(), self.sources)
        return {**self.plan.state(step), "skipped": dict(self.skipped), **own}

    def _facts(self) -> dict[str, Any]:
        """What the samples of a step depend on, besides the sources and the curriculum."""
        return {"seed": self.config.seed, **self.plan.facts()}

    def restore(self, state: Mapping[str, Any]) -> int:
        """Take up a saved state; returns the step to go on with.

        Raises:
            ConfigError: the state was saved under another seed, or by a run with another number of rows: its step would
                not be where it stopped. Or a source has changed, and `on_change` is "refuse".
        """
        found = resumed(state, self._facts(), self.sources, self.config.on_change)
        if found.origin != self._origin:
            self._origin = found.origin
            self.plan = self._planned(found.origin)
        step = self.plan.restore(state, found.changed)
        self.skipped = Counter(state.get("skipped", {}))
        for line in found.says:
            log.warning("after step %d: %s", step, line)
        if found.changed and isinstance(self.plan, PackedRows):
            log.warning("after step %d: samples of the steps that were planned together may come again", step)
        return step


def equal_rows(config: DataConfig, processor: Processor, order: Order, lengths: Sequence[int]) -> EqualRows:
    """The plan of a config: each row in `documents_per_row` equal parts.

    Args:
        config: the data.
        processor: says how many patches and regions there are.
        order: of the samples, without stages.
        lengths: samples of each source by which `Stage.epochs` mixes.

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

    for stage in config.stages:
        order = order.then(stage.step * config.rows * each, stage.shares(lengths))
    return EqualRows(config.rows, tuple(map(size, config.stages)), each, most, order)

"""The row plan of packing: windows of draws, fitted into rows and dealt to steps.

Draws are taken up in their order until they fill `lookahead` steps; `fit.py` puts them into rows and `steps.py` rows
into steps. Draws of rows that wait go on to the next window. So a window is a pure function of the draws carried over
to it, the next draw and the sizes, and that is what a state is.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Collection, Mapping, Sequence
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np

from rave_jax.config import ConfigError
from rave_jax.data.collate import BatchShape
from rave_jax.data.order import Order
from rave_jax.data.packing.choice import Choice
from rave_jax.data.packing.config import Packing
from rave_jax.data.packing.fit import fit
from rave_jax.data.packing.index import Progress
from rave_jax.data.packing.report import StepReport, report
from rave_jax.data.packing.sizes import Room, Sizes
from rave_jax.data.packing.steps import arrange, group, shuffled
from rave_jax.data.packing.taking import NOTHING, Draws, Taking, Waiting, drawn, waiting_again
from rave_jax.data.plan import Budget, PlannedDocument
from rave_jax.data.skips import Skip
from rave_jax.typing import Int, NpArray

PRIORITY, LONGEST_WAIT = 4, 16
"""Windows after which a draw that waits is placed before others, and after which its row waits for no others."""
KEPT = 32
"""Windows that are remembered."""
AHEAD = 2
"""Windows whose samples are measured ahead."""


class PackedStage(NamedTuple):
    """A stage of the curriculum, as packing needs it.

    Fields:
        step: its first step.
        shares: of the sources.
        room: of its rows.
    """

    step: int
    shares: tuple[Fraction, ...]
    room: Room


class State(NamedTuple):
    """Where a window begins.

    Fields:
        step: its first step.
        next_draw: the first draw that no window before it took up.
        stages: the first draw of each stage that has begun.
        waiting: the draws carried over.
        unusable: draws before `next_draw` that could not be used, one after another.
    """

    step: int
    next_draw: int
    stages: tuple[int, ...]
    waiting: Waiting
    unusable: int


BEGIN = State(0, 0, (), NOTHING, 0)


class Window(NamedTuple):
    """Steps that were planned together.

    Fields:
        begin: where it begins.
        end: where the next one begins.
        draws: of all its rows.
        steps: for each step, for each row, the places in `draws` of its documents.
        skips: samples that were left out of it.
    """

    begin: State
    end: State
    draws: Draws
    steps: list[list[Int[NpArray, "N"]]]
    skips: tuple[Skip, ...]


class PackedRows:
    """The plan of packing. Rows are planned window by window; those of windows near the last are remembered."""

    def __init__(
        self,
        packing: Packing,
        rows: int,
        stages: Sequence[PackedStage],
        order: Order,
        choice: Choice,
        regions: bool = False,
    ):
        """
        Args:
            packing: the config.
            rows: of a batch over all hosts.
            stages: of the curriculum, ascending, the first at step 0.
            order: of the samples, without stages.
            choice: says what is known of samples, and which are used.
            regions: does the visual layout have regions?
        """
        self._packing, self._rows, self._stages = packing, rows, tuple(stages)
        self._order, self._choice, self._regions = order, choice, regions
        self._base = BEGIN
        self._lock = threading.RLock()
        self._windows: OrderedDict[int, Window] = OrderedDict()
        """By first step."""
        self._asked = 0
        """Draws before it were asked for ahead."""

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._lock = threading.RLock()

    def shape(self, step: int) -> BatchShape:
        """Shape of the whole batch of a step, over all hosts."""
        room = self._stage(step).room
        return BatchShape(self._rows, room.tokens, room.patches)

    def row(self, step: int, row: int) -> tuple[PlannedDocument, ...]:
        """The documents of a row, each with a budget of its own size."""
        window = self._window(step)
        draws = window.draws.take(window.steps[step - window.begin.step][row])
        budgets = zip(*(column.tolist() for column in draws.sizes[:3]), strict=True)
        samples = zip(draws.source.tolist(), draws.index.tolist(), draws.messages.tolist(), strict=True)
        return tuple(
            PlannedDocument(source, index, Budget(*budget), messages or None)
            for (source, index, messages), budget in zip(samples, budgets, strict=True)
        )

    def left_out(self, step: int) -> tuple[Skip, ...]:
        """Samples that no row has because they cannot be used, said at the first step of their window."""
        window = self._window(step)
        return window.skips if step == window.begin.step else ()

    def tell(self, progress: Progress | None) -> None:
        """Whom to tell how far measuring is, while rows wait for it."""
        self._choice.index.progress = progress

    def close(self) -> None:
        """Stop measuring samples ahead, and keep what was measured."""
        self._choice.index.close()

    def report(self, step: int) -> StepReport:
        """How well the rows of a step are packed."""
        window = self._window(step)
        rows = window.steps[step - window.begin.step]
        places = np.concatenate(rows)
        row = np.repeat(np.arange(len(rows)), [len(each) for each in rows])
        cut = int((window.draws.messages[places] > 0).sum())
        return report(window.draws.sizes.take(places), row, len(rows), self._stage(step).room, cut, self._regions)

    def facts(self) -> dict[str, Any]:
        """The settings that say which samples a step has."""
        packing = self._packing
        decide = ("documents", "lookahead", "long", "whole_epochs")
        facts = {f"packing.{name}": getattr(packing, name) for name in decide}
        return {"rows": self._rows, **facts, **self._choice.facts()}

    def state(self, step: int) -> dict[str, Any]:
        """Where the window of a step begins: its first step and draw, and the draws that were carried over to it."""
        begin = self._window(step).begin
        order, _ = self._ordered(begin)
        by_wait: dict[str, list[int]] = {}
        for draw, waited in zip(begin.waiting.draw.tolist(), begin.waiting.waited.tolist(), strict=True):
            by_wait.setdefault(str(waited), []).append(draw)
        return {
            "step": step,
            "taken": list(order.taken(begin.next_draw)),
            "window": {
                "step": begin.step,
                "next_draw": begin.next_draw,
                "stages": list(begin.stages),
                "waiting": by_wait,
                "unusable": begin.unusable,
            },
            "row_size": list(self._stage(begin.step).room[:3]),
        }

    def restore(self, state: Mapping[str, Any], changed: Collection[int] = ()) -> int:
        """Take up a state. Of sources that have changed no draw is carried over, and the draws of the window are dealt
        again to steps from the one to go on with: some come again, and none of the other sources is lost.

        Raises:
            ConfigError: it is of a run without packing, or one with rows of another size.
        """
        window, step = state.get("window"), int(state["step"])
        if not isinstance(window, Mapping):
            raise ConfigError(
                "data.packing is set, but the saved run had none: its rows go on as they were only without; leave "
                "data.packing out, or start a new run in another output_dir"
            )
        begin = State(window["step"], window["next_draw"], tuple(window["stages"]), NOTHING, window["unusable"])
        waiting = sorted((draw, int(waited)) for waited, draws in window["waiting"].items() for draw in draws)
        again = waiting_again(waiting, self._ordered(begin)[0])
        kept = ~np.isin(again.source, list(changed))
        begin = begin._replace(waiting=Waiting(*(column[kept] for column in again)))
        size = list(self._stage(begin.step).room[:3])
        if state["row_size"] != size:
            raise ConfigError(
                f"data.tokens, data.patches and the most regions are {size}, expected {state['row_size']} as in the "
                "run that was saved: the rows of a window are planned for them; start a new run in another output_dir, "
                "or give other sizes to a stage that has not begun"
            )
        with self._lock:
            self._windows.clear()
            self._base = begin._replace(step=step) if changed else begin
        return step

    def _stage(self, step: int) -> PackedStage:
        return next(stage for stage in reversed(self._stages) if stage.step <= step)

    def _window(self, step: int) -> Window:
        """The window that has a step."""
        with self._lock:
            begun = [first for first in self._windows if first <= step]
            window = self._windows[max(begun)] if begun else None
            if window is None:
                begin = self._base if self._base.step <= step else BEGIN
                window = self._planned(begin)
            while step >= window.end.step:
                window = self._planned(window.end)
            return window

    def _planned(self, begin: State) -> Window:
        window = self._windows.get(begin.step)
        if window is None:
            window = self._windows[begin.step] = self._plan(begin)
            while len(self._windows) > KEPT:
                self._windows.popitem(last=False)
        return window

    def _plan(self, begin: State) -> Window:
        """Plan the window that begins there."""
        order, stages = self._ordered(begin)
        stage = self._stage(begin.step)
        later = [each.step for each in self._stages if each.step > begin.step]
        steps = min([self._packing.lookahead, *(step - begin.step for step in later[:1])])
        one_each = self._packing.documents == 1
        taking = Taking(self._choice, order, stage.room, begin.next_draw, begin.waiting, begin.unusable)
        if one_each:
            taking.take(documents=self._rows)
        else:
            taking.take(rows=steps * self._rows + self._rows // 2, whole_epochs=self._packing.whole_epochs)
        draws = taking.draws
        if one_each:
            made, waits = [[np.arange(n, n + 1) for n in range(self._rows)]], np.arange(self._rows, len(draws.draw))
        else:
            made, waits = self._rows_of(draws, stage.room, steps, taking.at_end, begin.step)
        stop = taking.next_draw + AHEAD * max(taking.next_draw - begin.next_draw, self._rows)
        self._choice.ahead(*drawn(order, max(taking.next_draw, self._asked), stop))
        self._asked = stop
        end = State(begin.step + len(made), taking.next_draw, stages, draws.take(waits).waiting(), taking.unusable)
        return Window(begin, end, draws, made, tuple(taking.skips))

    def _ordered(self, begin: State) -> tuple[Order, tuple[int, ...]]:
        """The order with the stages that have begun, and their first draws."""
        order, firsts = self._order, list(begin.stages)
        for number, stage in enumerate(self._stages):
            if stage.step > begin.step:
                break
            if number == len(firsts):
                firsts.append(begin.next_draw)
            order = order.then(firsts[number], stage.shares)
        return order, tuple(firsts)

    def _rows_of(
        self, draws: Draws, room: Room, steps: int, last: bool, step: int
    ) -> tuple[list[list[Int[NpArray, "N"]]], Int[NpArray, "N"]]:
        """The rows of each step, as places of their documents, and the places of draws that wait.

        Args:
            draws: of the window.
            room: of a row.
            steps: the most steps.
            last: are no more draws to come, so that no row waits for others?
            step: the first one.
        """
        rows, sizes = self._rows, draws.sizes
        need = room.rows(sizes) if len(draws.draw) else 0
        count = max(-int(-need // rows) if last else int(need // rows), 1) * rows
        row = fit(sizes, draws.waited >= PRIORITY, room, count, rows, last=last)
        placed = np.flatnonzero(row >= 0)
        sums = Sizes(*(np.bincount(row[placed], column[placed], count).astype(np.int64) for column in sizes))
        work = sums.patches
        if last:
            order = np.argsort(-work, kind="stable")
            found = [order[first : first + rows] for first in range(0, count, rows)][:steps]
        else:
            due = np.zeros(count, bool)
            due[row[placed[draws.waited[placed] >= LONGEST_WAIT]]] = True
            found = group(work, room.full(sums, np.bincount(row[placed], minlength=count)), due, rows, steps)
        by_row = placed[np.lexsort((draws.draw[placed], row[placed]))]
        bounds = np.searchsorted(row[by_row], np.arange(count + 1))
        made = []
        for number in shuffled(len(found), self._order.seed, step):
            block = found[number][arrange(work[found[number]])]
            made.append([by_row[bounds[place] : bounds[place + 1]] for place in block.tolist()])
        used = np.zeros(len(draws.draw), bool)
        for places in (places for each in made for places in each):
            used[places] = True
        return made, np.flatnonzero(~used)

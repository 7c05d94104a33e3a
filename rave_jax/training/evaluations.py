"""Evaluations that are run between steps: when, with which weights, and what they leave behind.

Each time is a folder `evaluation/NAME/steps/STEP`, made under another name and put in place when it is complete, so
that none is half-written. `result.json` in it says what it is a result of: a run that continues takes a result that is
there instead of making it again. That of the last step is `evaluation/NAME` too.

Everything is made once, for the abstract model: programs are compiled the first time, and weights and caches are let go
of in between.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Generator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from jax.sharding import Mesh

from rave_jax import config as configs
from rave_jax.checkpoint.store import StoreError
from rave_jax.config import ConfigError
from rave_jax.data.processor import Processor
from rave_jax.data.sample import SampleError, Source
from rave_jax.evaluation.config import Eval
from rave_jax.evaluation.subject import Check, ModelSubject
from rave_jax.evaluation.suites import Evaluation, subject_of
from rave_jax.evaluation.summary import Summary
from rave_jax.models.vlm import Vlm
from rave_jax.parallel import agree, hosts
from rave_jax.training.config import TrainConfig
from rave_jax.training.directory import RunDirectory

RESULT = "result.json"
Values = dict[str, float]


class _Periodic(NamedTuple):
    """An evaluation, where it stands in `final`, and what it is made of."""

    number: int
    config: Eval
    evaluation: Evaluation
    subject: ModelSubject


class Evaluations:
    """The evaluations of a run that have `every`. Every process of a job calls them alike; the first one writes."""

    def __init__(
        self,
        config: TrainConfig,
        sources: Mapping[int, Source],
        model: Vlm,
        processor: Processor,
        mesh: Mesh,
        directory: RunDirectory,
    ):
        """
        Args:
            config: of the run.
            sources: the samples of its evaluations, by their place in `final`.
            model: abstract.
            processor: of the model.
            mesh: where its weights will be.
            directory: of the run.

        Raises:
            ConfigError: no sample of an evaluation fits its budgets, or the model cannot be asked.
        """
        self._steps, self._directory = config.steps, directory
        self._items: list[_Periodic] = []
        self._summaries: dict[str, Summary] = {}
        self._said: set[str] = set()
        self._after_step: int | None = None
        for number, stage in enumerate(config.final):
            if isinstance(stage, Eval) and stage.every is not None:
                with _named(number):
                    subject = subject_of(stage, model, processor, mesh)
                    _check_fits(stage, sources[number], subject)
                evaluation = Evaluation(stage, sources[number], subject)
                self._items.append(_Periodic(number, stage, evaluation, subject))

    def continue_after(self, step: int) -> None:
        """The job continues a run. Without this no result that is in the directory is the run's.

        Args:
            step: of the checkpoint that it continues from.
        """
        self._after_step = step

    def shapes(self) -> dict[int, Any]:
        """Shapes of what each keeps on the devices while it runs, by its place in `final`."""
        return {item.number: item.subject.shapes() for item in self._items}

    def due(self, step: int) -> bool:
        """Is one of them to be run when so many steps are done?"""
        return any(self._is_due(item, step) for item in self._items)

    def run(
        self,
        step: int,
        model: Vlm,
        check: Check,
        say: Callable[[str], None],
        write: Callable[[Values], None],
    ) -> None:
        """Run those that are due, or take their results where they are complete.

        Args:
            step: steps that are done.
            model: with the weights after them.
            check: called between two pieces of work, at the same places on all processes; what it raises ends the
                evaluation, of which nothing stays.
            say: takes lines for the terminal.
            write: takes the values of each by name, for the metrics of the step.

        Raises:
            ConfigError, SampleError: as `Evaluation.run`.
            StoreError: results cannot be written.
        """
        for item in self._items:
            if not self._is_due(item, step):
                continue
            values = agree.from_first(self._complete(item, step) if hosts.is_first() else None)
            if values is None:
                values = self._run(item, step, model, check, say)
            elif step == self._after_step:
                continue  # its row was written before the checkpoint that the run continues from
            write({f"eval/{item.config.name}/{name}": value for name, value in values.items()})

    def last(self, number: int) -> Summary | None:
        """Put the result of the last step where that of an evaluation without `every` is.

        Args:
            number: the evaluation's place in `final`.

        Returns:
            its summary; None where another job of the run made it.

        Raises:
            KeyError: the evaluation has no `every`.
            OSError: it cannot be written.
        """
        item = {item.number: item for item in self._items}[number]
        if hosts.is_first():
            folder = self._folder(item.config)
            result = folder / "steps" / str(self._steps)
            # The summary goes last: where it is, the rest is.
            for path in sorted(result.iterdir(), key=lambda path: path.name == "summary.json"):
                if path.is_dir():
                    shutil.rmtree(folder / path.name, ignore_errors=True)
                    shutil.copytree(path, folder / path.name)
                elif path.name != RESULT:
                    shutil.copyfile(path, folder / path.name)
        return self._summaries.get(item.config.name)

    def handles(self, number: int) -> bool:
        """Is the evaluation at this place of `final` one of them?"""
        return any(item.number == number for item in self._items)

    def _is_due(self, item: _Periodic, step: int) -> bool:
        assert item.config.every is not None
        return step > 0 and (step % item.config.every == 0 or step == self._steps)

    def _folder(self, config: Eval) -> Path:
        return self._directory.evaluation(config.name)

    def _run(self, item: _Periodic, step: int, model: Vlm, check: Check, say: Callable[[str], None]) -> Values:
        name = item.config.name
        first = hosts.is_first()
        folder = self._folder(item.config) / "steps" / str(step)
        with _put_in_place(folder) if first else contextlib.nullcontext() as made, _with_weights(item, model, check):
            # What is left out is the same every time.
            log = say if name not in self._said else _nothing
            summary = item.evaluation.run(made, log if first else _nothing, check, bar=False)
            if made is not None:
                result = {"values": summary.values(), **self._identity(item, step)}
                (made / RESULT).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
        self._said.add(name)
        self._summaries[name] = summary
        floor = "" if summary.floor is None else f", question-only floor {summary.floor.floor:.1%}"
        say(f"evaluation {name} after step {step}: score {summary.total.score:.1%}{floor} ({summary.seconds:.0f} s)")
        return summary.values()

    def _identity(self, item: _Periodic, step: int) -> dict[str, Any]:
        """What a result depends on, beside the numbers that no run changes when it continues."""
        stage = configs.without_folders(configs.to_json(item.config))
        return {"step": step, "steps": self._steps, "eval": {k: v for k, v in stage.items() if k != "every"}}

    def _complete(self, item: _Periodic, step: int) -> Values | None:
        """The values of a result that is there and is this run's; None where it is to be made."""
        if self._after_step is None:
            return None
        file = self._folder(item.config) / "steps" / str(step) / RESULT
        try:
            found = json.loads(file.read_text(encoding="utf-8"))
            values = {str(name): float(value) for name, value in found.pop("values").items()}
        except (OSError, ValueError, AttributeError, KeyError, TypeError):
            return None
        wanted = json.loads(json.dumps(self._identity(item, step)))
        if step == self._after_step:
            # The weights are those of the checkpoint, whatever `steps` the learning rate follows from here on.
            found["steps"] = wanted["steps"]
        return values if found == wanted else None


def _check_fits(config: Eval, source: Source, subject: ModelSubject) -> None:
    """Refuse budgets that no sample fits before the first step; `Evaluation.run` would after `every` steps."""
    why: SampleError | None = None
    for index in range(min(config.samples, len(source))):
        try:
            error = subject.why_not(config.task.prompt(source[index]))
        except SampleError as broken:
            error = broken
        if error is None:
            return
        why = why or error
    raise ConfigError(f"evaluation {config.name}: no sample can be asked; the first: {why or 'the source is empty'}")


@contextlib.contextmanager
def _named(number: int) -> Generator[None]:
    try:
        yield
    except ConfigError as error:
        raise ConfigError(f"final.{number}: {error}") from error


@contextlib.contextmanager
def _with_weights(item: _Periodic, model: Vlm, check: Check) -> Generator[None]:
    item.subject.use(model, check)
    try:
        yield
    finally:
        item.subject.release()


@contextlib.contextmanager
def _put_in_place(folder: Path) -> Generator[Path]:
    """A folder to write to, which gets its name when all is written, and goes where it is not.

    Raises:
        StoreError: it cannot be written.
    """
    partial = folder.with_name(f"{folder.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        yield partial
        if folder.exists():
            shutil.rmtree(folder)
        os.replace(partial, folder)
    except OSError as error:
        where, why = error.filename or folder, error.strerror or error
        raise StoreError(f"the evaluation of step {folder.name} could not be written to {where}: {why}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _nothing(_line: str) -> None:
    """Discards a line."""

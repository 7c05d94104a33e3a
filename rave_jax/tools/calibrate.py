"""`rave-jax calibrate zero-tuning`: heads and gamma of ZeroTuning for a model, from a calibration set.

What all of `rave-jax calibrate` shares is here too: `Subject`, which is loaded once the samples can be used.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from rave_jax.attention import MechanismConfig, ZeroTuning
from rave_jax.attention.calibrate.zero_tuning import Tuned, ZeroTuningSearch, tune
from rave_jax.checkpoint.store import StoreError, check_writable
from rave_jax.config import ConfigError, dumps
from rave_jax.data.processor import Processor
from rave_jax.data.sample import Sample, SampleError
from rave_jax.data.sources import QaJsonl, SourceConfig, Synthetic
from rave_jax.evaluation.calibration import CalibrationSet, encoded
from rave_jax.parallel.mesh import MeshConfig, make_mesh
from rave_jax.tools import source as sources
from rave_jax.tools.flags import add_fields, given_fields


def add_flags(parser: argparse.ArgumentParser) -> None:
    """How the heads and the gamma are looked for."""
    notes = {
        "grid": "may be given several times; default: " + ", ".join(f"{gamma:g}" for gamma in ZeroTuningSearch.grid)
    }
    add_fields(parser, ZeroTuningSearch, "the search", notes=notes)


def calibrate(arguments: argparse.Namespace) -> None:
    """Run the command: print what was found and write the mechanisms as JSON.

    Raises:
        ConfigError: the flags, the model or the samples cannot be used, or the file cannot be written.
    """
    search = ZeroTuningSearch(**given_fields(arguments, ZeroTuningSearch))
    subject = Subject(arguments, ZeroTuning, lambda processor, sample: encoded(processor, sample, search.criterion))
    examples = subject.samples
    measure = CalibrationSet(subject.model, subject.processor, examples, search.criterion, subject.mesh, arguments.rows)
    layers, heads = subject.sizes
    console = Console(stderr=True)
    with Progress(console=console, disable=not console.is_terminal, transient=True) as progress:
        # Without labels both types of heads meet the grid; fewer runs where one of them is empty.
        profiled = layers if search.profile == "head" else 1
        types = 1 if search.criterion == "accuracy" else 2
        task = progress.add_task("runs", total=1 + profiled * heads + types * (len(set(search.grid)) - 1))

        def counted(gammas: np.ndarray) -> np.ndarray:
            values = measure(gammas)
            progress.advance(task)
            return values

        found = tune(search, counted, layers, heads)
    show(found, search, len(examples), Console())
    subject.write(found.configs)


class Subject[Encoded]:
    """A model that is calibrated, and the samples by which.

    Args:
        arguments: of the command.
        finds: the mechanism that is looked for, which the model may not have.
        encode: a sample as it is measured.

    Attributes:
        samples: what could be used, encoded.
        model, mesh, processor: of the model.

    Raises:
        ConfigError: the model or the samples cannot be used, or the file cannot be written.
    """

    def __init__(
        self,
        arguments: argparse.Namespace,
        finds: type[MechanismConfig],
        encode: Callable[[Processor, Sample], Encoded],
    ):
        self._out: Path = arguments.out.resolve()
        if self._out.exists() and not self._out.is_file():
            raise ConfigError(f"cannot write {self._out}: it exists and is not a file")
        if any(isinstance(mechanism, finds) for mechanism in sources.options_of(arguments.model).mechanisms):
            raise ConfigError(f"{arguments.model} has {finds.__name__} already: give a model without it")
        data = Synthetic(split="heldout") if arguments.data is None else QaJsonl(str(arguments.data))
        self.processor = sources.processor_of(arguments.model)
        self.samples = _usable(data, lambda sample: encode(self.processor, sample), arguments.samples)
        try:
            check_writable(self._out.parent, 0)
        except StoreError as error:
            raise ConfigError(str(error)) from error
        changes: dict[str, object] = {}
        if arguments.dtype is not None:
            changes = {"param_dtype": arguments.dtype, "compute_dtype": arguments.dtype}
        self.model, _, mesh, _ = sources.load(arguments.model, changes=changes)
        self.mesh = make_mesh(MeshConfig()) if mesh is None else mesh
        text = self.model.config.text
        if len(text.attention_layers) < text.num_layers:
            raise ConfigError(
                f"{arguments.model}: only layers {', '.join(map(str, text.attention_layers))} of {text.num_layers} "
                "attend, and the search tries heads in every layer; expected a model whose layers all attend"
            )

    @property
    def sizes(self) -> tuple[int, int]:
        """Layers and heads."""
        return self.model.config.text.num_layers, self.model.config.text.num_heads

    def write(self, configs: Sequence[MechanismConfig]) -> None:
        """The mechanisms as JSON: the whole file, or what was there before."""
        part = self._out.with_name(f".{self._out.name}.part")
        try:
            part.write_text(dumps(tuple(configs)), encoding="utf-8")
            part.replace(self._out)
        except OSError as error:
            part.unlink(missing_ok=True)
            raise ConfigError(f"cannot write {self._out}: {error.strerror or error}") from error
        print(f"{self._out}: {len(configs)} mechanism{'s' * (len(configs) != 1)}")


def _usable[Encoded](data: SourceConfig, encode: Callable[[Sample], Encoded], samples: int) -> list[Encoded]:
    """The first samples of a source that can be used; the others are counted on stderr."""
    source, found = data.build(), []
    refused: Counter[str] = Counter()
    last = None
    for index in range(min(samples, len(source))):
        try:
            found.append(encode(source[index]))
        except SampleError as error:
            refused[error.reason] += 1
            last = error
    if not found:
        raise ConfigError(f"no sample of {source.name} can be used" + (f"; the last: {last}" if last else ""))
    if refused:
        counts = ", ".join(f"{count} {reason}" for reason, count in refused.items())
        print(f"rave-jax: left out: {counts}; the last: {last}", file=sys.stderr)
    return found


def show(found: Tuned, search: ZeroTuningSearch, samples: int, console: Console) -> None:
    """The table of what was tried, and what single heads do."""
    profile = found.profile
    up, total = int(profile.of_type("up").sum()), profile.effect.size
    what = "heads" if search.profile == "head" else "numbers of heads"
    console.print(
        f"{samples:,} samples, {search.criterion} {profile.neutral:.4f} as the model is. Of {total:,} {what} {up:,} "
        f"are up-effective, {total - up:,} down-effective; {profile.dominant} is dominant.",
        highlight=False,
        soft_wrap=True,
    )
    table = Table(box=SIMPLE_HEAD)
    for name in (what, "tuned", "gamma", search.criterion, ""):
        table.add_column(name, justify="right" if name not in (what, "") else "left")
    for trial in found.trials:
        tuned = profile.chosen(trial.kind, search.fraction).sum()
        mark = "kept" if trial == found.best else ""
        table.add_row(trial.kind, f"{tuned:,}", f"{trial.gamma:g}", f"{trial.mean:.4f}", mark)
    console.print(table)

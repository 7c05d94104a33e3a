"""`rave-jax data`: what the data of a config needs, before a run is started with budgets that were guessed; with
`--show`, a page of its rows."""

from __future__ import annotations

import argparse
import contextlib
import logging
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Generator, Sequence
from pathlib import Path

import jax
from rich.console import Console
from rich.table import Table

from rave_jax.command_line import load_command_line
from rave_jax.config import ConfigError
from rave_jax.data.collate import round_up
from rave_jax.data.config import DataConfig
from rave_jax.data.processor import Processor
from rave_jax.data.skips import shortened
from rave_jax.data.survey import Need, Survey, survey
from rave_jax.tools.rows import show_rows
from rave_jax.training.config import TrainConfig
from rave_jax.training.directory import run_directory
from rave_jax.training.init import FromHF, prepare, source_of

PERCENTS = (50, 90, 99, 100)
NARROW = 150
"""Columns where the output is no terminal."""
MOST_ROWS = 256
"""Of one page."""


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags that are not fields of the config."""
    parser.add_argument(
        "--samples", type=_count, default=1000, help="of each source, spread evenly over it (default: 1000)"
    )
    parser.add_argument(
        "--every", action="store_true", help="list every sample that cannot be used, not only one of each kind"
    )
    parser.add_argument(
        "--show",
        type=_rows,
        metavar="ROWS",
        help="write a page of so many rows as the model sees them, and nothing else",
    )
    parser.add_argument("--step", type=_step, help="of the run, whose rows are shown (default: 0)")
    parser.add_argument("--html", type=Path, metavar="FILE", help="the page (default: rows.html)")


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a count, expected a number of at least 1")
    return int(text)


def _step(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a step, expected a number of at least 0")
    return int(text)


def _rows(text: str) -> int:
    if (count := _count(text)) > MOST_ROWS:
        raise argparse.ArgumentTypeError(f"{text!r} rows are more than a page holds, expected at most {MOST_ROWS}")
    return count


def look_at_data(arguments: argparse.Namespace) -> int:
    """Print what the samples of a config need and which of them cannot be used; returns the exit code.

    Args:
        arguments: `words`, a config file and overrides as train.py takes them, and the flags of `add_flags`, which may
            stand among the overrides too.

    Raises:
        ConfigError: the config, a source or the model directory cannot be used.
    """
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    parser = argparse.ArgumentParser("rave-jax data", add_help=False, allow_abbrev=False)
    add_flags(parser)
    parser.set_defaults(**{name: getattr(arguments, name) for name in ("samples", "show", "step", "html")})
    flags, words = parser.parse_known_args(arguments.words)
    every = arguments.every or flags.every
    for name in ("step", "html"):
        if flags.show is None and getattr(flags, name) is not None:
            raise ConfigError(f"--{name} needs --show ROWS")
    config = load_command_line(TrainConfig, words, "rave-jax data")
    if flags.show is not None:
        with _processor(config) as processor:
            print(show_rows(config.data, processor, flags.show, flags.step or 0, flags.html or Path("rows.html")))
        return 0
    sources = config.data.open_sources(readable_among=0)
    with _processor(config) as processor:
        found = [survey(source, processor, flags.samples) for source in sources]
    console = Console(width=shutil.get_terminal_size().columns if sys.stdout.isatty() else NARROW, highlight=False)
    console.print(_table(found))
    for line in [*_unusable(found, every), *_budgets(config.data, processor.rules.patch_sizes.window, found)]:
        console.print(line, markup=False, soft_wrap=True)
    return int(any(each.skips for each in found))


@contextlib.contextmanager
def _processor(config: TrainConfig) -> Generator[Processor]:
    """The processor that a run of the config would have; the run directory is left as it is."""
    directory = run_directory(config.output_dir).model
    if isinstance(config.init, FromHF):
        yield config.data.processor(source_of(config.init, directory), config.model.layout)
        return
    jax.config.update("jax_platforms", "cpu")  # the weights of a tiny model are written too; no accelerator is taken
    with tempfile.TemporaryDirectory() as folder:
        prepare(config.init, Path(folder) / "model")
        yield config.data.processor(Path(folder) / "model", config.model.layout)


def _table(found: Sequence[Survey]) -> Table:
    table = Table(box=None, pad_edge=False, title="tokens / patches of a sample", title_justify="left")
    table.add_column("source")
    for name in ("samples", "measured", "cannot be used", *(f"{p} %" if p < 100 else "most" for p in PERCENTS)):
        table.add_column(name, justify="right")
    for each in found:
        counts = (each.length, len(each.tokens), len(each.skips))
        needs = (each.percentile(percent) for percent in PERCENTS)
        table.add_row(each.name, *(f"{n:,}" for n in counts), *(f"{n.tokens:,} / {n.patches:,}" for n in needs))
    return table


def _unusable(found: Sequence[Survey], every: bool) -> list[str]:
    if every:
        return [f"{skip.source}[{skip.index}] ({skip.reason}): {skip.message}" for each in found for skip in each.skips]
    lines = []
    for each in found:
        for reason, count in Counter(skip.reason for skip in each.skips).most_common():
            first = next(skip for skip in each.skips if skip.reason == reason)
            lines.append(f"{each.name}: {count} {reason}, such as {shortened(first.message, 400)}")
    return [*lines, *(["--every lists them all"] if len(lines) < sum(len(each.skips) for each in found) else [])]


def _budgets(config: DataConfig, window_patches: int, found: Sequence[Survey]) -> list[str]:
    """Which share of the samples each stage's rows hold, and rows that hold 99 % and all of those measured."""
    per_row, lines = config.documents_per_row, []
    if not any(len(each.tokens) for each in found):
        return ["no sample could be measured"]
    for stage in config.stages:
        tokens = config.tokens if stage.tokens is None else stage.tokens
        patches = round_up(config.patches if stage.patches is None else stage.patches, window_patches)
        room = Need(tokens // per_row, patches // per_row)
        used = [each for each, weight in zip(found, stage.weights or [1.0] * len(found), strict=True) if weight]
        of = ", ".join(f"{each.share(room):.1%} of {each.name}" for each in used)
        each_row = f", {per_row} samples in each" if per_row > 1 else ""
        lines.append(f"rows of {tokens} tokens and {patches} patches (from step {stage.step} on{each_row}) hold {of}")
    for percent in (99, 100):
        needs = [each.percentile(percent) for each in found]
        tokens = max(need.tokens for need in needs) * per_row
        patches = round_up(max(need.patches for need in needs) * per_row, window_patches)
        whom = "all that was measured" if percent == 100 else f"{percent} % of the tokens and of the patches"
        lines.append(f"to hold {whom} of each source: --data.tokens {tokens} --data.patches {patches}")
    return lines

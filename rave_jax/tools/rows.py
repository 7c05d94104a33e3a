"""`rave-jax data CONFIG --show 8`: a page of the first rows of a step, as the model sees them."""

from __future__ import annotations

import contextlib
from pathlib import Path

from rave_jax.config import ConfigError
from rave_jax.data.beside import write_whole
from rave_jax.data.config import DataConfig
from rave_jax.data.pipeline import Pipeline
from rave_jax.data.processor import Processor
from rave_jax.data.sample import SampleError
from rave_jax.data.skips import Skip
from rave_jax.look.rows import PackedRow, Spelling, packed_rows, page


def show_rows(config: DataConfig, processor: Processor, count: int, step: int, path: Path) -> str:
    """Write the page; returns what to say of it.

    Args:
        config: what to read.
        processor: of the model.
        count: rows to show; where a step has fewer, those of the next ones follow.
        step: the first of them is of.
        path: of the page.

    Raises:
        ConfigError: the page cannot be written, or rows cannot be made.
    """
    _check_writable(path)
    spelling, rows, skips = Spelling(processor.tokenizer), list[PackedRow](), list[Skip]()
    with contextlib.closing(Pipeline(config, processor)) as pipeline:
        while len(rows) < count:
            at = step if not rows else rows[-1].step + 1
            stop = min(pipeline.shape(at).rows, count - len(rows))
            try:
                loaded = pipeline.load(at, 0, stop)
            except SampleError as error:
                raise ConfigError(str(error)) from error
            rows += packed_rows(loaded.batch, processor.rules.config, spelling, at)
            skips += loaded.skips
    title = f"Rows of step {step}" if rows[-1].step == step else f"Rows of steps {step} to {rows[-1].step}"
    lines = list(dict.fromkeys(f"{skip.source}[{skip.index}] ({skip.reason}): {skip.message}" for skip in skips))
    _write(path, page(rows, title, lines))
    tokens, of = (sum(row.counts[name] for row in rows) for name in ("tokens", "of"))
    documents = sum(row.counts["documents"] for row in rows)
    return (
        f"{path}: {len(rows)} rows with {documents} documents, {1 - tokens / of:.1%} of {of:,} tokens are padding, "
        f"{len(lines)} samples skipped"
    )


def _check_writable(path: Path) -> None:
    """Before the rows are loaded, which may take a while."""
    try:
        is_folder, has_folder = path.is_dir(), path.parent.is_dir()
    except OSError as error:
        raise ConfigError(f"--html {path}: cannot be written: {error.strerror or error}") from error
    if is_folder:
        raise ConfigError(f"--html {path}: it is a directory, expected the name of a file")
    if not has_folder:
        raise ConfigError(f"--html {path}: there is no folder {path.parent}: make it first")


def _write(path: Path, text: str) -> None:
    try:
        write_whole(path, lambda file: file.write(text.encode("utf-8", "backslashreplace")))
        path.chmod(0o644)
    except OSError as error:
        raise ConfigError(f"--html {path}: cannot be written: {error.strerror or error}") from error

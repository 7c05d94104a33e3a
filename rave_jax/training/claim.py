"""A run directory and the one job that trains in it.

Nothing is written before the job knows that it can begin, and what a start wrote that did not get to its first step is
taken back. A process that is killed in between leaves a directory that any config may begin a run in.
"""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
import tempfile
from collections.abc import Generator
from pathlib import Path

from rave_jax import config as configs
from rave_jax.checkpoint.saved_step import StoreError, steps_in
from rave_jax.config import ConfigError
from rave_jax.parallel import agree, hosts
from rave_jax.parallel.shared_disk import check_shared
from rave_jax.training.config import TrainConfig, extension
from rave_jax.training.directory import RunDirectory
from rave_jax.training.init import FromHF, prepare, write_small_files
from rave_jax.training.lease import only_job_in_bucket
from rave_jax.training.lock import only_job


class Claim:
    """A job's hold on its run directory; `claimed` makes one. All processes of the job call it alike."""

    def __init__(self, directory: RunDirectory, config: TrainConfig, held: contextlib.ExitStack):
        self._directory, self._config, self._held = directory, config, held
        self._locked = False
        self._made: list[Path] = []
        self._there: set[str] = set()
        self._text: str | None = None
        self._copied: Path | None = None
        place = next(path for path in (directory.path, *directory.path.parents) if path.is_dir())
        if directory.mirror is not None:
            # Before the first collective: the mark of a dead job is watched for longer than the others wait in one.
            if hosts.is_first():
                self._lock()
            hosts.barrier("the lock of output_dir", config.hosts)
        else:
            with _written(directory):
                field = "output_dir" if place == directory.path else "the folder of output_dir"
                check_shared(place, field, config.hosts)
        found = agree.on_first(self._look, ConfigError, StoreError)
        self.past = None if found["past"] is None else configs.from_json(TrainConfig, found["past"])
        """Config of the run that is continued, or None."""
        self.steps: list[int] = found["steps"]
        """Checkpoints that it has, ascending; the newest need not be sound."""
        self.after_step = 0
        """The step after which this job continues."""
        self.model = directory.model if found["model"] else self._small_files()
        """Directory with the model's config, tokenizer and processor."""

    def _look(self) -> dict:
        directory = self._directory
        if directory.path.is_dir():
            if not self._locked:
                self._lock()
            self._there = {path.name for path in directory.path.iterdir()}
        past = directory.past(self._config)
        self._begun_anew = past is None and directory.config.exists()
        return {
            "past": None if past is None else configs.to_json(past),
            "steps": [] if self._begun_anew else steps_in(directory.checkpoints),
            "model": (directory.model / "config.json").is_file() and not self._begun_anew,
        }

    def _lock(self) -> None:
        mirror = self._directory.mirror
        if mirror is not None:
            self._held.enter_context(only_job_in_bucket(mirror.url, _lost))
        else:
            with _written(self._directory):
                self._held.enter_context(only_job(self._directory.path))
        self._locked = True

    def _small_files(self) -> Path:
        folder = Path(self._held.enter_context(tempfile.TemporaryDirectory(prefix="rave_jax-")))
        with _written(self._directory):
            write_small_files(self._config.init, folder)
        self._copied = folder
        return folder

    def name_source(self, error: ConfigError) -> None:
        """Let an error about a copied file name the directory that the user gave, not the copy."""
        init = self._config.init
        if self._copied is not None and isinstance(init, FromHF):
            error.args = (str(error).replace(str(self._copied), str(Path(init.path).expanduser())),)

    @property
    def text(self) -> str:
        """What config.json says of this run."""
        if self.past is None:
            return configs.dumps(dataclasses.replace(self._config, extended=()))
        return configs.dumps(extension(self.past, self._config, self.after_step))

    def write(self, after_step: int) -> None:
        """Make the directory, if it is not there, and fill in what a run has before it trains.

        Args:
            after_step: the step after which the run goes on.

        Raises:
            ConfigError: another job began here meanwhile.
            StoreError: it cannot be written.
        """
        self.after_step = after_step
        path = self._directory.path
        with _written(self._directory):
            if not path.is_dir():
                self._made = [folder for folder in (path, *path.parents) if not folder.exists()]
                path.mkdir(parents=True, exist_ok=True)
            if self._directory.mirror is None:
                check_shared(path, "output_dir", self._config.hosts)
        agree.on_first(self._write, ConfigError, StoreError)
        hosts.barrier("run directory", self._config.hosts)
        if self._directory.mirror is not None and not hosts.is_first():
            self._directory.mirror.pull("config.json", "model")

    def _write(self) -> None:
        directory = self._directory
        with _written(directory):
            if not self._locked:
                self._lock()
                if directory.config.exists():
                    self._locked = False  # what is here is that job's, and stays
                    raise ConfigError(f"another job has started in {directory}; choose another output_dir")
            if self._begun_anew:
                self._there -= set(OWN)
                _remove(directory.path, OWN)
            self._text = directory.config.read_text() if directory.config.exists() else None
            directory.write_config(self.text)
            prepare(self._config.init, directory.model)
        directory.push()
        if directory.mirror is not None:
            directory.mirror.start()

    def take_back(self) -> None:
        """After an error: remove what a start wrote that did not get to its first step."""
        if not self._locked:  # nothing was written, and what lies here can be another job's
            return
        directory = self._directory
        with contextlib.suppress(OSError):
            if self.past is not None:
                if self._text is not None and not any(
                    step > self.after_step for step in steps_in(directory.checkpoints)
                ):
                    directory.write_config(self._text)
            elif not directory.started and not steps_in(directory.bad_step):
                _remove(directory.path, [name for name in OWN if name not in self._there])
        with contextlib.suppress(StoreError):
            directory.push()

    def remove_empty(self) -> None:
        """Remove the folders that this job made, where nothing is in them."""
        with contextlib.suppress(OSError):
            for path in self._made:
                path.rmdir()


# What a start writes. The config goes last, so that the rest is known as a run's as long as it is there.
OWN = ("model", "model.partial", "checkpoints", "bad_step", "tensorboard", "metrics.jsonl", "config.tmp", "config.json")


@contextlib.contextmanager
def claimed(directory: RunDirectory, config: TrainConfig) -> Generator[Claim]:
    """Hold a run directory for this job. Nothing is written before `Claim.write`, but for a lock where it exists.

    Raises:
        ConfigError: another run lives there, or another job uses it.
        StoreError: it cannot be written.
    """
    with contextlib.ExitStack() as after, contextlib.ExitStack() as held:
        claim = Claim(directory, config, held)
        try:
            yield claim
        except BaseException as error:
            if isinstance(error, ConfigError):
                claim.name_source(error)
            claim.take_back()
            after.callback(claim.remove_empty)  # behind the lock's file
            raise


def _lost(words: str) -> None:
    hosts.tell_the_others(words, 1)
    hosts.end(1, words)


@contextlib.contextmanager
def _written(directory: RunDirectory) -> Generator[None]:
    try:
        yield
    except OSError as error:
        raise StoreError(f"cannot write to {error.filename or directory}: {error.strerror or error}") from error


def _remove(folder: Path, names: list[str] | tuple[str, ...]) -> None:
    for name in names:
        path = folder / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)

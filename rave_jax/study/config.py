"""What a study is: `get_config()` of a file in configs/studies/ returns one Study."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from rave_jax.config import ConfigError, check_fields, check_paths, check_ranges, require
from rave_jax.data.config import MOST_PATCHES, MOST_TOKENS, DataConfig
from rave_jax.data.sources import SourceConfig, Synthetic
from rave_jax.evaluation.config import MOST_AT_ONCE, MOST_SAMPLES
from rave_jax.models.config import ModelOptions
from rave_jax.parallel.hosts import HostsConfig
from rave_jax.parallel.mesh import MeshConfig
from rave_jax.study.decision import Decision
from rave_jax.training.config import TrainConfig
from rave_jax.training.init import FromHF
from rave_jax.training.optimizers import OptimizerConfig

NAME = re.compile(r"[A-Za-z0-9_.+=@-]+")
OVERALL = "all"
"""What the mean over all tasks is called."""
SEED_BEHIND = 1000
"""Added to the seed of the order of samples behind phases: an arm sees other samples than they did."""


@dataclass(frozen=True)
class Start:
    """Where arms begin, and what each of them trains from there."""

    name: str = ""
    """What arms call it."""
    phases: tuple[TrainConfig, ...] = ()
    """Runs that are made once for each seed, each from the weights that the one before it ended with; arms go on from
    the last. Empty: arms begin with `init` of the recipe."""
    recipe: TrainConfig = field(default_factory=TrainConfig)
    """The run of an arm, but for what the arm replaces. Behind phases its `init` is theirs."""
    score_every: int | None = None
    """Steps of training between two scores of the curve; None scores after the last step alone. It keeps a checkpoint
    for each of them until the row is written."""

    def __post_init__(self) -> None:
        check_fields(self)
        check_ranges(self, score_every=(1, 2**31 - 1))


@dataclass(frozen=True)
class Arm:
    """One way to train or to run a model: what it replaces of its start's recipe."""

    name: str = ""
    """Its name in tables, files and `--arm`."""
    start: str = ""
    """Name of the start it goes on from."""
    control: str = ""
    """Name of the arm that it is compared with, of the same start; empty for one that is compared with none."""
    model: ModelOptions | None = None
    """Mechanisms and adapters; None takes the recipe's."""
    optimizer: OptimizerConfig | None = None
    """Learning rates and which parameters are trained, and until when; None takes the recipe's."""
    data: DataConfig | None = None
    """Stages and sizes of rows; None takes the recipe's."""
    steps: int | None = None
    """Optimizer steps; None takes the recipe's."""
    trained: bool = True
    """Is the arm trained? Without, what the start's phases give is judged under the arm's `model` as it is."""

    def __post_init__(self) -> None:
        check_fields(self)


@dataclass(frozen=True)
class Judged:
    """Held-out samples that an arm answers: right where its greedy answer is the sample's, token for token."""

    name: str = "heldout"
    """What the page calls them."""
    data: SourceConfig = field(default_factory=lambda: Synthetic(split="heldout"))
    """The samples. A source with a `seed` takes that of the run, so that arms of one seed share their samples."""
    samples: int = 1000
    """Number of samples, from the first on."""
    rows: int = 64
    """Samples in a batch."""
    tokens: int = 128
    """Most tokens of a sample with its answer."""
    patches: int = 256
    """Most vision patches of a sample."""
    answer_tokens: int = 4
    """Most tokens of an answer, its end counted."""
    routes: int = 0
    """First samples for which is counted what queries read of the picture and, with regions, how many of those chosen
    lie on the evidence; 0 counts none."""

    def __post_init__(self) -> None:
        check_fields(self)
        _check_name("name", self.name)
        require(self.name != OVERALL, "name", self.name, f"another name: {OVERALL!r} is the mean over all tasks")
        check_ranges(self, samples=(1, MOST_SAMPLES), rows=(1, MOST_AT_ONCE), tokens=(1, MOST_TOKENS))
        check_ranges(self, patches=(0, MOST_PATCHES), answer_tokens=(1, MOST_TOKENS), routes=(0, self.samples))


class Cell(NamedTuple):
    """One run of a study: an arm under a seed."""

    arm: Arm
    seed: int

    @property
    def name(self) -> str:
        """Of its files."""
        return f"{self.arm.name}-{self.seed}"


@dataclass(frozen=True)
class Study:
    """Arms under seeds, what they are asked, and by which rule their differences decide."""

    title: str = "Study"
    """Heading of the page."""
    about: str = ""
    """What is asked, as the first paragraph of the page."""
    output_dir: str = "runs/study"
    """Folder of rows, unfinished runs and the page."""
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    """Seeds of weights, of the order of samples, and of held-out samples."""
    starts: tuple[Start, ...] = ()
    """Where arms begin."""
    arms: tuple[Arm, ...] = ()
    """What is compared."""
    tasks: tuple[Judged, ...] = ()
    """What every arm is asked. The score of an arm is the mean over tasks of the share of right answers."""
    score_samples: int = 256
    """Samples of each task that a score of the curve asks, from the first on."""
    decision: Decision = field(default_factory=Decision)
    """When a difference decides something."""
    keep_runs: bool = False
    """Keep the directories of finished runs, with their checkpoints? Otherwise a row and its page are all that stays,
    and the shared starts."""
    mesh: MeshConfig = field(default_factory=MeshConfig)
    """How the devices are arranged in every run."""
    simulated_devices: int = 0
    """CPU devices of each process; 0 uses the real accelerators."""
    hosts: HostsConfig = field(default_factory=HostsConfig)
    """Processes of one job that make every run together. Several jobs share a study by its folder alone."""

    def __post_init__(self) -> None:
        check_fields(self)
        check_paths(self)
        require(bool(self.output_dir), "output_dir", self.output_dir, "a directory")
        check_ranges(self, score_samples=(1, MOST_SAMPLES))
        require(self.simulated_devices >= 0, "simulated_devices", self.simulated_devices, "at least 0")
        good = len(self.seeds) > 0 and len(set(self.seeds)) == len(self.seeds)
        good = good and all(0 <= seed < 2**31 for seed in self.seeds)
        require(good, "seeds", self.seeds, f"different numbers from 0 to {2**31 - 1:,}, at least one")
        for what in ("starts", "arms", "tasks"):
            names = [one.name for one in getattr(self, what)]
            for number, name in enumerate(names):
                _check_name(f"{what}.{number}.name", name)
                require(names.count(name) == 1, f"{what}.{number}.name", name, f"a name that no other of {what} has")
        require(bool(self.tasks) or not self.arms, "tasks", self.tasks, "at least one, for arms are compared by them")
        for number, arm in enumerate(self.arms):
            self._check_arm(f"arms.{number} ({arm.name})", arm)

    def _check_arm(self, where: str, arm: Arm) -> None:
        starts = {start.name: start for start in self.starts}
        known = f"one of {', '.join(starts)}" if starts else "a start of the study, whose `starts` are empty"
        require(arm.start in starts, f"{where}: start", arm.start, known)
        of_start = [other.name for other in self.arms if other.start == arm.start and other.name != arm.name]
        expected = f"empty, or an arm of the start {arm.start!r}: {', '.join(of_start) or 'there is no other'}"
        require(arm.control in ("", *of_start), f"{where}: control", arm.control, expected)
        phases = bool(starts[arm.start].phases)
        require(arm.trained or phases, f"{where}: trained", arm.trained, f"True: {arm.start!r} has trained nothing yet")
        changed = [name for name in ("optimizer", "data", "steps") if getattr(arm, name) is not None]
        require(arm.trained or not changed, f"{where}: {', '.join(changed)}", "given", "None for an untrained arm")
        try:
            self.run_of(Cell(arm, self.seeds[0]), "start")
        except ConfigError as error:
            raise ConfigError(f"{where}: {error}") from error

    def cells(self, arms: Sequence[str] = (), seeds: Sequence[int] = ()) -> list[Cell]:
        """The runs of these arms and seeds, or of all; every arm of a seed before the next seed.

        Raises:
            ConfigError: an arm or a seed that the study does not have.
        """
        names = [arm.name for arm in self.arms]
        for name in arms:
            require(name in names, "--arm", name, f"one of {', '.join(names)}")
        for seed in seeds:
            require(seed in self.seeds, "--seed", seed, f"one of {', '.join(map(str, self.seeds))}")
        chosen = [arm for arm in self.arms if not arms or arm.name in arms]
        return [Cell(arm, seed) for seed in self.seeds if not seeds or seed in seeds for arm in chosen]

    def start_of(self, arm: Arm) -> Start:
        """The start of an arm."""
        return next(start for start in self.starts if start.name == arm.start)

    def phase_of(self, start: Start, number: int, seed: int, before: str) -> TrainConfig:
        """The run of a phase.

        Args:
            start: whose phase.
            number: of the phase, from 0.
            seed: of the run.
            before: directory in HuggingFace format that the phase before it gave.
        """
        phase = start.phases[number]
        init = FromHF(before) if number else _seeded(phase.init, seed)
        return self._plain(dataclasses.replace(phase, init=init), seed, seed)

    def run_of(self, cell: Cell, before: str) -> TrainConfig:
        """The run of an arm under a seed.

        Args:
            cell: arm and seed.
            before: directory in HuggingFace format that the last phase gave; what the start has no phase for is not
                read.
        """
        arm, start = cell.arm, self.start_of(cell.arm)
        init = FromHF(before) if start.phases else _seeded(start.recipe.init, cell.seed)
        given = {name: getattr(arm, name) for name in ("model", "optimizer", "data", "steps")}
        changes = {name: value for name, value in given.items() if value is not None}
        every = start.score_every if arm.trained else None
        steps = start.recipe.steps if arm.steps is None else arm.steps
        saved = {} if every is None else {"save_every": every, "keep": -(-steps // every) + 1}
        return self._plain(
            dataclasses.replace(start.recipe, **{**changes, **saved, "init": init}),
            cell.seed,
            cell.seed + SEED_BEHIND * bool(start.phases),
        )

    def _plain(self, config: TrainConfig, seed: int, order: int) -> TrainConfig:
        """The config under a seed, one of the order of samples, and on the study's devices, without what follows
        training."""
        data = dataclasses.replace(config.data, seed=order)
        devices = {"mesh": self.mesh, "simulated_devices": self.simulated_devices, "hosts": self.hosts}
        return dataclasses.replace(config, seed=seed, data=data, final=(), tensorboard=False, **devices)

    def samples_of(self, task: Judged, seed: int) -> SourceConfig:
        """The source of a task under a seed."""
        return _seeded(task.data, seed)


def _seeded(config: Any, seed: int) -> Any:
    """A config with this seed, where it has one."""
    has = any(f.name == "seed" for f in dataclasses.fields(config))
    return dataclasses.replace(config, seed=seed) if has else config


def _check_name(field: str, name: str) -> None:
    """Names of arms, starts and tasks become names of files."""
    good = NAME.fullmatch(name) is not None and not name.startswith(".")
    require(good, field, name, "letters, digits and _ . + = @ -, not beginning with a dot")

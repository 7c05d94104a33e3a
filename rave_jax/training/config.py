"""What an experiment is: `get_config()` of a file in configs/ returns one TrainConfig."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import ClassVar

from rave_jax import config as configs
from rave_jax.checkpoint.retention import Retention
from rave_jax.checkpoint.tiny import Tiny
from rave_jax.config import ConfigError, check_paths, check_ranges, require
from rave_jax.data.config import MOST_TOKENS, DataConfig
from rave_jax.evaluation.config import Eval, Report
from rave_jax.models.config import ModelOptions
from rave_jax.observe.wandb import Wandb
from rave_jax.parallel.hosts import HostsConfig
from rave_jax.parallel.mesh import MeshConfig
from rave_jax.training.init import FromHF
from rave_jax.training.optimizers import OptimizerConfig
from rave_jax.training.profiling import Profile

# Fields that may differ when a run is continued: they change no number of it, or only where it is computed.
OPERATIONAL = frozenset(
    {
        "mesh",
        "simulated_devices",
        "hosts",
        "log_every",
        "save_every",
        "keep",
        "keep_every",
        "keep_best",
        "tensorboard",
        "wandb",
        "profile",
        "final",
        "output_dir",
        "extended",
    }
)
# Those of the data: how it is loaded, and what a run does that finds it changed.
OPERATIONAL_DATA = frozenset({"prefetch", "workers", "processes", "cache_mb", "on_change"})


@dataclass(frozen=True)
class Extension:
    """A run that was continued with more steps."""

    after_step: int = 0
    """Steps that were done before the extension."""
    steps: int = 0
    """`steps` before the extension, which the learning rate followed."""


@dataclass(frozen=True)
class KeepBest:
    """Checkpoints that are kept for their metric."""

    metric: str = "loss"
    """A name in metrics.jsonl: `loss`, `accuracy`, or `eval/NAME/...` of an evaluation with `every`. A checkpoint
    counts where the metric was measured at its step."""
    largest: bool = False
    """Is the largest metric the best?"""
    count: int = 1
    """Checkpoints that are kept."""

    def __post_init__(self) -> None:
        check_ranges(self, count=(1, 2**31 - 1))


@dataclass(frozen=True)
class TrainConfig:
    """One training run, from a checkpoint to what is done after the last step."""

    url_schemes: ClassVar = ("gs", "s3")
    """Of `output_dir`."""

    output_dir: str = "runs/run"
    """Run directory: config, metrics, checkpoints, results. gs://BUCKET/FOLDER and s3://BUCKET/FOLDER are run
    directories too. An existing run is continued."""
    init: FromHF | Tiny = field(default_factory=Tiny)
    """Where the weights come from."""
    model: ModelOptions = field(default_factory=ModelOptions)
    """Mechanisms, number types, rematerialisation, adapters."""
    data: DataConfig = field(default_factory=DataConfig)
    """What is trained on, in which order and shape."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """Learning rate, parameter groups, accumulation."""
    steps: int = 100
    """Optimizer steps of the run."""
    seed: int = 0
    """Seed of parameters that the checkpoint does not hold, such as those of mechanisms."""
    loss_chunk: int = 128
    """Tokens of each row whose logits exist at one time."""
    z_loss: float = 0.0
    """Coefficient of the z-loss: the mean over target tokens of the squared log-sum-exp of the logits, which keeps it
    near 0. 1e-4 is usual; 0 adds nothing."""
    mesh: MeshConfig = field(default_factory=MeshConfig)
    """How the devices are arranged."""
    simulated_devices: int = 0
    """CPU devices of each process; 0 uses the real accelerators."""
    hosts: HostsConfig = field(default_factory=HostsConfig)
    """Processes of the job and their time limits."""
    log_every: int = 10
    """Steps between two rows of metrics; the first and the last step are always written."""
    save_every: int = 1000
    """Steps between two checkpoints; the last step is always saved."""
    keep: int = 2
    """Newest checkpoints that are kept."""
    keep_every: int = 0
    """Checkpoints whose step is a multiple of this are kept too; 0 keeps none of them."""
    keep_best: KeepBest | None = None
    """Checkpoints with the best metric are kept too."""
    tensorboard: bool = True
    """Write TensorBoard events beside metrics.jsonl?"""
    wandb: Wandb | None = None
    """Send metrics to Weights & Biases too?"""
    profile: Profile = field(default_factory=lambda: Profile(first=0))
    """Which steps are profiled, into profile/STEP of the run directory."""
    final: tuple[Eval | Report, ...] = ()
    """Evaluations and reports after the last step, in order. Evaluations with `every` are run between steps too."""
    extended: tuple[Extension, ...] = ()
    """The run's extensions to more steps. train.py writes it; a given value is ignored."""

    def __post_init__(self) -> None:
        require(bool(self.output_dir), "output_dir", self.output_dir, "a directory")
        check_paths(self)
        # Steps are counted in int32, on the devices too.
        counts = dict.fromkeys(("steps", "log_every", "save_every", "keep"), (1, 2**31 - 1))
        check_ranges(self, **counts, loss_chunk=(1, MOST_TOKENS), keep_every=(0, 2**31 - 1))
        check_ranges(self, z_loss=(0, 1e6))
        kept = "False: parameters are stored in float32 already (model.param_dtype)"
        masters = self.optimizer.master_copies
        require(not (masters and self.model.param_dtype == "float32"), "optimizer.master_copies", masters, kept)
        require(self.simulated_devices >= 0, "simulated_devices", self.simulated_devices, "at least 0")
        require(0 <= self.seed < 2**32, "seed", self.seed, "0 to 2^32 - 1")
        warmup = self.optimizer.warmup
        require(warmup < self.steps, "optimizer.warmup", warmup, f"fewer than the run's {self.steps} steps")
        for number, mechanism in enumerate(self.model.mechanisms):
            allowed = "a mechanism that training can use: this one is decided for each prompt that is answered"
            require(not mechanism.of_prompt, f"model.mechanisms.{number}", mechanism, allowed)
        within = f"at most the run's {self.steps} steps, or 0 for SIGUSR1 alone"
        require(self.profile.first <= self.steps, "profile.first", self.profile.first, within)
        self._check_evaluations()

    @property
    def retention(self) -> Retention:
        """Which checkpoints are kept."""
        best = self.keep_best
        if best is None:
            return Retention(self.keep, self.keep_every)
        return Retention(self.keep, self.keep_every, best.count, best.largest)

    def _check_evaluations(self) -> None:
        """Those that are run between steps have their time, and a folder each."""
        names = [part.name for part in self.final if isinstance(part, Eval)]
        if self.keep_best is not None:
            measured = [
                f"eval/{part.name}/" for part in self.final if isinstance(part, Eval) and part.every is not None
            ]
            metric = self.keep_best.metric
            allowed = " or ".join(("loss", "accuracy", *(f"{name}score" for name in measured)))
            known = metric in ("loss", "accuracy") or metric.startswith(tuple(measured))
            require(known, "keep_best.metric", metric, f"a metric that is measured during training, such as {allowed}")
        for number, part in enumerate(self.final):
            if isinstance(part, Eval) and part.every is not None:
                within = f"at most the run's {self.steps} steps, or None for the last step alone"
                require(part.every <= self.steps, f"final.{number}.every", part.every, within)
                alone = "a name that no other evaluation of the run has, since `every` is set"
                require(names.count(part.name) == 1, f"final.{number}.name", part.name, alone)


def check_same_run(old: TrainConfig, new: TrainConfig, directory: str) -> None:
    """Refuse to continue a run with a config that would give other numbers. More steps extend it.

    Raises:
        ConfigError: names the fields that differ.
    """
    different = differences(old, new)
    if different:
        raise ConfigError(f"{directory} holds another run ({'; '.join(different)}); choose another output_dir")
    if new.steps < old.steps:
        raise ConfigError(
            f"{directory} holds a run of {old.steps} steps, and steps is {new.steps}: a run can be continued with as "
            "many steps or with more, not with fewer; choose another output_dir for a shorter one"
        )


def differences(old: TrainConfig, new: TrainConfig) -> list[str]:
    """The fields that would make another run of it, each as `FIELD is NEW, was OLD`."""
    before, after = (configs.without_folders(configs.to_json(config)) for config in (old, new))
    for config in (before, after):
        del config["optimizer"]["offload"]  # where its state lies changes no number
        config["data"] = {name: value for name, value in config["data"].items() if name not in OPERATIONAL_DATA}
        if config["data"]["packing"] is not None:
            del config["data"]["packing"]["workers"]
    names = [f.name for f in dataclasses.fields(TrainConfig) if f.name not in OPERATIONAL | {"steps"}]
    return [line for name in names for line in configs.differing(name, before[name], after[name])]


def extension(old: TrainConfig, new: TrainConfig, after_step: int) -> TrainConfig:
    """The config to write where `new` continues the run of `old` after this step: it remembers every extension."""
    added = (Extension(after_step, old.steps),) if new.steps > old.steps else ()
    return dataclasses.replace(new, extended=old.extended + added)


def check_can_be_read_again(config: TrainConfig) -> None:
    """Refuse a config that config.json could not hold: nothing could read the run again.

    Raises:
        ConfigError: names the field.
    """
    try:
        # Equal as values: 1 in a field of numbers is read back as 1.0, a list as a tuple, which is another value.
        same = configs.loads(TrainConfig, configs.dumps(config), "config.json") == config
    except (TypeError, ValueError, RecursionError) as error:
        raise ConfigError(f"the config cannot be written to config.json and read back: {error}") from error
    if not same:
        raise ConfigError("the config read back from config.json is another one: its fields hold values of other types")

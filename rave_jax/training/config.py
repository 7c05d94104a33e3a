"""What an experiment is: `get_config()` of a file in configs/ returns one TrainConfig."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field

from rave_jax.checkpoint.tiny import Tiny
from rave_jax.config import ConfigError, check_ranges, require
from rave_jax.data.pipeline import MOST_TOKENS, DataConfig
from rave_jax.evaluation.config import Eval, Report
from rave_jax.models.config import ModelOptions
from rave_jax.parallel.hosts import HostsConfig
from rave_jax.parallel.mesh import MeshConfig
from rave_jax.training.init import FromHF
from rave_jax.training.optimizers import OptimizerConfig

# Fields that may differ when a run is continued: they change no number of it, or only where it is computed.
OPERATIONAL = frozenset(
    {"mesh", "simulated_devices", "hosts", "log_every", "save_every", "keep", "tensorboard", "final", "output_dir"}
)


@dataclass(frozen=True)
class TrainConfig:
    """One training run, from a checkpoint to what is done after the last step."""

    output_dir: str = "runs/run"
    """Run directory: config, metrics, checkpoints, results. A run that is there already is continued."""
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
    mesh: MeshConfig = field(default_factory=MeshConfig)
    """How the devices are laid out."""
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
    tensorboard: bool = True
    """Write TensorBoard events beside metrics.jsonl?"""
    final: tuple[Eval | Report, ...] = ()
    """What is done after the last step, in order."""

    def __post_init__(self) -> None:
        require(bool(self.output_dir), "output_dir", self.output_dir, "a directory")
        # Steps are counted in int32, on the devices too.
        counts = dict.fromkeys(("steps", "log_every", "save_every", "keep"), (1, 2**31 - 1))
        check_ranges(self, **counts, loss_chunk=(1, MOST_TOKENS))
        require(self.simulated_devices >= 0, "simulated_devices", self.simulated_devices, "at least 0")
        require(0 <= self.seed < 2**32, "seed", self.seed, "0 to 2^32 - 1")
        warmup = self.optimizer.warmup
        require(warmup < self.steps, "optimizer.warmup", warmup, f"fewer than the run's {self.steps} steps")


def check_same_run(old: TrainConfig, new: TrainConfig, directory: str) -> None:
    """Refuse to continue a run with a config that would give other numbers.

    Raises:
        ConfigError: names the fields that differ.
    """
    different = [
        f"{f.name} is {getattr(new, f.name)!r}, was {getattr(old, f.name)!r}"
        for f in dataclasses.fields(TrainConfig)
        if f.name not in OPERATIONAL and getattr(old, f.name) != getattr(new, f.name)
    ]
    if different:
        raise ConfigError(f"{directory} holds another run ({'; '.join(different)}); choose another output_dir")

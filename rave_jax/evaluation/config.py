"""What to do after training, or on a checkpoint: evaluations and the report."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from rave_jax.config import check_paths, require
from rave_jax.data.sources import SourceConfig, Synthetic
from rave_jax.evaluation.gate import TaskAim
from rave_jax.models.config import ModelOptions
from rave_jax.parallel.hosts import HostsConfig
from rave_jax.parallel.mesh import MeshConfig


@dataclass(frozen=True)
class Gate:
    """Controls that tell looking from guessing; see `evaluation/controls.py`."""

    train: SourceConfig = field(default_factory=lambda: Synthetic(split="train"))
    """Training samples from which the most frequent answers are counted."""
    train_samples: int = 2000
    """How many of them, from the first on."""
    margin: float = 0.25
    """How far the score must be above the question-only floor and above the score on re-dealt pictures."""
    aims: tuple[TaskAim, ...] = ()
    """Scores that single tasks must reach."""

    def __post_init__(self) -> None:
        require(self.train_samples >= 1, "train_samples", self.train_samples, "at least 1")
        require(0 <= self.margin <= 1, "margin", self.margin, "a difference of scores between 0 and 1")


@dataclass(frozen=True)
class Eval:
    """Greedy answers to samples, scored; written to `evaluation/NAME/` of the run."""

    name: str = "heldout"
    """Name of the evaluation: its folder and its heading in the report."""
    data: SourceConfig = field(default_factory=lambda: Synthetic(split="heldout"))
    """The samples to ask."""
    samples: int = 1000
    """How many, from the first on; fewer where the source has fewer."""
    rows: int = 64
    """Samples asked at once."""
    tokens: int = 128
    """Most tokens of a prompt, its visual tokens counted; a longer one is counted as over budget."""
    patches: int = 256
    """Most vision patches of a prompt (before merging)."""
    max_new_tokens: int = 16
    """Most tokens of an answer."""
    looks: int = 128
    """Samples whose attention is measured, spread evenly over the tasks; 0 measures none."""
    pictures: int = 12
    """How many of those also become a picture."""
    vas: int = 0
    """Samples whose visual attention score (VAS, `evaluation/vas.py`) is measured, spread evenly over the tasks; 0
    measures none. It costs a forward pass with three runs of the attention kernel in each layer, and needs a system
    prompt, which the chat template of `Tiny` does not write."""
    routes: int = 128
    """Samples of which is counted what their questions and answers read of the picture and, where attention is routed
    (Gaze), how many chosen regions overlap the evidence; spread evenly over the tasks; 0 counts none."""
    layers: tuple[int, ...] = ()
    """Decoder layers averaged in the pictures and in the share inside the evidence box; empty takes all."""
    on_error: Literal["skip", "fail"] = "skip"
    """What to do with a sample that cannot be asked (a broken picture, over budget): log, count and go on, or stop."""
    gate: Gate | None = None
    """Controls that tell looking from guessing, or none."""

    def __post_init__(self) -> None:
        require(bool(self.name) and "/" not in self.name, "name", self.name, "the name of a folder")
        for name in ("samples", "rows", "tokens", "max_new_tokens"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        for name in ("patches", "looks", "vas", "routes"):
            require(getattr(self, name) >= 0, name, getattr(self, name), "0 or more")
        require(0 <= self.pictures <= self.looks, "pictures", self.pictures, f"0 to looks ({self.looks})")


@dataclass(frozen=True)
class Report:
    """A page about the run: `report.md` beside its config, from the files that training and evaluation left."""

    title: str = "Report"
    """Heading of the page."""
    smoothing: int = 20
    """Steps over which the drawn loss curve is averaged; 1 draws every step."""

    def __post_init__(self) -> None:
        require(self.smoothing >= 1, "smoothing", self.smoothing, "at least 1")


@dataclass(frozen=True)
class Examination:
    """What `eval.py` does with a run or an HF directory."""

    evals: tuple[Eval, ...] = (Eval(),)
    """The evaluations, in order. For a run, those that its config names."""
    report: Report = field(default_factory=Report)
    """The page about it."""
    output_dir: str = ""
    """Where to write; empty: into the run, or to `runs/eval-NAME` for an HF directory."""
    step: int | None = None
    """Which checkpoint of a run; None takes the newest."""
    model: ModelOptions | None = None
    """How to build the model of an HF directory; None: as saved beside it, or the defaults. A run has its own."""
    min_pixels: int | None = None
    """Least pixels of a resized picture, for an HF directory; None for the model's own limit. A run has its own."""
    max_pixels: int | None = None
    """Most pixels of a resized picture, for an HF directory; None for the model's own limit. A run has its own."""
    mesh: MeshConfig = field(default_factory=MeshConfig)
    """How the devices are laid out; need not be as in training."""
    simulated_devices: int = 0
    """CPU devices of each process; 0 uses the real accelerators."""
    hosts: HostsConfig = field(default_factory=HostsConfig)
    """Processes of the job and their time limits."""

    def __post_init__(self) -> None:
        check_paths(self)
        names = [item.name for item in self.evals]
        require(len(names) > 0, "evals", self.evals, "at least one evaluation")
        require(len(set(names)) == len(names), "evals", names, "evaluations with names of their own")
        require(self.simulated_devices >= 0, "simulated_devices", self.simulated_devices, "at least 0")

"""What to do after training, or on a checkpoint: evaluations and the report."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from rave_jax.config import check_paths, check_ranges, require
from rave_jax.data.chat import SpecialTokens
from rave_jax.data.config import MOST_PATCHES, MOST_PIXELS, MOST_TOKENS
from rave_jax.data.sources import SourceConfig, Synthetic
from rave_jax.evaluation.grounding import TaskAim
from rave_jax.evaluation.task import Task
from rave_jax.look.carve import Carve
from rave_jax.look.funnel import VisualFunnel
from rave_jax.models.config import ModelOptions
from rave_jax.parallel.hosts import HostsConfig
from rave_jax.parallel.mesh import MeshConfig

RENAMED = {"Gate": "Grounding"}
"""Names that classes have had here."""
MOST_SAMPLES, MOST_AT_ONCE = 10**9, 2**16
"""Samples of an evaluation, and those asked at once: far above what is in use."""


@dataclass(frozen=True)
class Floor:
    """What answers reach without looking at pictures. Scores are compared with it; see `evaluation/controls.py`."""

    train: SourceConfig | None = None
    """Training samples from which the most frequent answers are counted. None: the samples of the evaluation, where the
    answer to a question is counted over the other pictures."""
    train_samples: int = 2000
    """How many training samples, from the first on."""
    grey: bool = True
    """Also ask about grey pictures? It takes as long as asking about the real ones."""

    def __post_init__(self) -> None:
        check_ranges(self, train_samples=(1, MOST_SAMPLES))


@dataclass(frozen=True)
class Grounding:
    """The grounding check: is the score well above the floor, and does it fall when the evidence is changed?"""

    margin: float = 0.25
    """How far the score must be above the question-only floor, and above the score where the evidence is changed."""
    aims: tuple[TaskAim, ...] = ()
    """Scores that single tasks must reach."""

    def __post_init__(self) -> None:
        require(0 <= self.margin <= 1, "margin", self.margin, "a difference of scores between 0 and 1")


@dataclass(frozen=True)
class Eval:
    """Greedy answers to samples, scored; written to `evaluation/NAME/` of the run."""

    name: str = "heldout"
    """Name of the evaluation: its folder and its heading in the report."""
    data: SourceConfig = field(default_factory=lambda: Synthetic(split="heldout"))
    """The samples to ask."""
    task: Task = field(default_factory=Task)
    """How they are asked and their answers scored."""
    again: Carve | VisualFunnel | None = None
    """Ask each sample again, with views of its picture that first passes of the model point to; None asks once. The
    views need room in `tokens` and `patches`."""
    samples: int = 1000
    """Number of samples, from the first on; fewer if the source has fewer."""
    rows: int = 64
    """Samples in a batch."""
    tokens: int = 128
    """Most tokens of a prompt, visual tokens included; a longer prompt is left out as over budget."""
    patches: int = 256
    """Most vision patches of a prompt (before merging)."""
    max_new_tokens: int = 16
    """Most tokens of an answer."""
    looks: int = 128
    """Samples whose attention is measured, spread evenly over the tasks; 0 measures none."""
    pictures: int = 12
    """How many of those are drawn as pictures, with their arrays beside them as .npz."""
    per_head: bool = False
    """Also draw each head, in a second picture?"""
    picture_format: Literal["png", "pdf", "svg"] = "png"
    """Format of these pictures; pdf and svg keep their letters and lines sharp in print."""
    vas: int = 0
    """Samples whose visual attention score (VAS, `evaluation/vas.py`) is measured, spread evenly over the tasks; 0
    measures none. It costs a forward pass with three runs of the attention kernel in each layer, and needs a system
    prompt, which the chat template of `Tiny` does not write."""
    knock_outs: int = 0
    """Samples, spread evenly over the tasks, whose answers are asked how much less likely they get when a part of the
    picture is hidden from all text (`evaluation/knocked.py`); 0 asks none. Those without a box of evidence are left
    out. A sample costs a forward pass for each part and two more."""
    knock_out_blocks: int = 64
    """Parts of a picture that are hidden in turn, at most: where it has more visual tokens, a part has several."""
    routes: int = 128
    """Samples, spread evenly over the tasks, for which is counted what questions and answers read of the picture and,
    with Gaze, how many chosen regions overlap the evidence. 0 counts none."""
    spans: int = 0
    """Samples, spread evenly over the tasks, of which is measured how far back their answers attend and what later
    tokens give to each (WAAD and FAI, `evaluation/spans.py`); 0 measures none. It costs a forward pass."""
    sinks: int = 0
    """Samples, spread evenly over the tasks, whose secondary sinks are counted (`evaluation/sinks.py`); 0 counts none.
    It costs a forward pass that keeps what enters every layer, and needs a model of at least 20 layers."""
    layers: tuple[int, ...] = ()
    """Decoder layers averaged in the pictures and in the share inside the evidence box; empty takes all."""
    on_error: Literal["skip", "fail"] = "skip"
    """What to do with a sample that cannot be asked (a broken picture, over budget): skip and count it, or fail."""
    floor: Floor | None = Floor()
    """The question-only floor, or None. Without it a score does not tell looking from guessing."""
    grounding: Grounding | None = None
    """The check that answers come from the evidence, for sources that can change it (`Synthetic`), or None."""
    every: int | None = None
    """Steps of training from one time that it is run to the next; it is run after the last step too. Each time is
    written to `evaluation/NAME/steps/STEP/` and to the metrics. None: after the last step alone. It says nothing to
    eval.py."""

    def __post_init__(self) -> None:
        require(bool(self.name) and "/" not in self.name, "name", self.name, "the name of a folder")
        check_ranges(self, samples=(1, MOST_SAMPLES), rows=(1, MOST_AT_ONCE), max_new_tokens=(1, MOST_TOKENS))
        check_ranges(self, tokens=(1, MOST_TOKENS), patches=(0, MOST_PATCHES), every=(1, 2**31 - 1))
        check_ranges(self, knock_out_blocks=(1, MOST_TOKENS))
        counts = ("looks", "knock_outs", "vas", "routes", "spans", "sinks")
        check_ranges(self, **dict.fromkeys(counts, (0, MOST_SAMPLES)))
        require(0 <= self.pictures <= self.looks, "pictures", self.pictures, f"0 to looks ({self.looks})")
        compared = self.grounding is None or self.floor is not None
        require(
            compared,
            "floor",
            self.floor,
            "a Floor: the grounding check compares the score with it; for no floor set grounding None too",
        )

    @classmethod
    def from_older(cls, data: Mapping[str, Any]) -> Mapping[str, Any]:
        """The JSON of an evaluation as it is written, from one whose grounding check is called `gate`."""
        if "gate" not in data:
            return data
        data = dict(data)
        gate = data.pop("gate")
        if not isinstance(gate, dict):
            return data | {"grounding": gate}
        gate = dict(gate)
        floor = {name: gate.pop(name) for name in ("train", "train_samples") if name in gate}
        return {"floor": {"type": "Floor", **floor}, **data, "grounding": {**gate, "type": "Grounding"}}


@dataclass(frozen=True)
class Report:
    """A page about the run, `report.md` beside its config, made from the files of training and evaluation."""

    title: str = "Report"
    """Heading of the page."""
    smoothing: int = 20
    """Steps over which the drawn loss curve is averaged; 1 draws every step."""

    def __post_init__(self) -> None:
        check_ranges(self, smoothing=(1, 2**31 - 1))


@dataclass(frozen=True)
class Examination:
    """The evaluations of a run or an HF directory, and the report about them."""

    evals: tuple[Eval, ...] = (Eval(),)
    """The evaluations, in order. For a run, those that its config names."""
    report: Report = field(default_factory=Report)
    """The report about the evaluations."""
    output_dir: str = ""
    """Where to write; empty: into the run, or to `runs/eval-NAME` for an HF directory."""
    step: int | None = None
    """Step of the checkpoint of a run; None takes the newest."""
    weights: Literal["trained", "ema"] = "trained"
    """Of a run: the weights of the step, or the moving average of them (`optimizer.ema`)."""
    model: ModelOptions | None = None
    """How to build the model of an HF directory; None: as saved beside it, or the defaults. A run has its own."""
    min_pixels: int | None = None
    """Least pixels of a resized picture, for an HF directory; None for the model's own limit. A run has its own."""
    max_pixels: int | None = None
    """Most pixels of a resized picture, for an HF directory; None for the model's own limit. A run has its own."""
    special_tokens_in_text: SpecialTokens | None = None
    """How a sample's spelling of a special token such as <|im_end|> is read: as "text", or as the token ("tokens").
    None: as in the run's training; for an HF directory text."""
    mesh: MeshConfig = field(default_factory=MeshConfig)
    """How the devices are arranged; it may differ from training."""
    simulated_devices: int = 0
    """CPU devices of each process; 0 uses the real accelerators."""
    hosts: HostsConfig = field(default_factory=HostsConfig)
    """Processes of the job and their time limits."""

    def __post_init__(self) -> None:
        check_paths(self)
        names = [item.name for item in self.evals]
        require(len(names) > 0, "evals", self.evals, "at least one evaluation, as --evals Eval")
        require(len(set(names)) == len(names), "evals", names, "evaluations with names of their own")
        check_ranges(self, step=(0, 2**31 - 1), min_pixels=(1, MOST_PIXELS), max_pixels=(1, MOST_PIXELS))
        require(self.simulated_devices >= 0, "simulated_devices", self.simulated_devices, "at least 0")

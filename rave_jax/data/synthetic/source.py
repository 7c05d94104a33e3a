"""The data source of the synthetic tasks: a mixture, drawn without end from a seed."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from rave_jax.config import check_ranges, require
from rave_jax.data.sample import Part, Sample
from rave_jax.data.synthetic.album import Album
from rave_jax.data.synthetic.bar_chart import BarChart
from rave_jax.data.synthetic.base import Split, generator, make_sample
from rave_jax.data.synthetic.counting import Counting
from rave_jax.data.synthetic.digit_mosaic import DigitMosaic
from rave_jax.data.synthetic.long_receipt import LongReceipt
from rave_jax.data.synthetic.mosaic_list import MosaicList
from rave_jax.data.synthetic.position_mosaic import PositionMosaic
from rave_jax.data.synthetic.receipt import Receipt
from rave_jax.data.synthetic.scatter import Scatter

SyntheticTask = (
    DigitMosaic | MosaicList | PositionMosaic | BarChart | Counting | Receipt | Scatter | LongReceipt | Album
)


@dataclass(frozen=True)
class Synthetic:
    """Pictures and questions made in code; the two splits share no digit picture, word, price or arrangement."""

    tasks: tuple[SyntheticTask, ...] = (DigitMosaic(), BarChart(), Counting())
    """The mixture; each task carries its weight and its options."""
    split: Split = "train"
    """The content that pictures are made of. The two splits share no content, whatever the seeds."""
    seed: int = 0
    """Seed of the pictures. The seed, the split and a sample's number decide the sample."""
    image_size: int = 84
    """Side of the square pictures in pixels. Receipts need 224."""
    questions_per_image: int | None = None
    """Questions asked about one picture; the last is scored. None: 2 in train if tasks allow it, 1 in heldout."""
    length: int = 1_000_000
    """Number of samples. It costs nothing: a sample is made when it is asked for."""

    def __post_init__(self) -> None:
        require(len(self.tasks) > 0, "tasks", self.tasks, "at least one task")
        # An epoch's order is shuffled as a whole; a picture is drawn as a whole.
        check_ranges(self, seed=(0, 2**63 - 1), length=(1, 10**8), image_size=(1, 8192))
        most = self._room
        expected = f"1 to {most}, the most that every picture of the mixture allows"
        require(1 <= self.questions <= most, "questions_per_image", self.questions, expected)
        for task in self.tasks:
            least = task.min_image_size
            field = f"image_size (for {task.name})"
            require(self.image_size >= least, field, self.image_size, f"at least {least} pixels")

    @property
    def questions(self) -> int:
        """Question turns on one picture."""
        if self.questions_per_image is None:
            return min(2, self._room) if self.split == "train" else 1
        return self.questions_per_image

    @property
    def _room(self) -> int:
        return min(task.max_questions for task in self.tasks)

    def build(self) -> SyntheticSource:
        """The source."""
        return SyntheticSource(self)


class SyntheticSource:
    """Random access to the samples of a `Synthetic` config; holds no state."""

    name = "synthetic"
    fingerprint = ""

    def __init__(self, config: Synthetic) -> None:
        self.config = config
        weights = np.array([task.weight for task in config.tasks], np.float64)
        self._upper = np.cumsum(weights / weights.sum())

    def __len__(self) -> int:
        return self.config.length

    @property
    def parts(self) -> tuple[Part, ...]:
        """All of them, kept nowhere."""
        return (Part(len(self), self.fingerprint),)

    def __getitem__(self, index: int) -> Sample:
        """Sample `index`: a pure function of the config and the index.

        Raises:
            IndexError: `index` is not in 0 .. len - 1.
        """
        return self._make(index, redealt=False)

    def redeal(self, index: int) -> Sample:
        """Sample `index` with the evidence of its scored question changed and the original answer kept.

        Question, `answers` and everything else in the picture stay; `evidence` is the new picture's box.
        A model that looks at the picture is wrong by `answers`; one that guesses does as well as before.
        """
        return self._make(index, redealt=True)

    def _make(self, index: int, *, redealt: bool) -> Sample:
        config = self.config
        if not 0 <= index < config.length:
            raise IndexError(f"sample {index} of a synthetic source of {config.length}")
        rng = generator(config.seed, config.split, index)
        chosen = min(int(np.searchsorted(self._upper, rng.random(), side="right")), len(config.tasks) - 1)
        task = config.tasks[chosen]
        return make_sample(
            task,
            rng,
            split=config.split,
            image_size=config.image_size,
            questions=config.questions,
            sample_id=f"{task.name}/{config.split}/{config.seed}/{index}" + ("/redealt" if redealt else ""),
            redealt=redealt,
        )

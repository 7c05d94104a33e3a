"""What an evaluation, its summary and its report know of a probe: a finding, pictures, and a section."""

from __future__ import annotations

import dataclasses
import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import pytest
from rich.console import Console

from rave_jax.evaluation import probes, report, suites
from rave_jax.evaluation.config import Eval, Report
from rave_jax.evaluation.probe import Answered, Found
from rave_jax.evaluation.report import write_report
from rave_jax.evaluation.suites import run
from rave_jax.evaluation.summary import print_summary
from tests.evaluation.toy import Fake, Toy, any_source, read


@dataclasses.dataclass(frozen=True)
class Lengths:
    """How long answers are."""

    mean: float
    asked: tuple[str, ...]

    def values(self) -> dict[str, float]:
        return {"mean": self.mean}

    def sentences(self) -> list[str]:
        return [f"answers of {self.mean:.1f} letters"]


@dataclasses.dataclass(frozen=True)
class LengthProbe:
    """Measures them, and leaves a file."""

    name: ClassVar[str] = "lengths"

    def measure(self, answered: Answered) -> Found:
        blocks = list(answered.blocks(5))
        assert [len(block.records) for block in blocks] == [4, 1], "at most as many as a batch has rows"
        lengths = [len(answer.text) for block in blocks for answer in block.answers]
        if answered.out is not None:
            answered.out.mkdir(parents=True, exist_ok=True)
            (answered.out / "lengths.png").write_bytes(b"")
        asked = tuple(sample.id for block in blocks for sample in block.samples)
        return Found(Lengths(sum(lengths) / len(lengths), asked), ("lengths.png",))

    @staticmethod
    def section(finding: Mapping[str, Any]) -> list[str]:
        return [f"### Lengths: {finding['mean']}", ""]


def test_a_probe_of_ones_own_is_in_everything_that_an_evaluation_gives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(suites, "probes_of", lambda config: (LengthProbe(), *probes.probes_of(config)))
    monkeypatch.setattr(report, "PROBES", (*probes.PROBES, LengthProbe))
    folder = tmp_path / "evaluation" / "toy"
    config = Eval("toy", any_source(Toy()), samples=20, rows=4, looks=3, pictures=1, vas=2, routes=2)
    summary = run(config, Toy(), Fake(read), folder)
    assert summary.findings["lengths"] == Lengths(1.0, tuple(f"toy/heldout/{i}" for i in range(5)))
    values = summary.values()
    assert values["lengths/mean"] == 1.0 and values["score"] == values["score/odd"] == values["score/even"] == 1.0
    assert {"floor", "looking/on_picture", "looking/in_box", "vas/score", "routing/accuracy"} < values.keys()
    stored = json.loads((folder / "summary.json").read_text())
    assert stored["lengths"]["mean"] == 1.0 and stored["pictures"][0] == "lengths.png"
    assert list(stored)[-3:] == ["pictures", "seconds", "grounding"]
    page = write_report(Report(), tmp_path).read_text()
    assert "### Lengths: 1.0" in page and "](evaluation/toy/lengths.png)" in page
    console = Console(record=True, width=140, file=io.StringIO())
    print_summary(summary, console)
    assert "answers of 1.0 letters" in console.export_text()


def test_every_probe_of_an_evaluation_has_its_section() -> None:
    asked = probes.probes_of(Eval())
    assert tuple(type(probe) for probe in asked) == probes.PROBES
    assert [probe.name for probe in asked] == ["looking", "knock_out", "vas", "routing", "spans", "sinks"]


def test_an_evaluation_that_is_run_again_says_the_same() -> None:
    """Training answers are counted once, and their broken samples are counted every time."""

    class Counted(Toy):
        read = 0

        def __getitem__(self, index: int) -> Any:
            type(self).read += 1
            return super().__getitem__(index)

        def build(self) -> Counted:
            return self

    floor = dataclasses.replace(Eval().floor, train=any_source(Counted(split="train", broken_every=9, length=40)))
    config = Eval("toy", any_source(Toy()), samples=20, rows=8, looks=2, pictures=0, floor=floor)
    evaluation = suites.Evaluation(config, Toy(), Fake(read))
    first, second = (evaluation.run(None, lambda line: None) for _ in range(2))
    assert dataclasses.replace(first, seconds=0) == dataclasses.replace(second, seconds=0)
    assert first.broken == {"broken image": 5} and Counted.read == 40

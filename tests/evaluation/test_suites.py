"""An evaluation of subjects whose behaviour is known: a reader, a guesser, and what they leave on disk."""

from __future__ import annotations

import dataclasses
import io
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from rave_jax.config import ConfigError
from rave_jax.data.sample import ImageError
from rave_jax.data.sources import QaJsonl
from rave_jax.evaluation.config import Eval, Gate, Report
from rave_jax.evaluation.gate import TaskAim
from rave_jax.evaluation.report import write_report
from rave_jax.evaluation.suites import run
from rave_jax.evaluation.summary import BY_TEMPLATE, BY_TEXT, GREY, REDEALT, print_summary
from rave_jax.evaluation.vas import Vas
from tests.evaluation.toy import Fake, Toy, any_source, read

SAMPLES = 200
GATE = Gate(train=any_source(Toy(split="train")), train_samples=400, aims=(TaskAim("odd", 0.9),))


def config(samples: int = SAMPLES, gate: Gate | None = GATE, looks: int = 8, pictures: int = 0) -> Eval:
    data = any_source(Toy())
    return Eval("toy", data, samples=samples, rows=16, looks=looks, pictures=pictures, gate=gate)


def toy_answers(split: str, count: int) -> list[tuple[str, str]]:
    """(template, answer) of each sample."""
    world = Toy(split=split, length=count)
    return [(world[i].template, world[i].answers[0]) for i in range(count)]


def floor_by_hand() -> float:
    train = toy_answers("train", 200)  # the toy has no more, though the gate asks for 400
    best = {name: Counter(a for t, a in train if t == name).most_common(1)[0][0] for name in ("odd", "even")}
    return float(np.mean([best[template] == answer for template, answer in toy_answers("heldout", SAMPLES)]))


def test_a_reader_passes_the_gate() -> None:
    summary = run(config(), Toy(), Fake(read), None)
    controls = summary.total.controls
    assert summary.total.score == 1.0
    assert controls[REDEALT] == 0.0, "who reads the new evidence is wrong by the old answer, always"
    assert controls[BY_TEXT] == controls[BY_TEMPLATE] == floor_by_hand()
    fives = np.mean([answer == "5" for _, answer in toy_answers("heldout", SAMPLES)])
    assert controls[GREY] == fives, "grey reads as 5"
    assert summary.verdict is not None and summary.verdict.holds
    assert summary.verdict.floor == floor_by_hand()


def test_a_guesser_scores_the_floor_and_fails_the_gate() -> None:
    summary = run(config(), Toy(), Fake(lambda sample: "3" if sample.template == "odd" else "0"), None)
    assert summary.total.score == summary.total.controls[REDEALT] == summary.total.controls[GREY]
    assert summary.total.score <= floor_by_hand() + 0.1
    assert summary.verdict is not None and not summary.verdict.holds
    assert [finding.split(":")[0] for finding in summary.verdict.findings] == ["does not hold"] * 3


def test_the_most_frequent_answer_is_exactly_the_floor() -> None:
    train = toy_answers("train", 200)
    best = {name: Counter(a for t, a in train if t == name).most_common(1)[0][0] for name in ("odd", "even")}
    summary = run(config(), Toy(), Fake(lambda sample: best[sample.template]), None)
    assert summary.total.score == summary.total.controls[BY_TEXT] == floor_by_hand()


def test_tasks_are_scored_apart() -> None:
    summary = run(config(gate=None), Toy(), Fake(lambda s: read(s) if s.task == "odd" else "?"), None)
    assert [(row.task, row.score, row.samples) for row in summary.tasks] == [("even", 0.0, 100), ("odd", 1.0, 100)]
    assert summary.total.score == 0.5 and summary.verdict is None


def test_what_cannot_be_asked_is_counted_and_named() -> None:
    lines: list[str] = []
    large = Fake(read, most_pixels=lambda sample: sample.id.endswith("/11"))
    summary = run(config(samples=40, gate=None), Toy(broken_every=10), large, None, lines.append)
    assert summary.broken == {"broken image": 4, "over budget": 1}
    assert summary.total.samples == 35 and summary.total.score == 1.0
    assert (
        len(lines) == 5
        and any("toy10.png" in line for line in lines)
        and any("toy/heldout/11" in line for line in lines)
    )


def test_what_cannot_be_asked_stops_when_so_configured() -> None:
    strict = dataclasses.replace(config(gate=None), on_error="fail")
    with pytest.raises(ImageError, match=r"toy0\.png"):
        run(strict, Toy(broken_every=10), Fake(read), None)


def test_nothing_asked_is_an_error_not_a_score() -> None:
    with pytest.raises(ConfigError, match=r"no sample could be asked.*broken image"):
        run(config(samples=5), Toy(broken_every=1), Fake(read), None, lambda line: None)


def test_attention_in_the_box() -> None:
    fake = Fake(read, left=0.75)
    summary = run(config(looks=10), Toy(), fake, None)
    assert fake.looked_at == [f"toy/heldout/{i}" for i in range(10)], "tasks in turn"
    looking = summary.looking
    assert looking is not None and looking.boxes is not None and looking.samples == 10
    assert looking.on_picture == pytest.approx(0.4)
    assert looking.boxes.in_box == pytest.approx(0.75) and looking.boxes.area == 0.5
    assert looking.by_layer == pytest.approx((0.75, 0.75)) and set(looking.by_task) == {"odd", "even"}


def test_vas_is_one_mean_over_the_samples_asked_for(tmp_path: Path) -> None:
    asked = dataclasses.replace(config(gate=None, looks=0), vas=21)
    for rows, score, said in ((4, (11 * 1 + 10 * 3) / 21, "VAS 1.952"), (0, None, "VAS: none of 21 samples")):
        fake, folder = Fake(read, rows=rows), tmp_path / f"rows{rows}"
        summary = run(asked, Toy(), fake, folder / "evaluation" / "toy")
        assert fake.read == [f"toy/heldout/{i}" for i in range(21)], "tasks in turn"
        assert summary.vas == Vas(21, 21 * rows, pytest.approx(score))
        stored = json.loads((folder / "evaluation" / "toy" / "summary.json").read_text())
        assert stored["vas"] == {"samples": 21, "ratios": 21 * rows, "score": pytest.approx(score)}
        assert said in write_report(Report(), folder).read_text()
        console = Console(record=True, width=140, file=io.StringIO())
        print_summary(summary, console)
        assert said in console.export_text()


def test_vas_is_measured_where_it_is_asked_for_alone(tmp_path: Path) -> None:
    fake, file = Fake(read), tmp_path / "evaluation" / "toy" / "summary.json"
    assert run(config(), Toy(), fake, file.parent).vas is None and fake.read == []
    page = write_report(Report(), tmp_path).read_text()
    stored = json.loads(file.read_text())
    assert stored.pop("vas") is None and "VAS" not in page
    file.write_text(json.dumps(stored))
    assert write_report(Report(), tmp_path).read_text() == page, "a summary from before there was VAS"


def test_files(tmp_path: Path) -> None:
    folder = tmp_path / "evaluation" / "toy"
    summary = run(config(looks=6, pictures=3), Toy(), Fake(read), folder)
    lines = [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]
    assert len(lines) == SAMPLES
    assert {"image", "question", "answer", "prediction", "score", "task", "template"} <= lines[0].keys()
    assert [line["image"].startswith("images/") for line in lines[:4]] == [True, True, True, False]
    assert lines[3]["image"] == "toy/heldout/3"
    for line in lines[:3]:
        with Image.open(folder / line["image"]) as image:
            assert image.size == (8, 6)
    assert len(summary.pictures) == 3 and all((folder / name).is_file() for name in summary.pictures)
    stored = json.loads((folder / "summary.json").read_text())
    assert stored["gate"]["holds"] and stored["gate"]["floor"] == floor_by_hand() and stored["total"]["score"] == 1.0
    again = tmp_path / "again"
    run(config(looks=6, pictures=3), Toy(), Fake(read), again)
    for name in ("predictions.jsonl", *summary.pictures):
        assert (folder / name).read_bytes() == (again / name).read_bytes()


def test_report_page(tmp_path: Path) -> None:
    run(config(looks=6, pictures=2), Toy(), Fake(read), tmp_path / "evaluation" / "toy")
    (tmp_path / "config.json").write_text(
        json.dumps({"type": "TrainConfig", "steps": 3, "init": {"type": "Tiny", "seed": 1}})
    )
    rows = [{"step": s, "loss": 3.0 - s} for s in (1, 2, 3)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    page = write_report(Report(title="A run"), tmp_path).read_text()
    for text in (
        "# A run",
        "`Tiny(seed=1)`",
        "loss 2.000 at step 1",
        "The gate holds",
        "| even | exact_match | 100 | 100.0% |",
    ):
        assert text in page
    linked = [part.split(")")[0] for part in page.split("](")[1:]]
    assert len(linked) == 5 and all((tmp_path / name).exists() for name in linked)


def test_report_of_an_empty_run_says_what_there_is(tmp_path: Path) -> None:
    assert write_report(Report(), tmp_path).read_text() == "# Report\n"


def test_table_on_the_terminal() -> None:
    console = Console(record=True, width=140, file=io.StringIO())
    print_summary(run(config(), Toy(broken_every=50), Fake(read), None, lambda line: None), console)
    text = console.export_text()
    assert "left out: 4 broken image" in text
    for word in ("odd", "even", "all", "100.0%", "gate holds", "of the answers' attention"):
        assert word in text


def test_a_gate_needs_a_source_that_redeals(tmp_path: Path) -> None:
    class Plain:
        name = "plain"

        def __len__(self) -> int:
            return 1

        def __getitem__(self, index: int):
            return Toy()[index]

    with pytest.raises(ConfigError, match="QaJsonl"):
        run(Eval("x", QaJsonl(path="x"), gate=GATE), Plain(), Fake(read), None)


@pytest.mark.parametrize(
    "wrong", [{"name": "a/b"}, {"samples": 0}, {"pictures": 9, "looks": 8}, {"patches": -1}, {"vas": -1}]
)
def test_config_errors_name_the_field(wrong: dict) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        Eval(**wrong)

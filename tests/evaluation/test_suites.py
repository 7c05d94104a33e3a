"""An evaluation of subjects whose behaviour is known: a reader, a guesser, and what they leave on disk."""

from __future__ import annotations

import dataclasses
import io
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from rave_jax.config import ConfigError, from_json, to_json
from rave_jax.data.collate import BatchShape
from rave_jax.data.sample import ImageError, Sample, SampleError
from rave_jax.data.sources import QaJsonl, Synthetic
from rave_jax.evaluation.config import Eval, Floor, Grounding, Report
from rave_jax.evaluation.grounding import TaskAim
from rave_jax.evaluation.knocked import Fall, Falls, KnockOuts, summarise
from rave_jax.evaluation.looking import Looking
from rave_jax.evaluation.report import write_report
from rave_jax.evaluation.subject import Answer, PromptOverBudget
from rave_jax.evaluation.suites import open_checked, run
from rave_jax.evaluation.summary import BY_TEMPLATE, BY_TEXT, GREY, OF_ALL, REDEALT, print_summary
from rave_jax.evaluation.vas import Vas
from rave_jax.families.config import DeltaConfig, TextConfig
from tests.evaluation.toy import Fake, Toy, any_source, read

SAMPLES = 200
FLOOR = Floor(train=any_source(Toy(split="train")), train_samples=400)
CHECK = Grounding(aims=(TaskAim("odd", 0.9),))


def config(
    samples: int = SAMPLES,
    grounding: Grounding | None = CHECK,
    looks: int = 8,
    pictures: int = 0,
    floor: Floor | None = FLOOR,
) -> Eval:
    data = any_source(Toy())
    return Eval("toy", data, samples=samples, rows=16, looks=looks, pictures=pictures, floor=floor, grounding=grounding)


def toy_answers(split: str, count: int) -> list[tuple[str, str]]:
    """(template, answer) of each sample."""
    world = Toy(split=split, length=count)
    return [(world[i].template, world[i].answers[0]) for i in range(count)]


def floor_by_hand() -> float:
    train = toy_answers("train", 200)  # the toy has no more, though the floor asks for 400
    best = {name: Counter(a for t, a in train if t == name).most_common(1)[0][0] for name in ("odd", "even")}
    return float(np.mean([best[template] == answer for template, answer in toy_answers("heldout", SAMPLES)]))


def test_a_reader_passes_the_grounding_check() -> None:
    summary = run(config(), Toy(), Fake(read), None)
    controls = summary.total.controls
    assert summary.total.score == 1.0
    assert controls[REDEALT] == 0.0, "who reads the new evidence is wrong by the old answer, always"
    assert controls[BY_TEXT] == controls[BY_TEMPLATE] == floor_by_hand()
    fives = np.mean([answer == "5" for _, answer in toy_answers("heldout", SAMPLES)])
    assert controls[GREY] == fives, "grey reads as 5"
    assert summary.verdict is not None and summary.verdict.holds
    assert summary.verdict.floor == floor_by_hand()


def test_a_guesser_scores_the_floor_and_fails_the_grounding_check() -> None:
    summary = run(config(), Toy(), Fake(lambda sample: "3" if sample.template == "odd" else "0"), None)
    assert summary.total.score == summary.total.controls[REDEALT] == summary.total.controls[GREY]
    assert summary.total.score <= floor_by_hand() + 0.1
    assert summary.verdict is not None and not summary.verdict.holds
    assert [finding.split(":")[0] for finding in summary.verdict.findings] == ["does not hold"] * 3
    assert "without looking (most frequent answer" in summary.verdict.findings[0]


def own(samples: int = SAMPLES) -> Eval:
    """An evaluation of a user's data: nothing is said but the samples."""
    return Eval("own", any_source(Toy()), samples=samples, rows=16, looks=0, pictures=0, routes=0)


def test_own_data_has_a_floor_and_an_interval_by_default(tmp_path: Path) -> None:
    """Toy's pictures are ten brightnesses: the answer to each question is counted over the nine others."""
    world = [Toy()[i] for i in range(SAMPLES)]
    shades = [read(sample) for sample in world]
    wanted = []
    for sample, shade in zip(world, shades, strict=True):
        others = [s.answers[0] for s, other in zip(world, shades, strict=True) if other != shade]
        alike = [
            s.answers[0] for s, o in zip(world, shades, strict=True) if o != shade and s.question == sample.question
        ]
        wanted.append(sample.answers[0] in (alike or others))
    assert not any(wanted), "no other brightness has this one's answer"
    most = Counter(sample.answers[0] for sample in world).most_common(1)[0][1] / SAMPLES
    fives = np.mean([sample.answers[0] == "5" for sample in world])
    summary = run(own(), Toy(), Fake(read), tmp_path / "evaluation" / "own")
    total, floor = summary.total, summary.floor
    assert total.controls == {BY_TEXT: 0.0, BY_TEMPLATE: 0.0, OF_ALL: most, GREY: fives}
    assert total.pictures == 10 and 0 < total.low < total.score == total.high == 1.0
    assert floor is not None and (floor.name, floor.floor, floor.above) == (OF_ALL, most, pytest.approx(1 - most))
    page = write_report(Report(), tmp_path).read_text()
    console = Console(record=True, width=100, file=io.StringIO())
    print_summary(summary, console)
    for text in (page, console.export_text()):
        assert f"uestion-only floor {most:.1%} (most frequent of all answers); score minus floor" in text
        assert f"{100 * total.low:.1f} to 100.0" in text and "10 pictures" in text


def test_a_score_at_the_floor_is_not_above_it() -> None:
    summary = run(own(), Toy(), Fake(lambda sample: "3"), None)
    assert summary.floor is not None and summary.floor.above <= 0 and "not decided" in summary.floor.sentence()
    none = run(dataclasses.replace(own(), floor=None), Toy(), Fake(read), None)
    assert none.floor is None and none.total.controls == {}


def test_questions_without_pictures_have_no_grey_floor() -> None:
    """Their answers are from the question already; among others with pictures they keep their own score."""

    class Mixed(Toy):
        def __getitem__(self, index: int) -> Sample:
            sample = super().__getitem__(index)
            if self.broken_every and index % 2:
                return sample
            return dataclasses.replace(sample, messages=({"role": "user", "content": "9?"}, sample.messages[-1]))

    blind = run(own(40), Mixed(), Fake(lambda sample: "4"), None)
    assert GREY not in blind.total.controls and blind.total.pictures == 40
    half = run(own(40), Mixed(broken_every=99), Fake(lambda s: read(s) if s.images else "4"), None)
    rows = {row.task: row for row in half.tasks}
    assert rows["even"].controls[GREY] == rows["even"].score < 1 == rows["odd"].score
    assert rows["odd"].controls[GREY] < 0.5


def test_a_sample_that_cannot_be_scored_is_left_out_and_an_unknown_metric_stops_at_once() -> None:
    class Unscored(Toy):
        def __getitem__(self, index: int) -> Sample:
            sample = super().__getitem__(index)
            return dataclasses.replace(sample, answers=() if index % 4 == 0 else sample.answers)

    summary = run(own(40), Unscored(), Fake(read), None, lambda line: None)
    assert summary.broken == {"empty answer": 10} and summary.total.samples == 30
    fake = Fake(read)
    sourced = [dataclasses.replace(Toy()[i], metric="bleu") for i in range(4)]
    with pytest.raises(ConfigError, match="toy/toy/heldout/0: metric is 'bleu', expected one of 'exact_match'"):
        run(own(4), type("List", (list,), {"name": "list"})(sourced), fake, None)


def test_what_older_versions_wrote_is_read(tmp_path: Path) -> None:
    """Configs and summaries in which the grounding check is called `gate`."""
    gate = {"type": "Gate", "train": to_json(Synthetic()), "train_samples": 7, "margin": 0.5, "aims": []}
    older = {"type": "Eval", "name": "old", "gate": gate}
    wanted = Eval("old", floor=Floor(train=Synthetic(), train_samples=7), grounding=Grounding(margin=0.5))
    assert from_json(Eval, older) == wanted == from_json(Eval, to_json(wanted))
    assert from_json(Eval, {"type": "Eval", "gate": None}) == Eval()
    with pytest.raises(ConfigError, match=r"grounding.margni: Grounding has no such field; did you mean 'margin'"):
        from_json(Eval, {"gate": {"margni": 1}})
    folder = tmp_path / "evaluation" / "toy"
    run(config(), Toy(), Fake(read), folder)
    stored = json.loads((folder / "summary.json").read_text())
    stored["gate"] = stored.pop("grounding")
    del stored["floor"]
    for row in (*stored["tasks"], stored["total"]):
        for name in ("low", "high", "pictures"):
            del row[name]
    (folder / "summary.json").write_text(json.dumps(stored))
    page = write_report(Report(), tmp_path).read_text()
    assert "The grounding check holds" in page and "95 %" not in page


def test_the_most_frequent_answer_is_exactly_the_floor() -> None:
    train = toy_answers("train", 200)
    best = {name: Counter(a for t, a in train if t == name).most_common(1)[0][0] for name in ("odd", "even")}
    summary = run(config(), Toy(), Fake(lambda sample: best[sample.template]), None)
    assert summary.total.score == summary.total.controls[BY_TEXT] == floor_by_hand()


def test_tasks_are_scored_apart() -> None:
    summary = run(config(grounding=None), Toy(), Fake(lambda s: read(s) if s.task == "odd" else "?"), None)
    assert [(row.task, row.score, row.samples) for row in summary.tasks] == [("even", 0.0, 100), ("odd", 1.0, 100)]
    assert summary.total.score == 0.5 and summary.verdict is None


def test_what_cannot_be_asked_is_counted_and_named() -> None:
    lines: list[str] = []
    large = Fake(read, most_pixels=lambda sample: sample.id.endswith("/11"))
    summary = run(config(samples=40, grounding=None), Toy(broken_every=10), large, None, lines.append)
    assert summary.broken == {"broken image": 4, "over budget": 1}
    assert summary.total.samples == 35 and summary.total.score == 1.0
    assert (
        len(lines) == 5
        and any("toy10.png" in line for line in lines)
        and any("toy/heldout/11" in line for line in lines)
    )


def test_many_prompts_over_budget_are_a_few_lines_and_the_budget_they_need() -> None:
    class Small(Fake):
        """Takes odd samples alone; the others need a token more than the one before."""

        def answer(self, samples: Sequence[Sample]) -> list[Answer | SampleError]:
            shape = BatchShape(1, 64, 36)
            over = [PromptOverBudget(s.id, 100 + int(s.id.split("/")[-1]), 40, shape) for s in samples]
            return [a if s.task == "odd" else o for a, o, s in zip(super().answer(samples), over, samples, strict=True)]

    lines: list[str] = []
    run(own(100), Toy(), Small(read), None, lines.append)
    assert len(lines) == 6 and "the prompt has 100 tokens and 40 patches, over the budget of tokens 64" in lines[0]
    assert lines[-1] == "left out: 50 prompts over budget; all fit with tokens 198 and patches 40"
    with pytest.raises(ConfigError, match="left out: 1 over budget; all fit with tokens 100 and patches 40"):
        run(own(1), Toy(), Small(read), None, lines.append)


def test_what_cannot_be_asked_stops_when_so_configured() -> None:
    strict = dataclasses.replace(config(grounding=None), on_error="fail")
    with pytest.raises(ImageError, match=r"toy0\.png"):
        run(strict, Toy(broken_every=10), Fake(read), None)


def test_nothing_asked_is_an_error_not_a_score() -> None:
    with pytest.raises(ConfigError, match=r"no sample could be asked.*broken image"):
        run(config(samples=5), Toy(broken_every=1), Fake(read), None, lambda line: None)


def test_attention_in_the_box() -> None:
    fake = Fake(read, left=0.75)
    summary = run(config(looks=10), Toy(), fake, None)
    assert fake.looked_at == [f"toy/heldout/{i}" for i in range(10)], "tasks in turn"
    looking = summary.findings["looking"]
    assert isinstance(looking, Looking) and looking.boxes is not None and looking.samples == 10
    assert looking.on_picture == pytest.approx(0.4)
    assert looking.boxes.in_box == pytest.approx(0.75) and looking.boxes.area == 0.5
    assert looking.question is not None and looking.question.in_box == pytest.approx(0.25), "it looks right"
    assert looking.by_layer == pytest.approx((0.75, 0.75)) and set(looking.by_task) == {"odd", "even"}


def test_what_parts_of_the_picture_are_worth_is_compared_with_the_evidence(tmp_path: Path) -> None:
    """Each answer of the toy falls by 3 nats on the left, where the evidence is, and by 1 on the right."""
    asked = dataclasses.replace(config(grounding=None, looks=2, pictures=2), knock_outs=6)
    folder = tmp_path / "evaluation" / "toy"
    summary = run(asked, Toy(), Fake(read), folder)
    found = summary.findings["knock_out"]
    assert isinstance(found, KnockOuts)
    assert found.falls == Falls(6, pytest.approx(0.75), pytest.approx(0.5), pytest.approx(3.5))
    assert {task: falls.samples for task, falls in found.by_task.items()} == {"even": 3, "odd": 3}
    names = ["pictures/000_knock_out.png", "pictures/001_knock_out.png"]
    assert [name for name in summary.pictures if "knock_out" in name] == names
    with np.load((folder / names[0]).with_suffix(".npz")) as arrays:
        assert arrays["falls"].shape == (2, 2) and arrays["whole"] == 3.5 and arrays["box"].tolist() == [0, 0, 0.5, 1]
    page = write_report(Report(), tmp_path).read_text()
    head = "| task | answers | nats without the picture | cost in the evidence box | area of the box | x uniform |"
    assert f"{head}\n" in page
    assert "| all | 6 | 3.50 | 75.0% | 50.0% | 1.50 |" in page and "![what hiding parts costs one answer]" in page
    unasked = run(config(looks=0), Toy(), Fake(read), None)
    assert unasked.findings["knock_out"] is None


def test_falls_weigh_answers_by_how_far_they_fall() -> None:
    falls = [Fall("a", 4.0, 3.0, 0.1, 5.0), Fall("a", 0.0, 0.0, 0.9, -0.5), Fall("b", 1.0, 0.5, 0.2, 1.5)]
    found = summarise(falls)
    assert found is not None
    assert found.falls == Falls(3, pytest.approx(3.5 / 5), pytest.approx((4 * 0.1 + 0.2) / 5), pytest.approx(2.0))
    assert found.by_task["a"] == Falls(2, pytest.approx(0.75), pytest.approx(0.1), pytest.approx(2.25))
    nothing = summarise(falls[1:2])
    assert nothing is not None and (nothing.falls.in_box, nothing.falls.area) == (0, pytest.approx(0.9))
    assert summarise([]) is None


def test_nothing_is_hidden_from_a_layer_that_keeps_a_state() -> None:
    delta = DeltaConfig(layers=(0, 1), key_heads=1, value_heads=1, key_dim=8, value_dim=8)
    with pytest.raises(ConfigError, match="knock_outs is 3, but the model has layers with the gated delta rule"):
        open_checked(Eval(knock_outs=3), TextConfig(num_layers=4, delta=delta))


def test_a_layer_that_does_not_attend_cannot_be_looked_at() -> None:
    delta = DeltaConfig(layers=(0, 1), key_heads=1, value_heads=1, key_dim=8, value_dim=8)
    text = TextConfig(num_layers=4, delta=delta)
    assert open_checked(Eval(layers=(2, 3)), text).name
    for layer, found in ((1, "which does not attend; the model's layers that do are 2, 3"), (4, "layers are 0 to 3")):
        with pytest.raises(ConfigError, match=f"^layers has {layer}, .*{found}"):
            open_checked(Eval(layers=(layer,)), text)


def test_vas_is_one_mean_over_the_samples_asked_for(tmp_path: Path) -> None:
    asked = dataclasses.replace(config(grounding=None, looks=0), vas=21)
    for rows, score, said in ((4, (11 * 1 + 10 * 3) / 21, "VAS 1.952"), (0, None, "VAS: none of 21 samples")):
        fake, folder = Fake(read, rows=rows), tmp_path / f"rows{rows}"
        summary = run(asked, Toy(), fake, folder / "evaluation" / "toy")
        assert fake.read == [f"toy/heldout/{i}" for i in range(21)], "tasks in turn"
        assert summary.findings["vas"] == Vas(21, 21 * rows, pytest.approx(score))
        stored = json.loads((folder / "evaluation" / "toy" / "summary.json").read_text())
        assert stored["vas"] == {"samples": 21, "ratios": 21 * rows, "score": pytest.approx(score)}
        assert said in write_report(Report(), folder).read_text()
        console = Console(record=True, width=140, file=io.StringIO())
        print_summary(summary, console)
        assert said in console.export_text()


def test_vas_is_measured_where_it_is_asked_for_alone(tmp_path: Path) -> None:
    fake, file = Fake(read), tmp_path / "evaluation" / "toy" / "summary.json"
    assert run(config(), Toy(), fake, file.parent).findings["vas"] is None and fake.read == []
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
    assert (
        stored["grounding"]["holds"]
        and stored["grounding"]["floor"] == floor_by_hand()
        and stored["total"]["score"] == 1.0
    )
    with np.load((folder / summary.pictures[0]).with_suffix(".npz")) as arrays:
        assert arrays["weights"].shape == (2, 3, 2, 2) and arrays["weights"].sum((-2, -1)) == pytest.approx(0.4)
        assert arrays["times_even"] == pytest.approx(np.ones((2, 2))) and arrays["box"].tolist() == [0, 0, 0.5, 1]
        assert arrays["times_even_by_head"].shape == (3, 2, 2)
    again = tmp_path / "again"
    run(config(looks=6, pictures=3), Toy(), Fake(read), again)
    for name in ("predictions.jsonl", *summary.pictures):
        assert (folder / name).read_bytes() == (again / name).read_bytes()


def test_pictures_of_heads_and_for_print(tmp_path: Path) -> None:
    folder = tmp_path / "evaluation" / "toy"
    asked = dataclasses.replace(config(looks=2, pictures=2), per_head=True, picture_format="pdf")
    summary = run(asked, Toy(), Fake(read), folder)
    stems = ("000_toy_heldout_0", "001_toy_heldout_1")
    assert summary.pictures == tuple(f"pictures/{stem}{kind}.pdf" for stem in stems for kind in ("", "_heads"))
    assert {p.name for p in (folder / "pictures").glob("*.npz")} == {f"{stem}.npz" for stem in stems}
    page = write_report(Report(), tmp_path).read_text()
    assert "](evaluation/toy/pictures/000_toy_heldout_0_heads.pdf)" in page and "multiples of uniform attention" in page


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
        "The grounding check holds",
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
    for word in ("odd", "even", "all", "100.0%", "grounding check holds", "of the answers' attention"):
        assert word in text


def test_the_grounding_check_needs_a_source_that_redeals(tmp_path: Path) -> None:
    class Plain:
        name = "plain"

        def __len__(self) -> int:
            return 1

        def __getitem__(self, index: int):
            return Toy()[index]

    with pytest.raises(ConfigError, match="QaJsonl"):
        run(Eval("x", QaJsonl(path="x"), grounding=CHECK), Plain(), Fake(read), None)


@pytest.mark.parametrize(
    "wrong", [{"name": "a/b"}, {"samples": 0}, {"pictures": 9, "looks": 8}, {"patches": -1}, {"vas": -1}]
)
def test_config_errors_name_the_field(wrong: dict) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        Eval(**wrong)

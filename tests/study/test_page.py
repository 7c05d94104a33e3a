"""What a study's page says: the table, the rule, the correction, curves; as Markdown and as one HTML file."""

from __future__ import annotations

import dataclasses
import html.parser
from pathlib import Path

import pytest

from rave_jax.study.config import Judged, Study
from rave_jax.study.page import write
from rave_jax.study.rows import Row
from rave_jax.study.summary import ArmSummary, band, summarise
from tests.study.small import row_of, small

SCORES = {
    "off": (0.60, 0.70, 0.80),
    "biased": (0.65, 0.753, 0.851),
    "slow": (0.61, 0.69, 0.82),
    "learned": (0.7, 0.7),
    "learned-biased": (0.75,),
}


def kept(study: Study) -> dict[str, dict[int, Row]]:
    return {
        name: {seed: row_of(study, study.cells((name,), (seed,))[0], score) for seed, score in enumerate(scores)}
        for name, scores in SCORES.items()
    }


def line(text: str, arm: str) -> list[str]:
    return next(
        [cell.strip() for cell in row.split("|")[1:-1]] for row in text.splitlines() if row.startswith(f"| `{arm}` |")
    )


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    study, folder = small(), tmp_path_factory.mktemp("study")
    return folder, write(folder, study, summarise(study, kept(study)))


def test_the_table_has_means_differences_and_verdicts(page: tuple[Path, str]) -> None:
    _, text = page
    header = next(row for row in text.splitlines() if row.startswith("| arm |"))
    assert [cell.strip() for cell in header.split("|")[1:-1]] == [
        "arm",
        "added parameters",
        "seeds",
        "score (95 %)",
        "against",
        "difference (95 %)",
        "bootstrap 95 %",
        "corrected",
        "decision",
        "missing",
    ]
    off = line(text, "off")
    # 70 points, standard deviation 10, t of two degrees 4.303.
    assert off[2:4] == ["3", "70.0% (45.2 to 94.8)"]
    biased = line(text, "biased")
    # 5.0, 5.3 and 5.1: standard deviation 0.153, and for two comparisons t is 6.205.
    assert biased[4:] == ["`off`", "+5.1 (+4.8 to +5.5)", "+5.0 to +5.3", "+4.6 to +5.7", "**better**", ""]
    assert line(text, "slow")[-2:] == ["not decided: the interval holds 0", ""]
    assert line(text, "learned-biased")[2:] == [
        "1",
        "75.0%",
        "`learned`",
        "+5.0",
        "",
        "",
        "not decided: 1 seed of at least 3",
        "seeds 1, 2",
    ]


def test_it_says_the_rule_and_what_the_correction_does(page: tuple[Path, str]) -> None:
    _, text = page
    assert "Not decided: arm and control share fewer than 3 seeds." in text
    assert "Not decided: all seeds differ by exactly the same, and not by 0." in text
    assert "2 arms are compared with `off`" in text and "at 97.50% each (Bonferroni: 5 % divided by 2)" in text
    assert "As the only comparison, 1 would be better or worse; the correction takes none of them back." in text
    assert "One arm is compared with `learned`, so nothing is corrected." in text


def test_a_decision_that_the_correction_takes_back_is_named() -> None:
    study = small()
    rows = kept(study)
    for seed, gain in enumerate((0.02, 0.05, 0.055)):
        rows["slow"][seed] = row_of(study, study.cells(("slow",), (seed,))[0], SCORES["off"][seed] + gain)
    (scratch, _) = summarise(study, rows)
    assert (scratch.families[0].alone, scratch.families[0].decided) == (["biased"], ["biased"])
    for seed, gain in enumerate((0.038, 0.05, 0.062)):
        rows["slow"][seed] = row_of(study, study.cells(("slow",), (seed,))[0], SCORES["off"][seed] + gain)
    many = dataclasses.replace(
        study, arms=(*study.arms, *(dataclasses.replace(study.arms[2], name=f"s{n}") for n in range(20)))
    )
    family = summarise(many, rows)[0].families[0]
    assert family.comparisons == 22 and family.alone == ["biased", "slow"] and family.decided == ["biased"]


def test_the_html_is_one_file_with_its_pictures(page: tuple[Path, str]) -> None:
    folder, text = page
    found: list[tuple[str, dict[str, str | None]]] = []

    class Reader(html.parser.HTMLParser):
        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            found.append((tag, dict(attrs)))

    whole = (folder / "study.html").read_text()
    Reader().feed(whole)
    sources = [attrs["src"] for tag, attrs in found if tag == "img"]
    assert len(sources) == 2 and all(s is not None and s.startswith("data:image/png;base64,") for s in sources)
    assert "<b>better</b>" in whole and "<code>off</code>" in whole
    assert (folder / "study.md").read_text() == text and text.count("![loss over steps](curves/") == 2
    assert (folder / "curves" / "scratch-loss.png").read_bytes()[:4] == b"\x89PNG"


def test_text_of_a_study_does_nothing_on_the_page(tmp_path: Path) -> None:
    study = small(title="<script>alert(1)</script>")
    write(tmp_path, study, summarise(study, {}))
    assert "<script>" not in (tmp_path / "study.html").read_text()


def test_without_rows_all_is_missing(tmp_path: Path) -> None:
    study = small()
    text = write(tmp_path, study, summarise(study, {}))
    assert line(text, "off")[-1] == "seeds 0, 1, 2"
    assert line(text, "biased")[-2:] == ["not decided: no seed that both have", "seeds 0, 1, 2"]


def test_several_tasks_have_their_own_differences(tmp_path: Path) -> None:
    study = small(tasks=(Judged("easy"), Judged("hard")))
    rows = {
        name: {
            seed: row_of(study, study.cells((name,), (seed,))[0], 0.5, scores={"easy": easy, "hard": 0.4 + seed / 100})
            for seed in (0, 1, 2)
        }
        for name, easy in (("off", 0.8), ("biased", 0.9))
    }
    text = write(tmp_path, study, summarise(study, rows))
    assert line(text, "biased")[3].startswith("65.5%")
    tasks = [row for row in text.splitlines() if row.startswith("| `biased` | 90")]
    assert tasks == ["| `biased` | 90.0%, +10.0 (+10.0 to +10.0) | 41.0%, +0.0 (+0.0 to +0.0) |"]


@pytest.mark.parametrize(
    ("findings", "headers"),
    [(["easy/on_evidence"], ["on evidence"]), (["easy/visual", "hard/visual"], ["easy/visual", "hard/visual"])],
)
def test_findings_of_several_tasks_name_their_task(tmp_path: Path, findings: list[str], headers: list[str]) -> None:
    study = small()
    row = row_of(study, study.cells(("off",), (0,))[0], 0.7, findings=dict.fromkeys(findings, 3.0))
    text = write(tmp_path, study, summarise(study, {"off": {0: row}}))
    header = next(row for row in text.splitlines() if row.startswith("| arm |"))
    assert f"| decision | {' | '.join(headers)} | missing |" in header


def test_a_band_is_of_the_steps_that_all_seeds_have() -> None:
    study = small()
    cells = study.cells(("off",))
    points = ([[1.0, 2.0], [2.0, 4.0]], [[1.0, 4.0], [3.0, 1.0]], [[1.0, 6.0]])
    rows = {cell.seed: row_of(study, cell, 0.5, curves={"loss": one}) for cell, one in zip(cells, points, strict=True)}
    found = band(rows, "loss")
    assert found.steps == [1.0] and found.mean == [4.0]
    assert found.intervals[0].low == pytest.approx(4 - 4.302653 * 2 / 3**0.5)
    assert band({}, "loss").steps == []


def test_an_arm_without_a_control_has_no_comparison() -> None:
    study = small()
    arms: dict[str, ArmSummary] = {one.arm.name: one for one in summarise(study, kept(study))[0].arms}
    assert arms["off"].comparison is None and arms["biased"].comparison is not None

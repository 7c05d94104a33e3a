"""`rave-jax look`: the page of one answer, what is printed, and what is refused before a model is read."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from rave_jax.evaluation.subject import Answer
from rave_jax.look.blocks import KnockOut
from rave_jax.look.maps import Look
from rave_jax.tools import look as command
from rave_jax.tools.cli import main

ASKED = "Which <digit> is on the red cell?"
WEIGHTS = np.zeros((1, 2, 2, 3), np.float32)
WEIGHTS[..., 0, 0], WEIGHTS[..., 1, 2] = 0.3, 0.1


def flags(folder: Path, *more: str) -> list[str]:
    return ["look", str(folder), "--prompt", ASKED, "--image", str(folder.parent / "one.png"), *more]


@pytest.mark.parametrize("hidden", [True, False])
def test_the_page_and_the_shares_in_the_box(
    hidden: bool, folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The picture is 84 x 56 pixels, a cell 28 x 28; the box is the first cell and half of the second."""
    found = KnockOut(np.array([[2.0, 1.0, 0.0], [1.0, -3.0, 1.0]]), 4.5, -0.5) if hidden else None
    answered = (Answer("5 <b>", (1,)), Look(WEIGHTS, question=WEIGHTS[..., ::-1]), found)
    monkeypatch.setattr(command, "_asked", lambda *given: answered)
    page = tmp_path / "page.html"
    assert main(flags(folder, "--box", "0", "0", "42", "28", "--html", str(page))) == 0
    said = capsys.readouterr().out
    for line in (
        "5 <b>",
        "40.0% of the answer's attention is on the picture.",
        "attention of the answer: 75.0% in the box, whose area is 25.0% (3.00 x uniform)",
        "attention of the question: 0.0% in the box, whose area is 25.0% (0.00 x uniform)",
        str(page),
    ):
        assert f"{line}\n" in said
    text = page.read_text()
    assert "&lt;digit&gt;" in text and "5 &lt;b&gt;" in text and "<script" not in text
    assert text.count("<figure>") == text.count("data:image/png") == 3 + hidden
    cost = "what hiding a part costs: 50.0% in the box, whose area is 25.0% (2.00 x uniform)"
    assert (cost in said) == ("picture costs the answer 4.50 nats" in said) == hidden
    assert ("Nothing was hidden" in said) != hidden


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--picture", "2"), "--picture 2: expected 1 to 1, a number of the --image flags"),
        (("--box", "0", "0", "85", "9"), "--box 0 0 85 9: expected X1 Y1 X2 Y2 with 0 <= X1 < X2 <= 84"),
        (("--box", "9", "0", "9", "9"), "--box 9 0 9 9: expected"),
        (("--html", "nowhere/page.html"), "--html nowhere/page.html: there is no folder nowhere: make it first"),
        (("--html", "."), "--html .: it is a directory"),
        (("--image", "gone.png"), "gone.png: No such file"),
    ],
)
def test_what_cannot_be_used_is_refused_before_the_weights_are_read(
    more: tuple[str, ...],
    message: str,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(folder.parent)
    monkeypatch.setattr(command, "_asked", lambda *given: pytest.fail("the model was asked"))
    assert main(flags(folder, *more)) == 2
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_one_answer_of_a_model(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "page.html"
    assert main(flags(folder, "--html", str(page), "--max-new-tokens", "3", "--blocks", "4", "--rows", "2")) == 0
    said = capsys.readouterr().out
    assert "of the answer's attention is on the picture" in said and "nats" in said
    assert page.read_text().count("<figure>") == 4

"""`rave-jax data`: what the data of a config needs, and which of it cannot be used."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from rave_jax import config as configs
from rave_jax.checkpoint import tiny
from rave_jax.data.config import DataConfig, Stage
from rave_jax.data.sources import LlavaJson, QaJsonl
from rave_jax.tools.cli import main
from rave_jax.training.config import TrainConfig
from rave_jax.training.init import FromHF
from tests.data.pictures import noise


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """A run of a model without weights on one file of conversations and one of questions."""
    model = tmp_path / "model"
    model.mkdir()
    tiny.write_tiny_files(model, tiny.Tiny())
    Image.fromarray(noise(56, 84)).save(tmp_path / "a.png")
    talk = {"image": "a.png", "conversations": [{"from": "human", "value": "<image>Q"}, {"from": "gpt", "value": "A"}]}
    talks = [talk, talk, {**talk, "tools": ["f"]}, {**talk, "tools": ["g"]}, {**talk, "image": "gone.png"}]
    (tmp_path / "talk.json").write_text(json.dumps(talks))
    (tmp_path / "qa.jsonl").write_text(json.dumps({"question": "Q" * 100, "answers": ["A"]}))
    data = DataConfig(
        (LlavaJson(str(tmp_path / "talk.json")), QaJsonl(str(tmp_path / "qa.jsonl"), name="qa")),
        (Stage(), Stage(5, (1.0, 0.0), tokens=300, patches=300)),
        rows=8,
        tokens=20,
        patches=24,
        documents_per_row=2,
    )
    path = tmp_path / "config.json"
    path.write_text(configs.dumps(TrainConfig(str(tmp_path / "run"), FromHF(str(model)), data=data)))
    return path


def test_needs_and_budgets(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", str(config), "--data.seed", "3"]) == 1
    out, err = capsys.readouterr()
    rows = {line.split()[0]: line.split()[1:] for line in out.splitlines() if "/" in line and ":" not in line}
    assert rows["talk"][:3] == ["5", "2", "3"]
    assert rows["qa"][:3] == ["1", "1", "0"]
    tokens, patches = int(rows["talk"][-3]), int(rows["talk"][-1])
    assert patches == 24 and tokens > 6
    assert "talk: 2 unread key, such as" in out and "tool calls are not supported" in out
    assert "talk: 1 broken image, such as" in out and "gone.png" in out
    assert "--every lists them all" in out
    assert "(from step 0 on, 2 samples in each) hold 0.0% of talk, 0.0% of qa" in out
    assert "rows of 300 tokens and" in out and "(from step 5 on, 2 samples in each) hold 100.0% of talk\n" in out
    assert f"to hold all that was measured of each source: --data.tokens {2 * int(rows['qa'][-3])} " in out
    assert err == ""
    assert not (config.parent / "run").exists()


def test_every_sample_that_cannot_be_used(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "--samples", "5", str(config), "--every"]) == 1
    out = capsys.readouterr().out
    assert [line.split(" ")[0] for line in out.splitlines() if line.startswith("talk[")] == [
        "talk[2]",
        "talk[3]",
        "talk[4]",
    ]


def test_a_source_that_cannot_be_opened_is_one_line(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", str(config), "--data.sources.0.path", str(config.parent)]) == 2
    line = capsys.readouterr().err
    assert line.startswith("rave-jax: data.sources.0: ") and "it is a directory; only regular files are read" in line
    assert line.count("\n") == 1


def test_a_page_of_rows(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Rows of the next step follow where one has too few; samples that cannot be used are named on the page."""
    page = config.parent / "page.html"
    more = ["--data.tokens", "600", "--data.patches", "600", "--data.rows", "2", "--data.stages", "[]"]
    assert main(["data", str(config), "--show", "3", "--html", str(page), "--step", "7", *more]) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"{page}: 3 rows with ") and "samples skipped" in out and out.count("\n") == 1
    text = page.read_text()
    assert text.count('<section class="row"') == 3
    assert "step 7, row 1" in text and "step 8, row 0" in text and "step 8, row 1" not in text
    assert "Rows of steps 7 to 8" in text
    assert text.count("data:image/png;base64,") >= 1
    assert not (config.parent / "run").exists()


def test_a_page_of_packed_rows(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Several samples in a row, and what the plan leaves out is named."""
    page = config.parent / "page.html"
    more = ["--data.packing", "Packing", "--data.documents_per_row", "1", "--data.stages", "[]"]
    more += [
        "--data.tokens",
        "600",
        "--data.patches",
        "600",
        "--data.rows",
        "1",
        "--data.packing.whole_epochs",
        "False",
    ]
    assert main(["data", str(config), "--show", "1", "--html", str(page), *more]) == 0
    text = page.read_text()
    assert text.count('<section class="document"') > 1
    assert "gone.png: No such file" in text and "tool calls are not supported" in text


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--show", "0"], "'0' is not a count, expected a number of at least 1"),
        (["--show", "1000"], "'1000' rows are more than a page holds, expected at most 256"),
        (["--show", "2", "--step", "-1"], "'-1' is not a step, expected a number of at least 0"),
        (["--step", "2"], "--step needs --show ROWS"),
        (["--html", "a.html"], "--html needs --show ROWS"),
        (["--show", "2", "--html", "{folder}"], "it is a directory, expected the name of a file"),
        (["--show", "2", "--html", "{folder}/no/a.html"], "there is no folder"),
        (["--show", "2", "--html", "x" * 300], "cannot be written: File name too long"),
        (["--show", "2", "--html", "{folder}/a.html", "--data.on_error", "fail"], "rave-jax: "),
    ],
)
def test_what_no_page_can_be_made_of_is_one_line(
    flags: list[str], says: str, config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [flag.replace("{folder}", str(config.parent)) for flag in flags]
    try:
        code: object = main(["data", str(config), *given])
    except SystemExit as end:
        code = end.code
    err = capsys.readouterr().err
    assert code == 2
    assert says in err.splitlines()[-1]
    assert "Traceback" not in err

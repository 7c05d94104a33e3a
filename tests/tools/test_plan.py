"""`rave-jax plan`: what is refused before anything is compiled. tests/plan holds what is planned."""

from __future__ import annotations

import json

import pytest

from rave_jax.plan import libtpu
from rave_jax.tools.cli import main

QUICKSTART = ("plan", "configs/quickstart.py")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (QUICKSTART, "--topology is missing, expected CHIP:SHAPE, as --topology v5e:16x16"),
        ((*QUICKSTART, "--topology", "v9:2x2"), "with one of the chips v5e (as v5e:16x16), v5p (as v5p:4x4x4), v6e"),
        (
            (*QUICKSTART, "--topology", "v5e:2x2", "--mesh.tensor", "3"),
            "mesh is data 1 x fsdp -1 x tensor 3, but devices are 4; what fits: tensor 1 or 2 or 4",
        ),
        (
            (*QUICKSTART, "--topology", "v5e:2x2", "--init", "FromHF", "--init.path", "checkpoints/Unknown-1B"),
            "init.path is 'checkpoints/Unknown-1B', expected a directory that holds a config.json (weights are not "
            "needed), or one with the name of a released model: Qwen2.5-VL-3B-Instruct",
        ),
        ((*QUICKSTART, "--topology", "v5e:2x2", "--json", "nowhere/plan.json"), "--json is 'nowhere/plan.json'"),
        (
            (*QUICKSTART, "--topology", "v5e:2x2", "--json", "docs"),
            "--json is 'docs', a file that cannot be written: Is",
        ),
        (
            (*QUICKSTART, "--topology", "v5e:2x2", "--generation", "--full"),
            "--generation compiles nothing, so that --full cannot stand beside it",
        ),
    ],
)
def test_what_cannot_be_planned_is_one_line(words: tuple[str, ...], says: str, capsys, monkeypatch, repo) -> None:
    monkeypatch.chdir(repo)
    assert main(words) == 2
    said = capsys.readouterr()
    assert says in said.err and said.err.count("\n") == 1
    assert said.out == ""


def test_a_config_that_is_not_there_is_named(capsys) -> None:
    with pytest.raises(SystemExit) as stop:
        main(("plan", "configs/quikstart.py", "--topology", "v5e:2x2"))
    assert stop.value.code == 2
    assert "did you mean quickstart?" in capsys.readouterr().err


def test_without_the_compiler_it_says_how_to_get_it(capsys, monkeypatch, repo) -> None:
    monkeypatch.chdir(repo)
    monkeypatch.setattr(libtpu, "available", lambda: False)
    assert main((*QUICKSTART, "--topology", "v5e:2x2")) == 2
    assert "pip install 'rave-jax[tpu]'" in capsys.readouterr().err


def test_answers_are_planned_without_the_compiler(tmp_path, capsys, monkeypatch, repo) -> None:
    monkeypatch.chdir(repo)
    monkeypatch.setattr(libtpu, "available", lambda: False)
    assert main((*QUICKSTART, "--topology", "v5e:2x2", "--generation", "--json", str(tmp_path / "plan.json"))) == 0
    told = json.loads((tmp_path / "plan.json").read_text())
    assert told["what"] == "by formula, not compiled and not measured" and told["rows"] > 0
    assert f"at most {told['rows']:,} at once" in capsys.readouterr().out

"""Every field of every config can be set, emptied or changed in kind from the command line."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rave_jax import command_line
from rave_jax.attention import Rave, SlidingWindow
from rave_jax.checkpoint.tiny import Tiny
from rave_jax.command_line import find, override, with_kinds
from rave_jax.config import ConfigError, load_file
from rave_jax.data.config import Stage
from rave_jax.data.sources import LlavaJson
from rave_jax.evaluation.config import Eval, Examination
from rave_jax.models.config import ModelOptions
from rave_jax.training.config import TrainConfig
from rave_jax.training.init import FromHF

REPO = Path(__file__).resolve().parents[1]
FILES = sorted(p for p in (REPO / "configs").glob("*.py") if "def get_config(" in p.read_text())
VARIED = ("synthetic_all", "quickstart_gaze", "qwen2_5_vl_7b_rave_sft")
"""Configs that have between them every kind of field; the others are variations of the quickstart."""
RAVE = TrainConfig(model=ModelOptions(mechanisms=(Rave(rank=8),)))


def words_for(value: Any, path: tuple[str, ...] = ()) -> list[str]:
    """A command line that makes this tree of any other: the kinds of its parts, and every leaf."""
    name = f"--{'.'.join(path)}"
    if dataclasses.is_dataclass(value):
        kind = [name, type(value).__name__] if path else []
        fields = ((f.name, getattr(value, f.name)) for f in dataclasses.fields(value))
        return kind + [word for key, child in fields for word in words_for(child, (*path, key))]
    if isinstance(value, tuple) and any(dataclasses.is_dataclass(item) for item in value):
        kinds = [type(item).__name__ for item in value]
        return [name, *kinds, *(w for i, item in enumerate(value) for w in words_for(item, (*path, str(i))))]
    if isinstance(value, bool):
        return [name, str(value)]
    return [name, *map(str, value)] if isinstance(value, tuple) else [f"{name}={value}"]


@pytest.mark.parametrize("name", VARIED)
def test_a_command_line_makes_any_config_of_any_other(name: str) -> None:
    """So every field of it can be set, every tuple of it filled and emptied, and every part changed in kind."""
    wanted = load_file(REPO / "configs" / f"{name}.py")
    other = load_file(REPO / "configs" / ("quickstart.py" if name == "synthetic_all" else "synthetic_all.py"))
    words = words_for(wanted)
    assert override(other, words) == wanted
    # Parts come first whatever the order of the words; here their fields come before them.
    options: list[list[str]] = []
    for word in words:
        options += [[word]] if word.startswith("--") else []
        options[-1] += [] if word.startswith("--") else [word]
    again, _ = with_kinds(other, [word for option in reversed(options) for word in option])
    assert [find(again, place) is None for place in places_of(wanted)] == [False] * len(places_of(wanted))


def places_of(config: Any) -> list[tuple[str, ...]]:
    return [path for path, _ in command_line._places(config, ())]


def kinds_everywhere(cls: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[tuple[str, type], ...], Any]]:
    """Every (path of named kinds, kind) that the type tree of a config allows."""
    for name, hint in typing.get_type_hints(cls).items():
        for kind in command_line._dataclasses(hint):
            many = any(typing.get_origin(option) is tuple for option in command_line._options(hint))
            yield (*path, name) + (("0",) if many else ()), kind
            yield from kinds_everywhere(kind, (*path, name) + (("0",) if many else ()))


def test_every_kind_can_be_put_wherever_the_types_allow_it() -> None:
    """Over the whole tree of types: a part of this kind is made, with the defaults of its fields."""
    count = 0
    for cls in (TrainConfig, Examination):
        stack: dict[tuple[str, ...], Any] = {(): cls()}
        for path, kind in kinds_everywhere(cls):
            above = stack[next(path[:n] for n in range(len(path) - 1, -1, -1) if path[:n] in stack)]
            word = "".join(f"-{c.lower()}" if c.isupper() else c for c in kind.__name__).removeprefix("-")
            made, rest = with_kinds(above, [f"--{'.'.join(path).replace('_', '-')}", word])
            place = find(made, path)
            assert rest == [] and place is not None and type(place.value) is kind, (path, kind)
            stack[path] = made
            count += 1
    assert count > 60


def test_parts_that_may_be_absent_can_be_removed() -> None:
    assert override(RAVE, ["--model.mechanisms"]).model.mechanisms == ()
    assert override(RAVE, ["--model.mechanisms", "None"]).model.mechanisms == ()
    lora = override(RAVE, ["--model.lora", "Lora", "--model.lora.rank", "3"])
    assert lora.model.lora is not None and lora.model.lora.rank == 3
    for word in ("none", "None", "null", "NULL"):
        assert override(lora, ["--model.lora", word]).model.lora is None
        assert override(RAVE, ["--model.mechanisms", word]).model.mechanisms == ()
        assert override(Examination(), ["--evals.0.floor", word, f"--step={word}"]) == replace(
            Examination(), evals=(Eval(floor=None),)
        )


@pytest.mark.parametrize("word", ["[]", "{}", "()"])
def test_a_tuple_is_emptied_by_its_brackets(word: str) -> None:
    config = load_file(REPO / "configs" / "quickstart.py")
    found = override(config, ["--model.mechanisms", word, f"--final={word}", "--data.stages.1.weights", word])
    assert found.model.mechanisms == found.final == found.data.stages[1].weights == ()
    assert found.data.stages[2] == config.data.stages[2]


def test_none_is_a_word_like_others_where_a_field_takes_it() -> None:
    assert override(RAVE, ["--optimizer.decay", "none", "--output-dir", "null"]).optimizer.decay == "none"
    assert override(RAVE, ["--output-dir", "null"]).output_dir == "null"
    for words in (["--steps", "null"], ["--data.stages.0.step=None"], ["--tensorboard", "none"], ["--mesh", "null"]):
        name, _, _ = words[0].partition("=")
        with pytest.raises(ConfigError, match=f"^{name} is .*(null|None|none)'?, expected (an integer|a bool|one of)"):
            override(RAVE, words)


def test_a_part_that_has_its_kind_already_keeps_its_fields() -> None:
    both = override(RAVE, ["--model.mechanisms", "rave", "sliding-window", "--model.mechanisms.1.window", "7"])
    assert both.model.mechanisms == (Rave(rank=8), SlidingWindow(window=7))
    assert override(RAVE, ["--model.mechanisms.1", "SlidingWindow"]).model.mechanisms[0] == Rave(rank=8)
    assert override(RAVE, ["--model.mechanisms.0", "SlidingWindow"]).model.mechanisms == (SlidingWindow(),)
    assert override(RAVE, ["--init", "Tiny", "--init.seed", "3"]).init == Tiny(seed=3)


def test_fields_are_checked_when_all_are_there() -> None:
    """Neither a path that is still empty nor four weights for one source stand in the way of the words behind them."""
    config = load_file(REPO / "configs" / "quickstart.py")
    words = "--init from-hf --init.path x --data.sources LlavaJson --data.sources.0.path my.json"
    for stages in ("--data.stages Stage --data.stages.0.weights", "--data.stages []"):
        found = override(config, [*words.split(), *stages.split()])
        assert found.init == FromHF("x") and found.data.stages == (Stage(),)
        assert found.data.sources == (LlavaJson(path="my.json"),)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--model.mechanisms Raev", "--model.mechanisms.0 is 'Raev', expected one of Arrow, .*; did you mean Rave?"),
        ("--init", "--init has 0 values, expected one: FromHF or Tiny"),
        ("--init FromHF Tiny", "--init has 2 values, expected one"),
        ("--init None", "--init is 'None', expected one of FromHF, Tiny"),
        ("--init.path x", "--init.path: init is Tiny, which has no path; FromHF has it: add --init FromHF"),
        ("--model.lora.rank 3", "--model.lora.rank: model.lora is None, which has no rank; .* --model.lora Lora"),
        (
            "--model.mechanisms.1.rank 3",
            "model.mechanisms has 1 item; to add one, name .*: --model.mechanisms.1 Arrow",
        ),
        ("--model.mechanisms.7 Rave", "model.mechanisms has 1 item; to add one, name .*: --model.mechanisms.1 Arrow"),
        ("--data.sources LlavaJson --data.sources.0.split train", "data.sources.0 is LlavaJson, which has no split"),
        ("--init FromHF", "^--init: init.path is '', expected a directory in HuggingFace format$"),
        ("--data.sources", "^--data: sources is .*, expected at least one source, as --data.sources LlavaJson$"),
        ("--steps 0", "^steps is 0, expected a number from 1 to 2147483647$"),
        ("--data.stages.0.weights 1 2", "^--data: stages.0.weights is .* 1 source; --data.stages .. makes one stage"),
    ],
)
def test_a_kind_that_does_not_fit_is_refused_by_its_field(words: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said.replace("?", r"\?").replace("|", r"\|")):
        override(RAVE, words.split())


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--model.mechanisms.0.rnak", "3"], "--model.mechanisms.0.rank"),
        ([f"--data.sources.{'9' * 5000}.path", "x"], "Unrecognized options"),
    ],
)
def test_what_is_left_unset_or_misspelt_exits_2(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        override(RAVE, words, "train.py")
    assert stop.value.code == 2 and said in capsys.readouterr().err


def test_help_lists_the_kinds(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        override(RAVE, ["--help"], "train.py")
    out = capsys.readouterr().out
    assert "--init FromHF|Tiny" in out and "--model.lora Lora|None" in out and "--model.mechanisms [Arrow|" in out


def test_configs_are_found_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In a clone and, where the folder lies inside the package, after an installation."""
    monkeypatch.chdir(tmp_path)
    assert {path.stem for path in FILES} <= set(command_line.config_names())
    for given in ("quickstart", "configs/quickstart.py"):
        assert command_line.load_command_line(TrainConfig, [given], "train").output_dir == "runs/quickstart"
    (tmp_path / "configs").mkdir()
    own = tmp_path / "configs" / "quickstart.py"
    own.write_text(FILES[0].read_text())
    assert command_line.config_file("configs/quickstart.py").resolve() == own, "a file that is there comes first"
    for given in ("quikstart", "x" * 5000):
        with pytest.raises(SystemExit):
            command_line.load_command_line(TrainConfig, [given], "train")
        said = capsys.readouterr().err
        assert "no such config file" in said and said.count("\n") == 1
        assert given != "quikstart" or "did you mean quickstart?" in said

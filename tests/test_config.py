"""The configuration machinery: round trips, strictness, messages, help texts and the command line."""

from __future__ import annotations

import dataclasses
import importlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rave_jax import command_line, config
from rave_jax.config import ConfigError


@dataclass(frozen=True)
class Gate:
    """One kind of part."""

    rank: int = 4
    """Rank of the gate."""
    form: Literal["log", "linear"] = "log"
    """Formula of the gate."""

    def __post_init__(self) -> None:
        config.require(self.rank >= 1, "rank", self.rank, "at least 1")


@dataclass(frozen=True)
class Window:
    """Another kind of part."""

    size: int = 128
    """Tokens in the window."""


@dataclass(frozen=True)
class Experiment:
    """A config of all the types that a field may have."""

    parts: tuple[Gate | Window, ...] = ()
    """Parts, in order."""
    best: Gate | Window | None = None
    """A chosen part."""
    name: str | None = None
    """Name of the run."""
    rate: float = 1e-3
    """Learning rate."""
    span: tuple[int, float] = (1, 0.5)
    """A pair."""
    quiet: bool = False
    """Whether to print less."""
    level: Literal[1, 2] = 1
    """A level."""


gates = st.builds(Gate, rank=st.integers(1, 64), form=st.sampled_from(["log", "linear"]))
windows = st.builds(Window, size=st.integers())
experiments = st.builds(
    Experiment,
    parts=st.lists(gates | windows, max_size=3).map(tuple),
    best=st.none() | gates | windows,
    name=st.none() | st.text(),
    rate=st.floats(allow_nan=False),
    span=st.tuples(st.integers(), st.floats(allow_nan=False)),
    quiet=st.booleans(),
    level=st.sampled_from([1, 2]),
)


@given(experiments)
def test_what_is_written_reads_back_equal(experiment: Experiment) -> None:
    again = config.loads(Experiment, config.dumps(experiment))
    assert again == experiment
    assert config.dumps(again) == config.dumps(experiment)


def changed(**fields: Any) -> str:
    return json.dumps({**config.to_json(Experiment()), **fields})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (changed(nmae="x"), "config.nmae: Experiment has no such field; did you mean 'name'?"),
        (changed(zzz=1), "config.zzz: Experiment has no such field"),
        (changed(rate="fast"), "config.rate is 'fast', expected a number"),
        (changed(rate=True), "config.rate is True, expected a number"),
        (changed(rate=10**400), "config.rate is too large an integer"),
        (changed(quiet=1), "config.quiet is 1, expected a value of type bool"),
        (changed(level=True), "config.level is True, expected one of 1, 2"),
        (changed(level=3), "config.level is 3, expected one of 1, 2"),
        (changed(name=3), "config.name is 3, expected one of"),
        (changed(parts={}), "config.parts is {}, expected a list"),
        (changed(span=[1]), "config.span is [1], expected 2 items"),
        (changed(span=[1, "a"]), "config.span.1 is 'a', expected a number"),
        (
            changed(parts=[{"type": "Gate", "rnak": 2}]),
            "config.parts.0.rnak: Gate has no such field; did you mean 'rank'?",
        ),
        (changed(parts=[{"rank": 2}]), "config.parts.0.type is None, expected one of 'Gate', 'Window'"),
        (changed(best={"type": "Gaet"}), "config.best.type is 'Gaet', expected one of 'Gate', 'Window'"),
        (changed(best=[]), "config.best is [], expected one of"),
        (changed(parts=[{"type": "Gate", "rank": 0}]), "rank is 0, expected at least 1"),
        (changed(type="Gate"), "config.type is 'Gate', expected 'Experiment'"),
        ("[]", "config is [], expected an object with the fields of Experiment"),
        ("{", "config is not JSON"),
    ],
)
def test_a_wrong_text_is_refused_by_the_name_of_its_field(text: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        config.loads(Experiment, text)
    assert message in str(error.value)


@dataclass(frozen=True)
class Needy:
    """A config with a field that has no default."""

    path: str
    """Where it is."""


def test_a_missing_field_is_refused_where_it_has_no_default() -> None:
    assert config.loads(Experiment, "{}") == Experiment()
    with pytest.raises(ConfigError, match=r"config\.path: Needy needs this field"):
        config.loads(Needy, "{}")


@pytest.mark.parametrize(
    ("field", "given", "expected"),
    [
        ("parts", [], "a tuple, each item a Gate or a Window"),
        ("parts", (Gate(), 3), "a tuple, each item a Gate or a Window"),
        ("best", {}, "a Gate or a Window or None"),
        ("name", 3, "a str or None"),
        ("rate", float("nan"), "a finite number"),
        ("rate", 10**400, "a finite number"),
        ("rate", True, "a finite number"),
        ("span", (1,), "a tuple of an integer, a finite number"),
        ("span", (0.5, 1), "a tuple of an integer, a finite number"),
        ("quiet", 1, "a bool"),
        ("level", True, "one of 1, 2"),
    ],
)
def test_fields_of_another_type_are_refused_by_name(field: str, given: object, expected: str) -> None:
    config.check_fields(Experiment(parts=(Gate(), Window()), best=Gate(), name="x", rate=1, level=2))
    with pytest.raises(ConfigError) as error:
        config.check_fields(dataclasses.replace(Experiment(), **{field: given}))
    assert str(error.value) == f"{field} is {given!r}, expected {expected}"


def test_help_is_the_literal_under_a_field() -> None:
    @dataclass(frozen=True)
    class Local:
        """Not the help of `a`."""

        a: int = 1
        """Help of a,
        on two lines."""
        b: int = 2

    assert config.field_docs(Local) == {"a": "Help of a,\non two lines."}
    assert set(config.field_docs(Experiment)) == {f.name for f in dataclasses.fields(Experiment)}


def write(folder: Path, body: str, name: str = "experiment.py") -> str:
    path = folder / name
    path.write_text(body)
    return str(path)


@pytest.fixture
def config_file(tmp_path: Path) -> str:
    """A config file that returns an Experiment of this module."""
    return write(
        tmp_path,
        f"import sys\nhere = sys.modules[{__name__!r}]\n"
        "def get_config():\n    return here.Experiment(parts=(here.Gate(rank=2), here.Window()), best=here.Gate())\n",
    )


def test_overrides_reach_into_tuples_and_unions(config_file: str) -> None:
    words = ["--parts.0.rank", "9", "--parts.1.size", "7", "--name", "trial", "--rate", "1", "--best.form", "linear"]
    found = command_line.load_command_line(Experiment, [config_file, *words], prog="train.py")
    wanted = Experiment(parts=(Gate(rank=9), Window(size=7)), best=Gate(form="linear"), name="trial", rate=1.0)
    assert found == wanted


def test_a_resolved_config_repeats_the_run(config_file: str, tmp_path: Path) -> None:
    first = command_line.load_command_line(Experiment, [config_file, "--rate", "0.25"], prog="train.py")
    resolved = write(tmp_path, config.dumps(first), "config.json")
    assert command_line.load_command_line(Experiment, [resolved], prog="train.py") == first
    again = command_line.load_command_line(Experiment, [resolved, "--name", "again"], prog="train.py")
    assert again == dataclasses.replace(first, name="again")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--parts.0.rnak", "9"], "--parts.0.rank"),
        (["--naem", "x"], "--name"),
        (["--parts.0.rank", "0"], "rank is 0, expected at least 1"),
        (["--rate", "fast"], "--rate"),
        (["--level", "3"], "--level"),
        (["stray"], "stray"),
    ],
)
def test_a_wrong_override_exits_2_and_says_why(
    config_file: str, words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        command_line.load_command_line(Experiment, [config_file, *words], prog="train.py")
    assert stop.value.code == 2
    assert said in capsys.readouterr().err


def test_help_lists_every_field_with_its_text(config_file: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        command_line.load_command_line(Experiment, [config_file, "--help"], prog="train.py")
    assert stop.value.code == 0
    out = capsys.readouterr().out
    assert all(text in out for text in ("--parts.0.rank", "Rank of the gate.", "--rate", "Learning rate."))


def test_a_config_file_that_cannot_serve_exits_2_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cases = {
        str(tmp_path / "gone.py"): "no such config file",
        write(tmp_path, "x = 1\n", "empty.py"): "has no function get_config()",
        write(tmp_path, "def get_config():\n    return 3\n", "three.py"): "expected one of class Experiment",
        write(
            tmp_path, '{"type": "Experiment", "rtae": 1}', "typo.json"
        ): "rtae: Experiment has no such field; did you",
        write(tmp_path, "{", "broken.json"): "broken.json is not JSON",
        str(tmp_path / "gone.json"): "gone.json: no such config file",
    }
    for path, message in cases.items():
        with pytest.raises(SystemExit) as stop:
            command_line.load_command_line(Experiment, [path], prog="train.py")
        said = capsys.readouterr().err
        assert stop.value.code == 2
        assert message in said and path in said and said.count("\n") == 1, said


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("from rave_jax.evaluation.config import Eval, Gate\n", "Gate is called Grounding: from rave_jax.evaluation"),
        ("from rave_jax.evaluation import Gate\n", "from rave_jax.evaluation.config import Grounding"),
        ("import rave_jax.evaluation.config as c\nc.Gate()\n", "Gate is called Grounding"),
        ("from rave_jax.evaluation import Eval\n", "did you mean: from rave_jax.evaluation.config import Eval"),
        ("from rave_jax.attention import SlidingWindw\n", "Did you mean: 'SlidingWindow'?"),
        ("from rave_jax.atention import Rave\n", "Did you mean: 'rave_jax.attention'?"),
        ("from rave_jax.attention import Rave\nRvae()\n", "name 'Rvae' is not defined"),
        ("import no_such_package\n", "No module named 'no_such_package'"),
    ],
)
def test_a_name_that_is_not_there_is_said_with_its_line(text: str, says: str, tmp_path: Path) -> None:
    importlib.import_module("rave_jax.evaluation.config")  # as every command that reads configs has done
    path = write(tmp_path, text)
    with pytest.raises(ConfigError) as refused:
        config.load_file(path)
    said = str(refused.value)
    line = text.count("\n")
    assert said.startswith(f"{path}:{line}: ") and says in said and "\n" not in said


def test_without_a_config_file_the_usage_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    for words, code in ([], 2), (["--rate", "1"], 2), (["--help"], 0):
        with pytest.raises(SystemExit) as stop:
            command_line.load_command_line(Experiment, words, prog="train.py")
        shown = capsys.readouterr()
        assert stop.value.code == code
        assert "usage: train.py CONFIG " in (shown.err if code else shown.out)


def test_config_files_share_helpers_of_their_folder(tmp_path: Path) -> None:
    write(tmp_path, "VALUE = 5\n", "neighbour_of_experiments.py")
    path = write(tmp_path, "from neighbour_of_experiments import VALUE\ndef get_config():\n    return VALUE\n")
    assert config.load_file(path) == 5


@pytest.mark.parametrize(
    ("path", "hint"),
    [
        ("gs://bucket/runs", "copy it, or mount the gs:// bucket"),
        ("s3://bucket/x.json", "copy it, or mount the s3:// bucket"),
        (Path("gs://bucket/runs"), "copy it, or mount the gs:// bucket"),
        ("file:///data/x", "leave file:// away"),
        ("abfs+ssl://x/y", "copy it, or mount the abfs+ssl:// bucket"),
    ],
)
def test_a_path_of_another_place_is_refused(path, hint):
    with pytest.raises(ConfigError) as refused:
        config.local_path(path, "output_dir")
    assert str(refused.value) == f"output_dir is {str(path)!r}, expected a path of a file system; {hint}"


def test_a_local_path_is_itself(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "odd:").mkdir()
    for path in ("runs/a", "/data/x", "~/x", "a:b", "C:/x" if Path("C:").is_dir() else "x", "odd:/file", "*.parquet"):
        assert config.local_path(path, "path") == Path(path)


def test_paths_inside_a_config_are_found_by_the_names_of_their_fields():
    @dataclass(frozen=True)
    class Source:
        path: str = "x"
        name: str = "gs://is a name"

    @dataclass(frozen=True)
    class Run:
        sources: tuple[Source, ...] = ()
        image_dir: str = ""

    config.check_paths(Run((Source(),)))
    with pytest.raises(ConfigError, match=r"sources\.1\.path is 's3://b/c'"):
        config.check_paths(Run((Source(), Source("s3://b/c"))))
    with pytest.raises(ConfigError, match="image_dir is 'http://b/c'"):
        config.check_paths(Run(image_dir="http://b/c"))

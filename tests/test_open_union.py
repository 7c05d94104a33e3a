"""Classes of a user's own in a config: what they are saved as, found by, and refused for."""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path

import pytest

from rave_jax import open_union
from rave_jax.attention import MechanismConfig, Rave
from rave_jax.command_line import override
from rave_jax.config import ConfigError, dumps, load_file, loads
from rave_jax.models.config import ModelOptions
from rave_jax.open_union import NotFound, OpenUnion

MINE = """
from __future__ import annotations
from dataclasses import dataclass
from rave_jax.attention import Layers, Mechanism, MechanismConfig
from rave_jax.models.config import ModelOptions

@dataclass(frozen=True)
class Mine(MechanismConfig):
    degree: int = 2
    layers: Layers = "all"
    def build(self, dims, key):
        return Mechanism()

@dataclass(frozen=True)
class Abstract(MechanismConfig):
    degree: int = 2

@dataclass
class Loose(MechanismConfig):
    degree: int = 2
    def build(self, dims, key):
        return Mechanism()

def get_config():
    return ModelOptions(mechanisms=(Mine(3),))
"""


@pytest.fixture(autouse=True)
def forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test makes known is known to it alone."""
    monkeypatch.setattr(OpenUnion, "known", dict(OpenUnion.known))


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "mine.py").write_text(MINE)
    return tmp_path / "mine.py"


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "own_lab").mkdir()
    (tmp_path / "own_lab" / "__init__.py").write_text("")
    (tmp_path / "own_lab" / "parts.py").write_text(MINE)
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in ("own_lab", "own_lab.parts"):
        monkeypatch.setitem(sys.modules, name, None)
        del sys.modules[name]
    return "own_lab.parts:Mine"


def forget(name: str) -> None:
    del OpenUnion.known[name]


def test_classes_of_the_package_keep_their_names() -> None:
    assert open_union.saved_name(Rave) == "Rave" and open_union.find(MechanismConfig, "Rave") is Rave
    assert '"type": "Rave"' in dumps(ModelOptions((Rave(),)))


def test_a_class_of_a_config_file_is_saved_and_found_by_the_file(file: Path) -> None:
    text = dumps(load_file(file))
    assert f'"type": "{file}:Mine"' in text
    known = loads(ModelOptions, text)
    forget(f"{file}:Mine")
    found = loads(ModelOptions, text)
    assert type(found.mechanisms[0]) is not type(known.mechanisms[0]), "the file was run again"
    assert dumps(found) == dumps(known) == text


def test_a_class_of_a_package_is_saved_and_found_by_import(package: str) -> None:
    found = loads(ModelOptions, dumps(ModelOptions()).replace("[]", f'[{{"type": "{package}", "degree": 5}}]'))
    kind = importlib.import_module("own_lab.parts").Mine
    assert found == ModelOptions((kind(5),)) and f'"type": "{package}"' in dumps(found)


def test_a_moved_file_is_found_by_what_was_read_or_on_the_path(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone = str(tmp_path / "elsewhere" / "mine.py")
    config = load_file(file)
    assert open_union.find(MechanismConfig, f"{gone}:Mine") is type(config.mechanisms[0])
    forget(f"{file}:Mine")
    with pytest.raises(NotFound, match=r"there is no file .*mine.py, which defined the class Mine: put it back, put a"):
        open_union.find(MechanismConfig, f"{gone}:Mine")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setitem(sys.modules, "mine", None)
    del sys.modules["mine"]
    assert open_union.find(MechanismConfig, f"{gone}:Mine").__name__ == "Mine"


def test_two_files_of_one_name_are_two(file: Path, tmp_path: Path) -> None:
    other = tmp_path / "other" / "mine.py"
    other.parent.mkdir()
    other.write_text(MINE)
    first, second = load_file(file), load_file(other)
    for config in (first, second):
        assert loads(ModelOptions, dumps(config)) == config
    assert first != second


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("FILE.py:Theirs", "FILE.py defines no class Theirs: was it renamed"),
        ("FILE.py:get_config", "it is no MechanismConfig: write `class get_config\\(MechanismConfig\\)`"),
        ("FILE.py:Abstract", "the class Abstract does not define build"),
        ("no_such_lab.parts:Mine", "there is no module no_such_lab.parts, .* put the folder that holds no_such_lab on"),
        ("own_lab.no:Mine", "there is no module own_lab.no, which defined the class Mine"),
        ("json:Mine", "json defines no class Mine"),
        ("json:JSONDecoder", "it is no MechanismConfig"),
        ("./FILE.txt.py:Mine", r"FILE.txt.py is not an absolute path: write /FOLDER/\S+.py:Mine, with the whole path"),
        ("BROKEN.py:Mine", r"BROKEN.py:2: ZeroDivisionError: division by zero"),
        (":", "expected the name of a known class, or MODULE:CLASS or FILE.py:CLASS"),
    ],
)
def test_what_is_no_class_is_refused_by_its_field(
    name: str, said: str, file: Path, package: str, tmp_path: Path
) -> None:
    (tmp_path / "FILE.py").write_text(MINE)
    (tmp_path / "BROKEN.py").write_text("\n1 / 0\n")
    name = f"{tmp_path}/{name}" if ".py:" in name and name[0] != "." else name
    text = dumps(ModelOptions()).replace("[]", f'[{{"type": "{name}"}}]')
    with pytest.raises(ConfigError, match=r"^config\.mechanisms\.0\.type is ") as error:
        loads(ModelOptions, text)
    with pytest.raises(ConfigError, match=said):
        loads(ModelOptions, text)
    assert "\n" not in str(error.value)


def test_a_class_that_no_config_leads_back_to_is_refused_when_it_is_saved(file: Path) -> None:
    class Inner(Rave):
        pass

    with pytest.raises(ConfigError, match=r"the class Inner could not be found again .*: it is defined inside a func"):
        dumps(ModelOptions((Inner(),)))


def test_a_class_that_is_not_frozen_is_refused(file: Path) -> None:
    file.write_text(MINE.replace("Mine(3)", "Loose(3)"))
    with pytest.raises(
        ConfigError, match=r"mechanisms.0: the class Loose is not a frozen dataclass: write @dataclass\("
    ):
        load_file(file)


def test_the_command_line_knows_it_by_name_and_by_where_it_is(file: Path, package: str) -> None:
    config = load_file(file)
    changed = override(config, ["--mechanisms", "Rave", "Mine", "--mechanisms.1.degree", "7"])
    assert changed == ModelOptions((Rave(), type(config.mechanisms[0])(7)))
    named = override(config, ["--mechanisms", package, "--mechanisms.0.degree", "4"])
    assert open_union.saved_name(type(named.mechanisms[0])) == package and named.mechanisms[0].degree == 4
    named = override(config, ["--mechanisms", os.path.relpath(file) + ":Mine", "--mechanisms.0.degree", "4"])
    assert type(named.mechanisms[0]) is type(config.mechanisms[0]), "that file was read"
    with pytest.raises(ConfigError, match=r"--mechanisms.0 is 'no_lab:Mine': there is no module no_lab"):
        override(config, ["--mechanisms", "no_lab:Mine"])

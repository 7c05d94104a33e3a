"""Unions that a user's own file adds to: a config field takes every subclass of an `OpenUnion`.

A subclass is known as soon as its module is imported. Configs save it by name: one of the package as "Rave"; one of a
user's package by its import path, "my_lab.mechanisms:Tilt"; and one of a file outside of packages, such as a config
file, by that file's absolute path and the class, joined by a colon. To read such a config is to import the module, or
to run the file.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import importlib.util
import inspect
import os
import pkgutil
import sys
import traceback
import typing
import zlib
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

PACKAGE = __name__.partition(".")[0]


class NotFound(ValueError):
    """A name that leads to no class of the union; the message says why, and what to do."""


class OpenUnion:
    """Base of a union. The union is a class that is no dataclass; its members are the dataclasses that derive from it.

    Attributes:
        known: every class that derives from any union, by its saved name; the newest of a name.
    """

    known: ClassVar[dict[str, type[OpenUnion]]] = {}

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        OpenUnion.known[saved_name(cls)] = cls


def is_union(kind: Any) -> bool:
    """Is this a union, rather than a member of one or another type?"""
    return isinstance(kind, type) and issubclass(kind, OpenUnion) and not dataclasses.is_dataclass(kind)


def members(union: type) -> tuple[type, ...]:
    """The classes of a union that are known so far: those of the package first, by name."""
    known = [cls for cls in OpenUnion.known.values() if issubclass(cls, union)]
    found = [cls for cls in known if against_member(cls, union) is None and against_saving(cls) is None]
    return tuple(sorted(found, key=lambda cls: (not _of_package(cls), cls.__name__)))


def saved_name(cls: type) -> str:
    """The name that configs save a class by."""
    if _of_package(cls):
        return cls.__name__
    module = sys.modules.get(cls.__module__)
    file = getattr(module, "__file__", None)
    in_package = "." in cls.__module__ or hasattr(module, "__path__")
    alone = file is not None and not in_package and cls.__module__ != "__main__"
    return f"{Path(file).resolve() if alone else cls.__module__}:{cls.__qualname__}"


def against_saving(cls: type) -> str | None:
    """Why a saved config could not lead back to a class, and what to do; None where it can."""
    if cls.__module__ == "__main__":
        return "it is defined in the program that runs: put it into a file of its own and import it from there"
    if "<locals>" in cls.__qualname__:
        return "it is defined inside a function: define it at the top of its file"
    return None


def without_folder(name: str) -> str:
    """A saved name without the folder of its file: equal for copies of one file."""
    return name.rpartition("/")[2] if ".py:" in name else name


def find(union: type, name: str) -> type:
    """The member with this saved name. Its module is imported, or its file run, unless that was done before.

    Raises:
        NotFound: says why there is none, and what to do.
    """
    if name in OpenUnion.known:
        found: Any = OpenUnion.known[name]
    else:
        where, _, inner = name.rpartition(":")
        if not where or not inner:
            raise NotFound("expected the name of a known class, or MODULE:CLASS or FILE.py:CLASS of your own")
        found = _of_file(Path(where), inner, name) if where.endswith(".py") else _of_module(where, inner, where)
    against = against_member(found, union)
    if against is not None:
        raise NotFound(against)
    return found


def run_file(path: Path) -> ModuleType:
    """Run a Python file as a module, with its folder first among the places that it imports from."""
    path = path.resolve()
    # Annotations of its classes are looked up in `sys.modules`. Files of one name in two folders are two modules.
    name = f"{PACKAGE}_file_{path.stem.replace('.', '_')}_{zlib.crc32(str(path).encode()):08x}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec and spec.loader
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(path.parent))
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    finally:
        sys.path.remove(str(path.parent))
    return module


def said(error: BaseException, path: Path) -> str:
    """An error that a file raised, with the file's own line: that is what its author needs."""
    files = (str(path), str(path.resolve()))
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename in files]
    line = lines[-1] if lines else getattr(error, "lineno", None)
    return f"{path}{f':{line}' if line else ''}: {in_one_line(error)}"


def in_one_line(error: BaseException) -> str:
    """An error in one line, with what was meant where it is a name that is not there."""
    if not isinstance(error, (ImportError, AttributeError, NameError)):
        return f"{type(error).__name__}: {error}"
    said = list(traceback.TracebackException.from_exception(error).format_exception_only())[-1].strip()
    module = error.name if isinstance(error, ImportError) else getattr(getattr(error, "obj", None), "__name__", "")
    name = error.name_from if isinstance(error, ImportError) else error.name
    if module and name:
        for other in [each for key, each in list(sys.modules.items()) if f"{key}.".startswith(f"{module}.")]:
            # A module keeps the names that its classes have had, each with the one of today.
            if found := vars(other).get("RENAMED", {}).get(name):
                return f"{said}; {name} is called {found}: from {other.__name__} import {found}"
            if other.__name__ != module and name in vars(other):
                return f"{said}; did you mean: from {other.__name__} import {name}"
        close = difflib.get_close_matches(name, vars(sys.modules.get(module, typing)), 1)
        if close and "did you mean" not in said.lower():
            return f"{said}. Did you mean: {close[0]!r}?"
    if isinstance(error, ModuleNotFoundError) and (close := _close_module(error.name or "")):
        return f"{said}. Did you mean: {close!r}?"
    return said


def _close_module(name: str) -> str:
    """The module beside one that is not there whose name is like it."""
    package, _, last = name.rpartition(".")
    beside = getattr(sys.modules.get(package), "__path__", None) if package else None
    names = [each.name for each in pkgutil.iter_modules(beside)] if beside else []
    close = difflib.get_close_matches(last, names, 1)
    return f"{package}.{close[0]}" if close else ""


def _of_package(cls: type) -> bool:
    return cls.__module__.partition(".")[0] == PACKAGE


def _of_file(file: Path, inner: str, name: str) -> Any:
    if not file.is_absolute():
        # Else a config from somebody else could name a file that came with it.
        raise NotFound(f"{file} is not an absolute path")
    if os.path.isfile(file):
        try:
            module = run_file(file)
        except (Exception, SystemExit) as error:
            raise NotFound(f"the file that defines it cannot be run: {said(error, file)}") from error
        return _inside(module, inner, str(file))
    # The file was moved: a config file that was read, or a place that Python imports from, may have it.
    moved = [cls for known, cls in OpenUnion.known.items() if without_folder(known) == without_folder(name)]
    if moved:
        return moved[-1]
    try:
        return _of_module(file.stem, inner, str(file))
    except _NoModule:
        raise NotFound(
            f"there is no file {file}, which defined the class {inner}: put it back, put a folder with {file.name} on "
            "PYTHONPATH, or give the config file that defines the class"
        ) from None


class _NoModule(NotFound):
    pass


def _of_module(name: str, inner: str, where: str) -> Any:
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise NotFound(f"importing {name} failed: {error}") from error
        top = name.partition(".")[0]
        raise _NoModule(
            f"there is no module {name}, which defined the class {inner}: put the folder that holds {top} on "
            "PYTHONPATH, or give the config file that imports the class"
        ) from None
    except (Exception, SystemExit) as error:
        raise NotFound(f"importing {name} failed: {in_one_line(error)}") from error
    return _inside(module, inner, where)


def _inside(module: ModuleType, inner: str, where: str) -> Any:
    found: Any = module
    for part in inner.split("."):
        found = getattr(found, part, None)
    if found is None:
        raise NotFound(f"{where} defines no class {inner}: was it renamed, or is this another version of the file?")
    return found


def against_member(cls: Any, union: type) -> str | None:
    """Why this is no member of the union; None where it is one."""
    if not (isinstance(cls, type) and issubclass(cls, union)):
        return f"it is no {union.__name__}: write `class {getattr(cls, '__name__', cls)}({union.__name__})`"
    params = getattr(cls, "__dataclass_params__", None)
    if params is None or not params.frozen:
        return f"the class {cls.__name__} is not a frozen dataclass: write @dataclass(frozen=True) above it"
    if inspect.isabstract(cls):
        missing = ", ".join(sorted(cls.__abstractmethods__))
        return f"the class {cls.__name__} does not define {missing}"
    return None

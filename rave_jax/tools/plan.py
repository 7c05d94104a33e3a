"""`rave-jax plan`: what a config needs and moves on TPUs, before they are paid for."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import jax

from rave_jax.command_line import load_command_line
from rave_jax.config import ConfigError
from rave_jax.plan.changes import changes_that_fit
from rave_jax.plan.chips import parse_topology
from rave_jax.plan.compile import Wanted, compile_all
from rave_jax.plan.generation import answering
from rave_jax.plan.libtpu import CompilerUnavailable
from rave_jax.plan.models import model_of
from rave_jax.plan.report import Plan, as_json, as_text
from rave_jax.training.config import TrainConfig

EXIT_DOES_NOT_FIT = 1
EXIT_FITS = 0
_COMPILES = ("hlo", "full", "compare_plain", "no_changes")
_FLAGS = ("topology", "slices", "json", "hlo", "no_changes", "generation", "full", "compare_plain")


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags that are not fields of the config."""
    parser.add_argument("--topology", metavar="CHIP:SHAPE", help="of one slice, as v5e:16x16 or v5p:4x4x4")
    parser.add_argument("--slices", type=int, metavar="N", help="slices of this shape (default: 1)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the plan there as JSON too")
    parser.add_argument(
        "--generation", action="store_true", default=None, help="plan answers in place of training, by formula alone"
    )
    parser.add_argument("--hlo", type=Path, metavar="FILE", help="write the compiled module there as text")
    parser.add_argument("--full", action="store_true", default=None, help="compile all layers, to the end: slow")
    parser.add_argument(
        "--compare-plain", action="store_true", default=None, help="compile the step without its mechanisms too"
    )
    parser.add_argument(
        "--no-changes", action="store_true", default=None, help="look for no changes of a config that does not fit"
    )


def plan(arguments: argparse.Namespace) -> int:
    """Plan a config; returns the exit code: 1 where it does not fit.

    Args:
        arguments: `words`, a config and overrides as train.py takes them, and the flags of `add_flags`, which may stand
            among the overrides too.

    Raises:
        ConfigError: the config, its model, the mesh or the topology cannot be used, or libtpu is not here.
    """
    parser = argparse.ArgumentParser("rave-jax plan", add_help=False, allow_abbrev=False)
    add_flags(parser)
    parser.set_defaults(**{name: getattr(arguments, name) for name in _FLAGS})
    flags, words = parser.parse_known_args(arguments.words)
    config = load_command_line(TrainConfig, words, "rave-jax plan")
    if flags.topology is None:
        raise ConfigError("--topology is missing, expected CHIP:SHAPE, as --topology v5e:16x16")
    topology = parse_topology(flags.topology, 1 if flags.slices is None else flags.slices)
    config.mesh.sizes(topology.devices)  # refuses sizes that do not fit before anything is compiled
    vlm, source = model_of(config.init)
    for name in ("json", "hlo"):
        if getattr(flags, name) is not None:
            _check_writable(name, getattr(flags, name))
    if flags.generation:
        idle = [f"--{name.replace('_', '-')}" for name in _COMPILES if getattr(flags, name)]
        if idle:
            raise ConfigError(f"--generation compiles nothing, so that {' and '.join(idle)} cannot stand beside it")
        jax.config.update("jax_platforms", "cpu")  # shapes alone: no accelerator of this machine is taken
        found_answering = answering(config, vlm, topology)
        print(f"{words[0]} on {topology}, {topology.devices} devices\nmodel: {source}")
        print("\n".join(found_answering.lines()))
        _write(flags.json, found_answering.as_json())
        return EXIT_FITS if found_answering.rows else EXIT_DOES_NOT_FIT
    print(f"compiling the step for {topology}; this takes a minute or so", file=sys.stderr)
    wanted = Wanted(config, vlm, topology, flags.hlo, bool(flags.full))
    plain = [dataclasses.replace(wanted, hlo=None, plain=True)] if flags.compare_plain else []
    try:
        found = Plan(words[0], source, topology, *compile_all([wanted, *plain]))
        print(as_text(found))
        report = as_json(found)
        if not found.step.fits and not flags.no_changes:
            print("it does not fit; compiling changes of it, two at a time", file=sys.stderr)
            changes = changes_that_fit(wanted, found.step.hbm)
            report["changes_that_fit"] = [change.as_json() for change in changes]
            print("\nchanges that fit, each compiled:" if changes else "\nno change that was tried fits")
            for change in changes:
                print(f"  {change.line(topology)}")
    except (CompilerUnavailable, RuntimeError) as error:
        raise ConfigError(str(error)) from error
    _write(flags.json, report)
    return EXIT_FITS if found.step.fits else EXIT_DOES_NOT_FIT


def _check_writable(name: str, file: Path) -> None:
    """Known before a compile that takes minutes."""
    there = file.exists()
    try:
        file.open("a").close()
        if not there:
            file.unlink()
    except OSError as error:
        why = error.strerror or error
        raise ConfigError(f"--{name} is {str(file)!r}, a file that cannot be written: {why}") from error


def _write(file: Path | None, report: dict[str, Any]) -> None:
    if file is not None:
        file.write_text(json.dumps(report, indent=2) + "\n")

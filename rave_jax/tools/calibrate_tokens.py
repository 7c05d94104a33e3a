"""`rave-jax calibrate debias` and `dyvte`: which visual tokens a model can do without, from a calibration set."""

from __future__ import annotations

import argparse
import dataclasses
import functools
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.progress import Progress

from rave_jax.attention import Dyvte, MechanismConfig, Pruning
from rave_jax.attention.calibrate.debias import DebiasSearch, fitted
from rave_jax.attention.calibrate.dyvte import DyvteTraining, Routers
from rave_jax.checkpoint.hf_export import export_hf
from rave_jax.checkpoint.recut import recut
from rave_jax.config import ConfigError
from rave_jax.evaluation.heads import with_answer
from rave_jax.evaluation.leaving import attention_by_place
from rave_jax.models.config import ModelOptions
from rave_jax.models.vlm import Vlm
from rave_jax.tools import source as sources
from rave_jax.tools.calibrate import Subject
from rave_jax.tools.flags import add_fields, given_fields
from rave_jax.training.routers import Trained, train_routers
from rave_jax.typing import NpArray


def add_debias_flags(parser: argparse.ArgumentParser) -> None:
    """Where tokens are to leave."""
    add_fields(parser, DebiasSearch, "the search")


def add_dyvte_flags(parser: argparse.ArgumentParser) -> None:
    """How routers are trained."""
    add_fields(parser, DyvteTraining, "the training")


def calibrate_debias(arguments: argparse.Namespace) -> None:
    """Run the command: print the curve and write the mechanism as JSON.

    Raises:
        ConfigError: the flags, the model or the samples cannot be used, or the file cannot be written.
    """
    search = DebiasSearch(**given_fields(arguments, DebiasSearch))
    subject = Subject(arguments, Pruning, with_answer)
    _with(subject, search.undebiased)
    found = attention_by_place(
        subject.model, subject.processor, subject.samples, subject.mesh, arguments.rows, search.layer
    )
    curve = fitted(*found)
    print(
        f"{len(subject.samples):,} samples, {len(found[0]):,} visual tokens. Attention of layer {search.layer} at "
        f"place x of a picture: {curve.mu:.3g} exp({curve.sigma:.3f} x), which explains {curve.explained:.0%} of how "
        "it varies with the place."
    )
    subject.write((search.config_of(curve),))


def calibrate_dyvte(arguments: argparse.Namespace) -> None:
    """Run the command: train routers, and write the model with them as a HuggingFace directory.

    Raises:
        ConfigError: the flags, the model or the samples cannot be used, or the directory cannot be written.
    """
    training = DyvteTraining(**given_fields(arguments, DyvteTraining))
    if arguments.out.exists():
        raise ConfigError(f"cannot write {arguments.out}: it exists; expected a new directory for model and routers")
    subject = Subject(arguments, Dyvte, with_answer)
    options = _with(subject, Dyvte(training.width))
    console = Console(stderr=True)
    with Progress(console=console, disable=not console.is_terminal, transient=True) as progress:
        task = progress.add_task("steps", total=training.steps)
        found = train_routers(
            subject.model,
            subject.processor,
            subject.samples,
            subject.mesh,
            arguments.rows,
            training,
            lambda: progress.advance(task),
        )
    show(found, len(subject.samples))
    model = recut(subject.model, options, functools.partial(value_of, found.routers))
    export_hf(model, arguments.out, sources.model_directory(arguments.model))
    print(f"{arguments.out}: the model with its routers, in HuggingFace format")


def _with(subject: Subject[Any], mechanism: MechanismConfig) -> ModelOptions:
    """The options of the model with one more mechanism; a model that it cannot stand in is refused before the work."""
    options = dataclasses.replace(subject.model.options, mechanisms=(*subject.model.options.mechanisms, mechanism))
    jax.eval_shape(lambda: Vlm(subject.model.config, options, key=jax.random.key(0)))
    return options


def value_of(routers: Routers, name: str) -> NpArray:
    """A router's parameter by its global name, decoder.layers.7.mechanisms.0.first."""
    _, _, layer, *_, field = name.split(".")
    return np.asarray(getattr(routers, field)[int(layer)])


def show(found: Trained, samples: int) -> None:
    """How often routers were right in the last half of the steps, by thirds of the layers."""
    late = np.arange(len(found.layer)) >= len(found.layer) // 2
    print(f"{samples:,} samples, {len(found.layer):,} steps. In the last half of the steps:")
    for part in np.array_split(np.arange(len(found.routers.first)), min(3, len(found.routers.first))):
        mine = late & np.isin(found.layer, part)
        if mine.any():
            print(
                f"  behind layers {part[0]} to {part[-1]}: {found.leaving[mine].mean():.0%} of the answers need no "
                f"picture any more, and routers were right about {found.right[mine].mean():.0%}"
            )

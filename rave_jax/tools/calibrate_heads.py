"""`rave-jax calibrate sads`, `vhr`, `rave` and `var`: which heads to change, from what they do on a calibration set,
and which dimensions say that a token is a sink."""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np

from rave_jax.attention import Rave, Sads, Var, Vhr
from rave_jax.attention.calibrate import rave, vhr
from rave_jax.attention.calibrate.sads import SadsSearch, Sparsified, sparsify
from rave_jax.attention.calibrate.sinks import VarSearch, strengths
from rave_jax.evaluation.calibration import encoded
from rave_jax.evaluation.heads import (
    first_inputs,
    head_stats,
    reinforced,
    visual_mass,
    with_and_without,
    with_answer,
)
from rave_jax.tools.calibrate import Subject
from rave_jax.tools.flags import add_fields, given_fields


def add_sads_flags(parser: argparse.ArgumentParser) -> None:
    """How the heads that collapsed are looked for."""
    add_fields(parser, SadsSearch, "the search")


def add_vhr_flags(parser: argparse.ArgumentParser) -> None:
    """Which layers are reinforced."""
    add_fields(parser, vhr.VhrSearch, "the search", notes={"first": "may be given several times; default: 1"})


def add_rave_flags(parser: argparse.ArgumentParser) -> None:
    """How many heads get a gate."""
    add_fields(parser, rave.RaveSearch, "the search")


def add_var_flags(parser: argparse.ArgumentParser) -> None:
    """How many sink dimensions there are."""
    add_fields(parser, VarSearch, "the search")


def calibrate_sads(arguments: argparse.Namespace) -> None:
    """Run the command: print what was found and write the mechanisms as JSON.

    Raises:
        ConfigError: the flags, the model or the samples cannot be used, or the file cannot be written.
    """
    search = SadsSearch(**given_fields(arguments, SadsSearch))
    subject = Subject(arguments, Sads, with_answer)
    stats = head_stats(subject.model, subject.processor, subject.samples, subject.mesh, arguments.rows)
    found = sparsify(search, stats, subject.model.config.text.num_kv_heads)
    show(found, len(subject.samples))
    subject.write(found.configs)


def calibrate_vhr(arguments: argparse.Namespace) -> None:
    """Run the command: print what was found and write the mechanisms as JSON.

    Raises:
        ConfigError: the flags, the model or the samples cannot be used, or the file cannot be written.
    """
    search = vhr.VhrSearch(**given_fields(arguments, vhr.VhrSearch))
    subject = Subject(arguments, Vhr, with_and_without)
    on = search.layers(subject.sizes[0])
    chosen = reinforced(
        subject.model, subject.processor, subject.samples, subject.mesh, arguments.rows, search.alpha, on
    )
    often = chosen.mean(0)
    agreed = float(often[often > 0].mean()) if np.any(often > 0) else 0.0
    print(
        f"{len(chosen):,} samples, {int(on.sum())} layers. More than half of the samples choose {np.sum(often > 0.5)} "
        f"heads; a head that any sample chooses is chosen by {agreed:.0%} of them."
    )
    subject.write(vhr.configs_of(search, chosen))


def calibrate_rave(arguments: argparse.Namespace) -> None:
    """Run the command: print what was found and write the mechanisms as JSON.

    Raises:
        ConfigError: the flags, the model or the samples cannot be used, or the file cannot be written.
    """
    search = rave.RaveSearch(**given_fields(arguments, rave.RaveSearch))
    subject = Subject(arguments, Rave, with_answer)
    mass = visual_mass(subject.model, subject.processor, subject.samples, subject.mesh, arguments.rows)
    chosen = search.chosen(mass)
    print(
        f"{len(subject.samples):,} samples. {int(chosen.sum()):,} of {chosen.size:,} heads get a gate: text gives "
        f"{mass[chosen].mean():.1%} of their attention to visual tokens, and {mass.mean():.1%} of that of all heads."
    )
    subject.write(rave.configs_of(chosen))


def calibrate_var(arguments: argparse.Namespace) -> None:
    """Run the command: print what was found and write the mechanism as JSON.

    Raises:
        ConfigError: the flags, the model or the samples cannot be used, or the file cannot be written.
    """
    search = VarSearch(**given_fields(arguments, VarSearch))
    subject = Subject(arguments, Var, lambda processor, sample: encoded(processor, sample, "entropy"))
    subject.with_mechanism(Var(dims=(0,)))
    hidden: Any = first_inputs(subject.model, subject.processor, subject.samples, subject.mesh, arguments.rows)
    found, strength = search.config_of(hidden), strengths(hidden)
    sizes = ", ".join(f"{n} ({strength[n]:.1f})" for n in found.dims)
    rest = np.delete(strength, found.dims)
    print(
        f"{len(subject.samples):,} samples. Sink dimensions, and how many times the root mean square of first tokens "
        f"they are: {sizes}; the next largest {rest.max(initial=0.0):.1f}. A token is a sink above {found.tau:g} "
        "(Var.tau)."
    )
    subject.write((found,))


def show(found: Sparsified, samples: int) -> None:
    """Thresholds and how many heads are what."""
    late, heads = found.dropped[found.start :].shape
    alpha, beta = ("none: one heap" if x is None else f"{x:.4f}" for x in (found.alpha, found.beta))
    vision, spread, dropped = (int(x.sum()) for x in (found.vision, found.spread, found.dropped))
    print(
        f"{samples:,} samples. Late layers from {found.start} on: {late * heads:,} heads, of which {vision:,} are "
        f"vision heads (alpha {alpha}), {spread:,} read context (beta {beta}) and {dropped:,} are dropped."
    )

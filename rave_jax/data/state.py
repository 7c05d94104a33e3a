"""The data's part of a checkpoint: what it holds, and whether a run goes on from it with the data that is there.

A state is small: the step, what the plan needs, and what has to be the same, so that the next batch is the one that
would have come. Where a source has changed, a run is refused, or goes on by a rule that a line says.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

from rave_jax.config import ConfigError, require
from rave_jax.data.order import Restart
from rave_jax.data.sample import Source

VERSION = 2
"""Of the order of samples. States without one are of the order before `order.py` took grain's."""

OnChange = Literal["refuse", "continue"]

CHOICES = 'put the data back as it was, start a new run in another output_dir, or set data.on_change to "continue"'


class Origin(NamedTuple):
    """What the order of a run depends on besides config and sources.

    Fields:
        lengths: samples of each source when the run began; `Stage.epochs` mixes by them.
        restarts: where sources that have changed began anew; empty where none has.
    """

    lengths: tuple[int, ...]
    restarts: tuple[Restart, ...] = ()


class Resumed(NamedTuple):
    """How a run goes on.

    Fields:
        origin: of its order.
        changed: numbers of sources that hold other samples than when the state was saved.
        says: a line on each thing that is not as it was.
    """

    origin: Origin
    changed: frozenset[int] = frozenset()
    says: tuple[str, ...] = ()


def saved(origin: Origin, facts: Mapping[str, Any], sources: Sequence[Source]) -> dict[str, Any]:
    """What a state holds besides the plan's own: JSON-ready.

    Args:
        origin: of the order.
        facts: what has to be the same when the run goes on, by the names of the fields of `DataConfig`.
        sources: of the run.
    """
    state = {
        "version": VERSION,
        **facts,
        "samples": [len(source) for source in sources],
        "fingerprints": [source.fingerprint for source in sources],
    }
    if origin.restarts:
        state |= {"mixed_by": list(origin.lengths), "restarts": [list(restart) for restart in origin.restarts]}
    return state


def resumed(
    state: Mapping[str, Any], facts: Mapping[str, Any], sources: Sequence[Source], on_change: OnChange
) -> Resumed:
    """How a run goes on from a state.

    Args:
        state: as `saved` gave it, with the plan's.
        facts: of this run.
        sources: of this run.
        on_change: what to do about an order or sources that have changed.

    Raises:
        ConfigError: the state is damaged, or of a run with other facts; its order or a source has changed and
            `on_change` is "refuse".
    """
    version = state.get("version", 1)
    if version > VERSION:
        raise ConfigError(
            f"the data state of the checkpoint has version {version}, and this release reads up to {VERSION}: continue "
            "the run with the release that saved it"
        )
    for name in ("step", "samples", *facts):
        if name not in state:
            raise ConfigError(
                f"the data state of the checkpoint has no entry {name}: it is damaged; delete the checkpoint, "
                "so that the one before it is taken"
            )
    for name, value in facts.items():
        require(state[name] == value, f"data.{name}", value, f"{state[name]!r} as in the run that was saved")
    count = len(state["samples"])
    require(count == len(sources), "data.sources", f"{len(sources)} sources", f"{count} as in the run that was saved")
    lengths = tuple(len(source) for source in sources)
    if version < VERSION:
        return _other_order(lengths, on_change)
    origin = Origin(
        tuple(state.get("mixed_by", state["samples"])),
        tuple(Restart(*restart) for restart in state.get("restarts", ())),
    )
    found = {number: change for number, source in enumerate(sources) if (change := _change(number, source, state))}
    if not found:
        return Resumed(origin)
    if on_change == "refuse":
        raise ConfigError(f"{'; '.join(found.values())}: {CHOICES}, with which it begins a new epoch of what it holds")
    taken = state["taken"]
    before = origin.restarts or (Restart(),) * count
    restarts, says = list(before), []
    for number, change in found.items():
        epoch = -(-before[number].number_of(taken[number]) // state["samples"][number])
        restarts[number] = Restart(taken[number], epoch * lengths[number])
        says.append(f"{change}: from here on it begins its epoch {epoch + 1} with what it holds")
    return Resumed(Origin(origin.lengths, tuple(restarts)), frozenset(found), tuple(says))


def _other_order(lengths: tuple[int, ...], on_change: OnChange) -> Resumed:
    """Going on from a state of another version of the order."""
    says = "the checkpoint was saved by a release that put samples in another order"
    if on_change == "refuse":
        raise ConfigError(
            f"{says}: continue the run with that release, start a new one in another output_dir, or set "
            'data.on_change to "continue": samples of the present epoch may then come again, and others not'
        )
    also = "from here on samples come in the order of this one, and in the present epoch some come again and others not"
    return Resumed(Origin(lengths), says=(f"{says}: {also}",))


def _change(number: int, source: Source, state: Mapping[str, Any]) -> str:
    """What has changed in a source, in words; "" if nothing has."""
    name, length, before = f"data.sources.{number} ({source.name})", len(source), state["samples"][number]
    if length != before:
        how = "has grown" if length > before else "has shrunk"
        return f"{name} {how}: it holds {length} samples, and {before} in the run that was saved"
    fingerprint = state["fingerprints"][number]
    if source.fingerprint == fingerprint:
        return ""
    return (
        f"{name} holds other records than in the run that was saved, or the same in another order (fingerprint "
        f"{source.fingerprint}, expected {fingerprint})"
    )

"""Which backend serves an operation: one rule for all kernels.

An operation names its backends. Each says on which devices it is preferred and, for the operands at hand, why it
cannot serve. `auto` takes the backend that is preferred on the devices of the program, where it can serve and is worth
it, and the one that serves everything everywhere else. The choice and its reason are logged once.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from rave_jax.kernels import support

log = logging.getLogger(__name__)
EVERYWHERE = "xla"
"""The backend that serves whatever is asked, on any device."""


def _nothing(*_: Any) -> None:
    return None


@dataclass(frozen=True)
class Backend:
    """One way to compute an operation.

    Attributes:
        run: the function.
        note: what it does, in a few words, for the log.
        platforms: "tpu" or "gpu": devices on which `auto` prefers it.
        against: why it cannot serve these operands here, as part of a sentence, or None.
        not_worth: why `auto` does not take it for these operands although it could serve, or None.
    """

    run: Callable[..., Any]
    note: str
    platforms: tuple[str, ...] = ()
    against: Callable[..., str | None] = _nothing
    not_worth: Callable[..., str | None] = _nothing


@dataclass(frozen=True)
class Operation:
    """An operation and its backends.

    Attributes:
        name: for messages, as in "attention".
        backends: by the name that configs use; `xla` is among them and serves whatever is asked.
    """

    name: str
    backends: Mapping[str, Backend]

    def choose(self, implementation: str, *operands: Any, label: str | None = None) -> str:
        """The name of the backend that serves.

        Args:
            implementation: a backend by name, or "auto".
            operands: what `against` and `not_worth` of the backends take.
            label: what the log calls the operation, such as its sizes.

        Raises:
            ValueError: there is no such backend, or it cannot serve these operands here.
        """
        if implementation == "auto":
            name, why = self._automatic(operands)
        elif implementation not in self.backends:
            raise ValueError(
                f"implementation {implementation!r} cannot serve {self.name}; expected auto, {', '.join(self.backends)}"
            )
        else:
            against = self.backends[implementation].against(*operands)
            if against is not None:
                raise ValueError(
                    f"implementation {implementation!r} cannot serve {self.name}: {against}; expected auto, or "
                    f"{EVERYWHERE}"
                )
            name, why = implementation, "as the config asks"
        _say_once(f"{label or self.name}: {name} ({why})")
        return name

    def _automatic(self, operands: tuple[Any, ...]) -> tuple[str, str]:
        """The backend, and why that one."""
        target = support.target()
        platform = "gpu" if target.platform == "cuda" else target.platform
        everywhere = self.backends[EVERYWHERE]
        preferred = [name for name, backend in self.backends.items() if platform in backend.platforms]
        if not preferred:
            devices = dict.fromkeys(f"{p.upper()}s" for backend in self.backends.values() for p in backend.platforms)
            return EVERYWHERE, f"{everywhere.note}; the fused kernels are for {' and '.join(devices)}"
        (name,) = preferred
        backend = self.backends[name]
        against = backend.against(*operands)
        if against is not None:
            return EVERYWHERE, f"{everywhere.note}; {name} cannot serve: {against}"
        not_worth = backend.not_worth(*operands)
        if not_worth is not None:
            return EVERYWHERE, not_worth
        return name, f"{backend.note}, {target.device_kind}"


@functools.cache
def _say_once(line: str) -> None:
    log.info(line)

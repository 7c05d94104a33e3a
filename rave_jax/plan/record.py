"""What is kept of a plan, so that a later one can be held against it: memory, bounds and collectives."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rave_jax.plan.report import Plan
from rave_jax.plan.result import Moved

BYTES = 0.02
"""Share by which bytes of collectives and of memory may differ. One compiler gives the same again."""
LITTLE = 0.002
"""Share of all bytes that a chip sends: collectives that send less in all are not compared."""
EXECUTIONS = 0.05
"""Share by which the number of executions may differ; and by two, whatever the share."""


def record_of(plan: Plan) -> dict[str, Any]:
    """A plan in few numbers.

    Args:
        plan: of a step that fits.

    Raises:
        ValueError: it does not fit, so that there is nothing to keep.
    """
    found, step = plan.bounds, plan.step
    if found is None:
        raise ValueError(f"{plan.config} does not fit {plan.topology}")
    return {
        "peak_bytes": step.hbm.peak,
        "share_of_hbm": round(plan.share, 3),
        "mfu_bound": round(found.mfu, 4),
        "mfu_bound_synchronous_exposed": round(found.mfu_exposed, 4),
        "largest": found.largest,
        "seconds_to_compile": round(step.seconds),
        "collectives": {_name(one): [one.traffic.times, round(one.traffic.sent)] for one in step.moved},
    }


def differences(kept: Mapping[str, Any], found: Mapping[str, Any]) -> list[str]:
    """Where two records differ by more than they may, in words; seconds and bounds follow from other numbers, and are
    not compared.

    Args:
        kept: what is expected.
        found: what there is.
    """
    wrong = []
    if abs(found["peak_bytes"] - kept["peak_bytes"]) > BYTES * kept["peak_bytes"]:
        wrong.append(f"peak of HBM: {found['peak_bytes']:,} bytes, expected {kept['peak_bytes']:,}")
    before, after = kept["collectives"], found["collectives"]
    little = LITTLE * sum(sent for _, sent in before.values())
    for name in dict.fromkeys((*before, *after)):
        times, sent = before.get(name, (0, 0))
        times_now, sent_now = after.get(name, (0, 0))
        if max(sent, sent_now) < little:
            continue
        if abs(sent_now - sent) > BYTES * sent:
            wrong.append(f"{name}: {sent_now:,} bytes sent by a chip, expected {sent:,}")
        if abs(times_now - times) > max(2, EXECUTIONS * times):
            wrong.append(f"{name}: {times_now:,} executions, expected {times:,}")
    return wrong


def _name(one: Moved) -> str:
    how = "asynchronous" if one.traffic.asynchronous else "synchronous"
    return f"{one.traffic.kind} over {' x '.join(one.traffic.axes)} ({one.traffic.members} chips), {how}"

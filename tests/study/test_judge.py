"""What a judge finds beside scores."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from rave_jax.study import judge as judge_module
from rave_jax.study.judge import Judge


def test_entries_are_means_over_the_samples_that_were_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures of several sizes have as many visual tokens."""
    monkeypatch.setattr(judge_module, "account", lambda size, *_: SimpleNamespace(entries=size, visual=2 * size))
    layout = SimpleNamespace(regions=None)
    model: Any = SimpleNamespace(config=SimpleNamespace(text=None), options=SimpleNamespace(layout=layout))
    samples = [SimpleNamespace(prompt=size) for size in (4, 8, 100)]
    asked = SimpleNamespace(task=SimpleNamespace(name="shapes", routes=2), samples=samples)
    judge = Judge.__new__(Judge)
    judge._tasks = [asked]
    judge._processor = SimpleNamespace(encode=lambda prompt, **_: SimpleNamespace(info=prompt))
    assert judge.findings(model) == {"shapes/entries": 6.0, "shapes/visual": 12.0}

"""Metrics to Weights & Biases: the package is imported when it is asked for; here a module stands for it."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest

from rave_jax.observe.wandb import MissingPackage, Wandb, WandbWriter


@pytest.fixture
def service(monkeypatch):
    """What the package was asked for."""
    asked: list = []

    def init(**given):
        asked.append(given)
        return SimpleNamespace(
            id="abc", log=lambda *row, **at: asked.append((row, at)), finish=lambda: asked.append("end")
        )

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    return asked


def test_a_run_and_the_run_that_continues_it_are_one(tmp_path, service):
    for after_step in (0, 7):
        writer = WandbWriter(Wandb("project", mode="offline"), tmp_path, {"steps": 9}, after_step)
        writer.write(after_step + 1, {"loss": 2.0})
        writer.close()
    first, row, end, second, *_ = service
    assert (first["project"], first["name"], first["mode"]) == ("project", tmp_path.name, "offline")
    assert first["config"] == {"steps": 9} and first["id"] is None and first["resume"] is None
    assert (row, end) == ((({"loss": 2.0},), {"step": 1}), "end")
    assert (second["id"], second["resume"]) == ("abc", "allow")


def test_the_missing_package_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(
        MissingPackage, match=r"wandb is set, but the package is missing: pip install 'rave-jax\[wandb\]'"
    ):
        WandbWriter(Wandb(), tmp_path, {}, 0)

"""Training on packed rows: a run that is killed goes on as one that was left alone, and says how rows are packed."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import pytest

from rave_jax.config import ConfigError
from rave_jax.data.config import DataConfig, Stage
from rave_jax.data.packing.config import Packing
from rave_jax.data.synthetic import Counting, DigitMosaic, Synthetic
from rave_jax.observe.metrics import OF_TIME, Row, read_jsonl
from rave_jax.training.config import TrainConfig
from rave_jax.training.run import train
from tests.resume.small_run import get_config

STEPS = 6
DATA = DataConfig(
    sources=(Synthetic((DigitMosaic(),), length=70), Synthetic((Counting(),), length=40)),
    stages=(Stage(0, (1, 0)), Stage(4, (1, 1))),
    rows=8,
    tokens=192,
    patches=160,
    packing=Packing(lookahead=2),
    weighting="sqrt",
)


def config(folder: Path, **changes: Any) -> TrainConfig:
    data = dataclasses.replace(DATA, **changes)
    small = dataclasses.replace(get_config(), tensorboard=False, final=(), steps=STEPS)
    return dataclasses.replace(small, output_dir=str(folder), data=data)


def rows_of(folder: Path) -> list[Row]:
    found = read_jsonl(folder / "metrics.jsonl")
    return [{name: row[name] for name in row if name not in OF_TIME} for row in found]


def test_a_killed_run_goes_on_as_if_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    train(config(whole))
    said = capsys.readouterr().err
    rows = rows_of(whole)
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    for row in rows:
        assert row["packing/documents"] > 0.5
        assert row["packing/padding"] == pytest.approx(1 - row["packing/tokens"], abs=1e-3)
        assert row["tokens"] == pytest.approx((1 - row["packing/padding"]) * 8 * 192, abs=1)
        assert row["packing/worst_balance"] >= 1
    assert "packing: " in said
    assert "of the tokens" in said
    shutil.copytree(whole, killed)
    for step in (4, 6):
        shutil.rmtree(killed / "checkpoints" / str(step))
    train(config(killed))
    assert rows_of(killed) == rows
    with pytest.raises(ConfigError, match="lookahead"):
        train(config(killed, packing=Packing(lookahead=3)))

"""The benchmark of Gaze: what it compares, what its table says, and that a cell of its pictures is a token."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import gaze_results
from rave_jax.attention import Gaze
from rave_jax.checkpoint.tiny import Tiny, write_tiny
from rave_jax.config import ConfigError, load_file
from rave_jax.data.pipeline import Pipeline
from rave_jax.data.synthetic import DigitMosaic, Synthetic
from rave_jax.evaluation.accounting import account
from rave_jax.evaluation.config import Eval
from rave_jax.evaluation.routing import Cells, cells_of, overlapping
from rave_jax.families.config import TextConfig
from rave_jax.look.maps import relative_box
from rave_jax.training.config import TrainConfig


@pytest.fixture(scope="module")
def config() -> TrainConfig:
    return load_file(gaze_results.CONFIG)


def row(setting: str, seed: int, accuracy: float, **more: Any) -> dict[str, Any]:
    common = {"entries": 20.0, "visual": 64.0, "samples": 4096, "where": "here"}
    return {"setting": setting, "seed": seed, "accuracy": accuracy, **common, **more}


def test_settings_differ_in_what_their_names_say(config: TrainConfig) -> None:
    settings = gaze_results.settings(config)
    routed = {name: next((m for m in o.mechanisms if isinstance(m, Gaze)), None) for name, o in settings.items()}
    assert [name for name, gaze in routed.items() if gaze is None] == ["dense", "context_only"]
    assert [name for name, o in settings.items() if o.context is None] == [
        "dense",
        "gaze_25_no_context",
        "min_max_25_no_context",
    ]
    shares = {name: gaze.top_k / 16 for name, gaze in routed.items() if gaze is not None}
    assert {name: share for name, share in shares.items() if share != 0.25} == {"gaze_50": 0.5, "gaze_12": 0.125}
    assert {gaze.descriptor for gaze in routed.values() if gaze} == {"mean", "min_max", "spread", "oracle", "random"}
    assert [name for name, gaze in routed.items() if gaze and gaze.schedule.shape == "none"] == ["gaze_25_at_once"]


def test_a_cell_of_the_pictures_is_a_token_and_a_quarter_of_them_is_read(config: TrainConfig, tmp_path: Path) -> None:
    assert isinstance(config.init, Tiny)
    processor = config.data.processor(write_tiny(tmp_path / "model", config.init), config.model.layout)
    heldout = next(step for step in config.final if isinstance(step, Eval))
    assert isinstance(heldout.data, Synthetic) and isinstance(heldout.data.tasks[0], DigitMosaic)
    source = heldout.data.build()
    longest = 0
    for index in range(20):
        sample = source[index]
        prompt = processor.encode(sample.prompt, add_generation_prompt=True)
        found = cells_of(prompt.info, prompt.shown)
        assert found is not None and sample.evidence is not None
        (cells,) = found
        box = relative_box(sample.evidence, 128, 128)
        apart = Cells(np.arange(64).reshape(8, 8))
        assert overlapping(cells, 16, box).sum() == overlapping(apart, 64, box).sum() == 1
        reading = account(prompt.info, TextConfig(), config.model)
        assert reading is not None and (reading.entries, reading.visual) == (4 * 4 + 4, 64)
        longest = max(longest, len(prompt.tokens))
    assert longest <= heldout.tokens


def test_the_longest_samples_fit_the_rows(config: TrainConfig, tmp_path: Path) -> None:
    assert isinstance(config.init, Tiny)
    processor = config.data.processor(write_tiny(tmp_path / "model", config.init), config.model.layout)
    pipeline = Pipeline(config.data, processor)
    for stage in config.data.stages:
        (source,) = (s.build() for s, weight in zip(config.data.sources, stage.weights, strict=True) if weight)
        shape = pipeline.shape(stage.step)
        found = [processor.encode(source[i].messages) for i in range(200)]
        assert max(example.patches.length for example in found) <= shape.patches
        assert shape.tokens - 4 <= max(len(example.tokens) for example in found) <= shape.tokens


def test_rows_of_other_steps_are_refused_by_name(config: TrainConfig, tmp_path: Path) -> None:
    kept = {"setting": "dense", "seed": 0, "accuracy": 0.9, **gaze_results.made_with(config, 100)}
    (tmp_path / "dense-0.json").write_text(json.dumps(kept))
    assert gaze_results.kept_rows(tmp_path, config, 100) == [kept]
    with pytest.raises(ConfigError, match=r"dense-0.json: steps is 100, expected 300; give another --out"):
        gaze_results.kept_rows(tmp_path, config, 300)


def test_the_table_pairs_seeds_and_says_what_is_missing_and_what_is_not_decided() -> None:
    rows = [row("dense", 0, 0.80), row("dense", 1, 0.90), row("dense", 2, 0.85)]
    rows += [row("gaze_25", 0, 0.805), row("gaze_25", 1, 0.906), row("gaze_25", 2, 0.8555)]
    rows += [row("gaze_12", 1, 0.7, on_evidence=0.5, chance=0.0625)]
    table = gaze_results.compared(rows, ["dense", "gaze_25", "gaze_12", "random_25"], [0, 1, 2])
    assert [r["missing"] for r in table] == [[], [], [0, 2], [0, 1, 2]]
    assert table[1]["difference"].mean == pytest.approx(0.0055) and table[1]["undecided"] is None
    assert table[2]["difference"].mean == pytest.approx(-0.2) and table[2]["undecided"] == "one seed"
    lines = gaze_results.markdown(table)
    assert "+0.5 (" in lines[3] or "+0.6 (" in lines[3]
    assert "not decided: one seed" in lines[4] and "50.0%, by chance 6.2%" in lines[4] and "seeds 0, 2" in lines[4]
    results = {r["name"].split(":")[0]: r for r in gaze_results.as_results(table)}
    assert results["gaze_25"]["holds"] is True and results["gaze_12"]["holds"] is None
    worse = [row("gaze_25", seed, accuracy - 0.012) for seed, accuracy in enumerate((0.80, 0.90, 0.85))]
    table = gaze_results.compared(rows[:3] + worse, ["dense", "gaze_25"], [0, 1, 2])
    assert gaze_results.as_results(table)[0]["holds"] is False
    weak = [row("dense", s, 0.5) for s in range(3)] + [row("gaze_25", s, 0.5) for s in range(3)]
    assert "base 50.0% < 60%" in gaze_results.compared(weak, ["dense", "gaze_25"], [0, 1, 2])[1]["undecided"]

"""WAAD and FAI: the stated formulas over the whole map of a model, written out token by token."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest

from rave_jax.attention import Rave
from rave_jax.batch import Batch, Role
from rave_jax.evaluation.config import Eval
from rave_jax.evaluation.report import PROBES
from rave_jax.evaluation.spans import SpanMeans, SpanProbe, SpanSums, answer_spans, curves, middle_layers
from rave_jax.evaluation.suites import run
from rave_jax.families.qwen2_5_vl import presets
from rave_jax.models.config import ModelOptions
from rave_jax.models.forward import Want
from rave_jax.models.vlm import Vlm
from tests.evaluation.toy import Fake, Toy, any_source, read
from tests.models.layout import batch, document
from tests.models.made import model as made

CONFIG = presets.tiny(vocab_size=64, num_layers=4, vision_depth=1, full_attention_blocks=())
T, ANSWER = 48, slice(16, 40)


@pytest.fixture(scope="module")
def one() -> tuple[Batch, np.ndarray, SpanSums, np.ndarray]:
    """A prompt and an answer of 24 tokens: its sums, and the map [L,T,H,S]."""
    doc = document([ANSWER.start, ANSWER.stop - ANSWER.start], CONFIG, np.random.default_rng(0))
    for code in doc.codes[ANSWER]:
        code["role"] = Role.RESPONSE
    rows = batch([[doc]], CONFIG, tokens=T, patches=0)
    answer = np.zeros((1, T), bool)
    answer[:, ANSWER] = True
    every = np.arange(T, dtype=np.int32)[None]

    def both(vlm: Vlm, rows: Batch, answer: Any) -> Any:
        """One pass for the sums and for the whole map."""
        kept: list[Any] = []

        def forward(rows: Batch, want: Want) -> Any:
            kept.append(vlm.forward(rows, dataclasses.replace(want, queries=every)))
            return kept[-1]

        model: Any = SimpleNamespace(forward=forward)
        return answer_spans(model, rows, answer), kept[0].attention

    sums, whole = jax.jit(both)(made(CONFIG, ModelOptions(mechanisms=(Rave(rank=2),))), rows, answer)
    return rows, answer[0], jax.tree.map(lambda x: np.asarray(x)[0], sums), np.float64(whole)[:, 0]


def test_curves_are_the_stated_sums(one: Any) -> None:
    _, _, sums, whole = one
    layers = middle_layers(4)
    assert layers == (1, 2)
    maps = {(layer, h): whole[layer, :, h] for layer in layers for h in range(CONFIG.text.num_heads)}
    R = range(ANSWER.start, ANSWER.stop)
    span = {at: np.mean([sum(P[t, s] * (t - s) for s in range(t + 1)) for t in R]) for at, P in maps.items()}
    order = sorted(span, key=lambda at: span[at])
    count = round(0.3 * len(order))
    local = np.mean([maps[at] for at in order[:count]], axis=0)
    everywhere = np.mean([maps[at] for at in order[-count:]], axis=0)
    waad = [sum(local[t, s] * min(t - s, 10) for s in range(t + 1)) for t in R]
    readers = [[t for t in R if s + 10 <= t <= s + 50] for s in R]
    fai = [np.mean([everywhere[t, s] for t in ts]) if ts else np.nan for s, ts in zip(R, readers, strict=True)]
    found = curves(sums)
    assert found is not None and count == 2 and np.isnan(fai).sum() == 10
    np.testing.assert_allclose(found.spans.ravel(), [span[at] for at in maps], atol=1e-4)
    np.testing.assert_allclose(found.waad, waad, atol=1e-5)
    np.testing.assert_allclose(found.fai, fai, atol=1e-6)
    np.testing.assert_allclose(
        [found.near, found.far], [np.mean([span[at] for at in some]) for some in (order[:2], order[-2:])], atol=1e-4
    )


@pytest.mark.parametrize(
    ("count", "layers"), [(28, (9, 11, 14, 16, 18)), (36, (12, 15, 18, 20, 23)), (1, (0,)), (2, (0, 1))]
)
def test_five_layers_of_the_middle_third_are_read(count: int, layers: tuple[int, ...]) -> None:
    assert middle_layers(count) == layers


def test_an_evaluation_writes_the_curves_and_a_section(one: Any, tmp_path: Path) -> None:
    class Known(Fake):
        def per_sample(self, reading: Any, samples: Any, answers: Any) -> Any:
            assert reading is answer_spans
            short = one[2]._replace(answer=np.arange(T) == ANSWER.start)
            return [one[2], short, one[2]._replace(answer=np.zeros(T, bool))][: len(samples)]

    config = Eval("toy", any_source(Toy()), samples=3, rows=3, looks=0, pictures=0, floor=None, spans=3)
    found = run(config, Toy(), Known(read), tmp_path).findings["spans"]
    assert isinstance(found, SpanMeans) and found.samples == 2 and found.fai is not None
    assert found.fai == pytest.approx(float(np.nanmean(curves(one[2]).fai)))
    lines = (tmp_path / "spans.jsonl").read_text().splitlines()
    assert len(lines) == 2 and lines[1].endswith('"fai": [null]}')
    assert SpanProbe in PROBES and "WAAD" in "\n".join(SpanProbe.section(vars(found)))
    assert "no FAI" in SpanMeans(1, 1.0, 2.0, 1.0, None).sentences()[0]
    assert run(config, Toy(), Fake(read), None).findings["spans"] is None, "without a model there is nothing to read"

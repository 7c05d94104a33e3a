"""Routing accuracy: counted here by pixels and by hand, on a model that routes."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from benchmarks import routing_accuracy
from rave_jax.attention import Gaze, Rave
from rave_jax.batch import Kind, TokenInfo
from rave_jax.config import ConfigError
from rave_jax.data.collate import BatchShape, collate
from rave_jax.data.processor import Processor
from rave_jax.data.sample import Sample
from rave_jax.evaluation.answered import with_answer
from rave_jax.evaluation.config import Eval
from rave_jax.evaluation.routing import Cells, Route, RoutingSummary, cells_of, hits, overlapping, summarise
from rave_jax.evaluation.subject import Answer, ModelSubject
from rave_jax.evaluation.suites import run
from rave_jax.families.qwen2_5_vl.presets import tiny
from rave_jax.layout import WHOLE, AdaptiveRegions, FixedRegions, Shown
from rave_jax.models.config import ModelOptions
from rave_jax.models.forward import Want
from rave_jax.models.vlm import Vlm
from rave_jax.parallel.mesh import MeshConfig, make_mesh
from tests.data.conftest import TEMPLATE, byte_tokenizer, tiny_settings
from tests.data.pictures import noise
from tests.evaluation.toy import Fake, Toy, any_source, read
from tests.models.made import model

OPTIONS = ModelOptions(mechanisms=(Gaze(regions=FixedRegions(2, 2), max_regions=8, top_k=2), Rave(rank=2)))
SHAPE = BatchShape(rows=2, tokens=96, patches=128)


def made(options: ModelOptions) -> tuple[Vlm, Processor]:
    tokenizer = byte_tokenizer()
    processor = Processor(tokenizer, tiny_settings(tokenizer), TEMPLATE, options.layout)
    ids = {"image_token_id": processor.rules.image_token_id, "video_token_id": processor.rules.video_token_id}
    config = dataclasses.replace(tiny(vocab_size=270, tie_embeddings=False), **ids)
    return model(config, options, seed=1), processor


def ask(question: str, size: tuple[int, int] | None, box: tuple[float, float, float, float] | None = None) -> Sample:
    picture = [] if size is None else [{"type": "image", "image": noise(*size, seed=len(question))}]
    content = [*picture, {"type": "text", "text": question}]
    messages = ({"role": "user", "content": content}, {"role": "assistant", "content": "yes"})
    return Sample(id=question, messages=messages, answers=("yes",), evidence=box, task="toy")


def subject(vlm: Vlm, processor: Processor) -> ModelSubject:
    return ModelSubject(vlm, processor, make_mesh(MeshConfig(), jax.devices()[:1]), SHAPE, 4)


def test_a_route_is_what_the_models_queries_chose_and_hits_are_counted_by_pixels() -> None:
    vlm, processor = made(OPTIONS)
    # Merged tokens have 8 pixels here: 4 rows and 6 columns of them, in 2 x 3 regions of 16 pixels.
    samples = [ask("Where?", (32, 48), (17.0, 3.0, 30.0, 18.0)), ask("No picture", None), ask("What?", (16, 16))]
    answers = [Answer("ab", (70, 71)), Answer("", ()), Answer("c", (72,))]
    routes = subject(vlm, processor).route(samples, answers)

    prompt = processor.encode(samples[0].prompt, add_generation_prompt=True)
    example = with_answer(prompt, answers[0].tokens)
    batch = collate([[example]], BatchShape(1, len(example.tokens), 128), processor.rules.patch_sizes)
    last = len(prompt.tokens) - 1
    queries = np.array([[last, last + 1]], np.int32)
    chosen = np.asarray(jax.jit(Vlm.forward)(vlm, batch, Want(queries=queries)).chosen)[:, 0]
    assert (chosen.sum(-1) == 2).all()

    route = routes[0]
    assert route is not None and route.chosen is not None and route.cells is not None and route.reading is not None
    np.testing.assert_allclose(route.chosen, chosen.mean(1)[..., :6])
    (cells,) = route.cells
    np.testing.assert_array_equal(cells.regions, np.repeat(np.repeat([[0, 1, 2], [3, 4, 5]], 2, 0), 2, 1))
    assert (route.reading.entries, route.reading.visual) == (8, 24)

    # The picture's pixels, each with the number of its region.
    pixels = np.repeat(np.repeat([[0, 1, 2], [3, 4, 5]], 16, 0), 16, 1)
    evidence = np.unique(pixels[3:18, 17:30])
    choices = chosen.reshape(-1, chosen.shape[-1])
    counted = [np.isin(np.flatnonzero(choice), evidence).mean() for choice in choices]
    found = hits(samples[0], route, (17 / 48, 3 / 32, 30 / 48, 18 / 32))
    assert found is not None and found.chance == pytest.approx(2 / 6) and set(evidence) == {1, 4}
    np.testing.assert_allclose(np.mean(found.by_layer), np.mean(counted), rtol=1e-6)
    np.testing.assert_allclose(found.by_layer[0], np.mean(counted[: len(counted) // len(chosen)]), rtol=1e-6)

    assert routes[1] is not None and routes[1].chosen is None and routes[1].reading is None
    assert routes[2] is not None and routes[2].chosen is not None and routes[2].chosen.shape[-1] == 1


def test_a_model_that_does_not_route_is_counted_and_has_no_hits() -> None:
    vlm, processor = made(ModelOptions(mechanisms=(Rave(rank=2),)))
    (route,) = subject(vlm, processor).route([ask("Where?", (32, 48))], [Answer("ab", (70, 71))])
    assert route is not None and route.chosen is None and route.reading is not None
    assert route.reading.entries == route.reading.visual == 24
    assert hits(ask("Where?", (32, 48)), route, (0, 0, 1, 1)) is None


def test_boxes_that_touch_an_edge_do_not_reach_over_it() -> None:
    cells = Cells(np.repeat(np.repeat(np.arange(16).reshape(4, 4), 2, 0), 2, 1))
    for size in (112, 84, 100):
        step = size / 4
        box = (step / size, 2 * step / size, 2 * step / size, 3 * step / size)
        np.testing.assert_array_equal(np.flatnonzero(overlapping(cells, 16, box)), [9])
    assert overlapping(cells, 16, (0, 0, 1, 1)).all()
    assert overlapping(cells, 20, (0, 0, 1, 1)).sum() == 16, "regions of other pictures hold no evidence of the first"


def test_regions_of_tiles_hold_what_their_part_of_the_picture_holds() -> None:
    """Two tiles side by side, each one region, then the whole picture in two regions."""
    codes: dict[str, Any] = {name: np.zeros(6, np.int32) for name in TokenInfo._fields}
    codes |= {"image": [1, 1, 2, 2, 3, 3], "kind": [Kind.VISUAL] * 6, "col": [0, 1] * 3, "region": [1, 1, 2, 2, 3, 4]}
    codes |= {"grid_h": [1] * 6, "grid_w": [2] * 6}
    info = TokenInfo(*(np.asarray(code, np.int32) for code in codes.values()))
    shown = [Shown(1, (0, 0, 0.5, 1)), Shown(1, (0.5, 0, 1, 1)), Shown(1, WHOLE)]
    cells = cells_of(info, shown)
    assert cells is not None
    for box, holding in (((0.1, 0, 0.4, 1), [0, 2]), ((0.6, 0, 0.9, 1), [1, 3]), ((0.4, 0, 0.6, 1), [0, 1, 2, 3])):
        route = Route(np.eye(4, dtype=np.float32)[None], cells, None)
        found = hits(ask("Where?", None), route, box)
        assert found is not None and found.chance == len(holding) / 4
        np.testing.assert_array_equal(np.flatnonzero(np.any([overlapping(c, 4, box) for c in cells], 0)), holding)
    assert cells_of(info, [Shown(2, WHOLE)] * 3) is None


def test_an_evaluation_says_it(tmp_path) -> None:
    config = Eval("toy", any_source(Toy()), samples=20, rows=8, looks=0, pictures=0, routes=6)
    summary = run(config, Toy(), Fake(read), tmp_path)
    found = summary.findings["routing"]
    assert isinstance(found, RoutingSummary) and found.samples == 6
    # One head chooses the left half alone, where the evidence is, the other both halves.
    assert found.hits is not None and found.hits.accuracy == pytest.approx((1 + 1 / 2) / 2)
    assert found.hits.chance == 0.5 and found.by_layer == (0.75, 0.75)
    assert set(found.by_task) == {"odd", "even"}
    assert any("75.0%" in sentence for sentence in found.sentences())
    assert summary.to_json()["routing"]["hits"]["samples"] == 6
    none = run(dataclasses.replace(config, routes=0), Toy(), Fake(read), None)
    assert none.findings["routing"] is None


def test_fields() -> None:
    with pytest.raises(ConfigError, match="routes is -1"):
        Eval(routes=-1)
    assert summarise([], []) is None
    nothing = summarise([Route(None, None, None)], [])
    assert nothing is not None and nothing.sentences() == []


@pytest.mark.parametrize("name", ["raccoon_grounding", "coco_mini"])
def test_photographs_with_boxes(name: str, shared_data: Path) -> None:
    """Random weights and descriptors that know nothing: about chance, and chance is counted in pixels."""
    folder = shared_data / name
    if not folder.is_dir():
        pytest.skip(f"no {name} in {shared_data}")
    gaze = Gaze(regions=AdaptiveRegions(4, 4, tokens=4), max_regions=16, top_k=4, descriptor="random")
    vlm, processor = made(ModelOptions(mechanisms=(gaze,)))
    side = 64
    asked = routing_accuracy.samples(name, folder, side)
    assert len(asked) >= 8 and all(sample.source == name for sample in asked)
    summary = routing_accuracy.routing(vlm, processor, asked, side)
    assert summary.hits is not None and summary.hits.samples == len(asked)
    chances = []
    for sample in asked:
        assert sample.evidence is not None
        x1, y1, x2, y2 = sample.evidence
        # Cells of 8 pixels: touched where some of their inside is in the box, which is not cut to whole pixels.
        cols = [c for c in range(8) if c * 8 < x2 and c * 8 + 8 > x1]
        rows = [r for r in range(8) if r * 8 < y2 and r * 8 + 8 > y1]
        chances.append(len({(r // 2, c // 2) for r in rows for c in cols}) / 16)
    assert summary.hits.chance == pytest.approx(np.mean(chances))
    assert abs(summary.hits.accuracy - summary.hits.chance) < 0.25

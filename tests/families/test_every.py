"""What holds for every family: a new one is tested here as soon as it is in the registry."""

from __future__ import annotations

import dataclasses
import json

import jax
import numpy as np
import pytest
from PIL import Image

from rave_jax.attention import Gaze, Rave
from rave_jax.batch import Batch, Kind
from rave_jax.data.collate import BatchShape, collate, smallest_shape
from rave_jax.data.sample import Example, SampleError
from rave_jax.evaluation.answered import with_answer
from rave_jax.families import FAMILIES
from rave_jax.inference import Completion, Generator, Request, Sampling, SlotConfig
from rave_jax.layout import ContextTokens
from rave_jax.look.blocks import blocks_of
from rave_jax.look.maps import Look, coverage, over_picture, relative_box
from rave_jax.models.config import ModelOptions
from rave_jax.models.parameters import shardings
from rave_jax.models.vlm import Vlm
from rave_jax.parallel.mesh import MeshConfig, make_mesh
from rave_jax.parallel.rows import global_batch
from rave_jax.parallel.sharding import use_mesh
from tests.families.every import (
    EVERY,
    WITH_PICTURES,
    WITHOUT_CONTEXT,
    WITHOUT_VIDEOS,
    Small,
    answer,
    largest_difference,
    question,
    small,
    with_pictures,
)
from tests.families.test_families import abstract, assert_one_to_one

MECHANISMS = (Rave(rank=2), Gaze(top_k=2, max_regions=64))
"""RAVE and Gaze in one layer; beside them come context tokens where there are pictures."""
EACH = pytest.mark.parametrize("family", EVERY)


def options_of(family: str) -> ModelOptions:
    """All of this project's own mechanisms, which are about pictures."""
    context = None if family in WITHOUT_CONTEXT else ContextTokens(2)
    return ModelOptions(MECHANISMS, context=context) if with_pictures(family) else ModelOptions()


@jax.jit
def hidden_states(model: Vlm, batch: Batch) -> jax.Array:
    with jax.default_matmul_precision("highest"):
        return model.forward(batch).hidden


def batch_of(of: Small, rows: list[list[Example]], shape: BatchShape | None = None) -> Batch:
    sizes = of.processor.rules.patch_sizes
    return collate(rows, shape or smallest_shape(rows, 8, sizes.window), sizes)


@EACH
def test_every_tensor_of_a_checkpoint_is_one_parameter(family: str) -> None:
    of, record = small(family, options_of(family)), FAMILIES[family]
    model = abstract(of.config, ModelOptions())
    assert_one_to_one(model, record.tensors(of.config))
    parsed = record.parse(json.loads(json.dumps(record.render(of.config))))
    if of.config.vision is not None and parsed.vision is not None:
        # What the image processor's file says, and config.json does not.
        stated = {name: getattr(of.config.vision, name) for name in ("pixel_mean", "pixel_std")}
        parsed = dataclasses.replace(parsed, vision=dataclasses.replace(parsed.vision, **stated))
    assert parsed == of.config


@EACH
def test_a_packed_document_is_the_document_alone(family: str) -> None:
    """Bit for bit whatever stands before it in its row, and but for rounding what it is in a row of its own."""
    options = options_of(family)
    of, sizes = small(family, options), with_pictures(family)
    first = of.encode(question("12?", *sizes), answer("56"))
    other = of.encode(question("34?", *sizes, seed=7), answer("78"))
    second = of.encode(question("And here?", *sizes[1:2], seed=3), answer("none"))
    assert len(first.tokens) == len(other.tokens)
    found = np.asarray(hidden_states(of.model(options), batch_of(of, [[first, second], [other, second], [second]])))
    start, stop = len(first.tokens), len(first.tokens) + len(second.tokens)
    assert np.isfinite(found).all()
    np.testing.assert_array_equal(found[0, start:stop], found[1, start:stop])
    assert largest_difference(found[0, :start], found[1, :start]) > 1e-3, "the first documents differ"
    assert largest_difference(found[0, start:stop], found[2, : len(second.tokens)]) < 2e-5


@pytest.mark.slow
@EACH
def test_answers_in_slots_are_those_of_whole_passes(family: str) -> None:
    """Prompts are read in chunks, into slots that were used before, and the next token is what one pass says."""
    options = options_of(family)
    of, sizes = small(family, options), with_pictures(family)
    model = of.model(options)
    asked = [question("Where is it?", *sizes), question("Is it?"), question("How many are there?", *sizes[::-1])]
    slots = SlotConfig(slots=2, max_length=512, chunk=32, smallest=32, patches=512)
    with jax.default_matmul_precision("highest"):
        ends = list(Generator(model, of.processor, slots).answers([Request([m], Sampling(6)) for m in asked]))
    prompts = [of.encode(message, generation=True) for message in asked]
    answered = [end for end in ends if isinstance(end, Completion)]
    assert len(answered) == len(asked)
    rows = [[with_answer(prompt, end.tokens)] for prompt, end in zip(prompts, answered, strict=True)]
    hidden = hidden_states(model, batch_of(of, rows))
    logits = np.asarray(jax.jit(lambda model, x: model.logits(x))(model, hidden))
    for n, (prompt, end) in enumerate(zip(prompts, answered, strict=True)):
        begin = len(prompt.tokens) - 1
        np.testing.assert_array_equal(logits[n, begin : begin + len(end.tokens)].argmax(-1), end.tokens)


@pytest.mark.slow
@EACH
def test_eight_devices_compute_what_one_does(family: str) -> None:
    options = options_of(family)
    of, sizes = small(family, options), with_pictures(family)
    model = of.model(options)
    rows = [[of.encode(question(f"Number {n}?", *sizes, seed=n), answer("four"))] for n in range(4)]
    shape = smallest_shape(rows, 8, of.processor.rules.patch_sizes.window)
    alone = np.asarray(hidden_states(model, batch_of(of, rows, shape)))
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))

    def load(span: range) -> Batch:
        return batch_of(of, rows[span.start : span.stop], shape._replace(rows=len(span)))

    with use_mesh(mesh):
        found = hidden_states(jax.device_put(model, shardings(model, mesh)), global_batch(load, mesh, len(rows)))
    # The norm behind the gated delta rule enlarges rounding (tests/packing.py).
    assert largest_difference(np.asarray(found), alone) < (2e-5 if of.config.text.delta is None else 1e-4)


@pytest.mark.parametrize("family", WITH_PICTURES)
@pytest.mark.parametrize("size", [(30, 44), (64, 21), (100, 30), (17, 130)], ids=str)
def test_tokens_lie_over_the_part_of_a_picture_that_they_show(family: str, size: tuple[int, int]) -> None:
    """Light on the tokens that show a white place of a black picture lies on that place, however pictures are cropped,
    padded and cut into tiles."""
    of = small(family, ModelOptions())
    height, width = size
    place = (int(width * 0.44), int(height * 0.36), int(width * 0.78), int(height * 0.7))
    picture = Image.new("RGB", (width, height))
    picture.paste((255, 255, 255), place)
    text = {"type": "text", "text": "Where?"}
    example = of.encode({"role": "user", "content": [{"type": "image", "image": picture}, text]})
    found = over_picture(example.info, brightness(of, example)[None, None], example.shown)
    assert found is not None
    look, box = Look(found), relative_box(place, width, height)
    # Half a token is as near as a grid of few tokens tells, and filters blur.
    rows, cols = found.shape[-2:]
    around = (box[0] - 1 / cols, box[1] - 1 / rows, box[2] + 1 / cols, box[3] + 1 / rows)
    assert look.in_box(around) > 0.9
    lit = look.heat()
    centre = [float((lit.sum(axis) * (np.arange(n) + 0.5)).sum() / n) for axis, n in ((0, cols), (1, rows))]
    # Of a picture that is cropped, what is left of the place.
    left = np.clip(np.reshape(box, (2, 2)), *np.reshape(seen_of(example), (2, 2)))
    middle = left.mean(0)
    assert abs(centre[0] - middle[0]) < 0.75 / cols and abs(centre[1] - middle[1]) < 0.75 / rows, (centre, middle)
    # A knock-out hides what shows a place by the same rule: without the blocks around it, no light is left.
    blocks = blocks_of(example.info, example.shown)
    assert blocks is not None
    near = (box[0] - 0.5 / cols, box[1] - 0.5 / rows, box[2] + 0.5 / cols, box[3] + 0.5 / rows)
    hidden = blocks.shows[coverage(near, (blocks.rows, blocks.cols)).ravel() > 0].any(0)
    light = brightness(of, example) * blocks.shows.any(0)
    assert light[~hidden].sum() < 0.1 * light.sum()


def seen_of(example: Example) -> tuple[float, ...]:
    """The part of the first picture that its tokens show."""
    boxes = np.array([one.box for one in example.shown if one.box is not None])
    return (*np.clip(boxes[:, :2].min(0), 0, 1), *np.clip(boxes[:, 2:].max(0), 0, 1))


def brightness(of: Small, example: Example) -> np.ndarray:
    """How bright the patches of each visual token are."""
    sizes = of.processor.rules.patch_sizes
    patches = example.patches.pixels.astype(np.float32).mean(-1)
    units = patches.reshape(-1, sizes.merge).mean(-1)
    if sizes.mixed:
        source = example.patches.source
        units = (np.where(source < 0, 0, units[source]) * example.patches.weight).sum(-1)
    return np.where(example.info.kind == Kind.VISUAL, units[example.visual_index], 0)


@pytest.mark.parametrize("family", WITH_PICTURES)
def test_pixels_go_to_the_devices_as_bytes(family: str) -> None:
    """Only the tower makes numbers of them, inside the program, by the mean and the spread of its model."""
    of, mesh = small(family, ModelOptions()), make_mesh(MeshConfig())
    example = of.encode(question("12?", *with_pictures(family)), answer("56"))
    batch = batch_of(of, [[example]])
    given = global_batch(lambda span: batch_of(of, [[example]] * len(span)), mesh, mesh.size).patches
    assert example.patches.pixels.dtype == batch.patches.pixels.dtype == given.pixels.dtype == np.uint8
    model = abstract(of.config, ModelOptions())
    made = jax.make_jaxpr(lambda model, patches: model.embed_images(patches))(model, given)
    inputs = [value.aval for value in made.jaxpr.invars if value.aval.dtype == np.uint8]
    assert [value.shape for value in inputs] == [given.pixels.shape]
    assert all(np.size(constant) < given.pixels.size for constant in made.consts), "pixels are no part of the program"


@pytest.mark.parametrize("family", WITH_PICTURES)
def test_a_family_takes_videos_or_refuses_them(family: str) -> None:
    """Sizes from headers are those of the encoded conversation, a video beside pictures."""
    of, talk = small(family, options_of(family)), [question("And?", (4, 22, 31, 2.0), (30, 44)), answer("none")]
    if family in WITHOUT_VIDEOS:
        with pytest.raises(SampleError, match="the model takes no videos"):
            of.encode(*talk)
        return
    example, size = of.encode(*talk), of.processor.size(talk)
    assert (len(example.tokens), example.patches.length) == (size.tokens, size.patches)

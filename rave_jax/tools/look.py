"""`rave-jax look`: where one answer comes from. What it and its question looked at, and what hiding parts costs it."""

from __future__ import annotations

import argparse
from pathlib import Path

from rave_jax.config import ConfigError
from rave_jax.data.beside import write_whole
from rave_jax.data.collate import BatchShape, round_up
from rave_jax.data.images import read_image
from rave_jax.data.processor import Processor
from rave_jax.data.sample import Example, Sample, SampleError
from rave_jax.evaluation.subject import Answer, ModelSubject
from rave_jax.layout import Box
from rave_jax.look.answer import Map, answer_page
from rave_jax.look.blocks import KnockOut
from rave_jax.look.maps import Look, area, relative_box
from rave_jax.parallel.mesh import MeshConfig, make_mesh
from rave_jax.parallel.rows import row_ways
from rave_jax.tools import source as sources
from rave_jax.tools.request import question

TOKEN_BUCKET = 64
"""Rows are padded to a multiple of it."""


def look(arguments: argparse.Namespace) -> None:
    """Run the command: print what was found, and write the page.

    Raises:
        ConfigError: the flags, the model, the prompt or a picture cannot be used, or the page cannot be written.
    """
    _check_writable(arguments.html)
    number = arguments.picture
    if not 1 <= number <= len(arguments.image):
        raise ConfigError(f"--picture {number}: expected 1 to {len(arguments.image)}, a number of the --image flags")
    pictures = tuple(map(str, arguments.image))
    asked = question(arguments.prompt, pictures)
    evidence = None if arguments.box is None else tuple(arguments.box)
    sample = Sample("--prompt", (asked,), ("",), evidence=evidence, evidence_image=number - 1)
    processor = sources.processor_of(arguments.model)
    prompt = _prompt(processor, sample)
    image = read_image(pictures[number - 1], f"--image {pictures[number - 1]}")
    box = None if sample.evidence is None else _box(sample.evidence, *image.size)
    answer, seen, found = _asked(arguments, processor, sample, prompt)
    if seen is None:
        raise ConfigError(f"{arguments.model}: the prompt has no tokens that show picture {number}")
    maps = maps_of(seen, found, box)
    notes = [f"{seen.on_picture:.1%} of the answer's attention is on the picture."]
    if found is None:
        notes.append("Nothing was hidden: the answer is empty, or the model has layers with the gated delta rule.")
    else:
        notes.append(f"Hidden from all text, the picture costs the answer {found.whole:.2f} nats.")
    print(answer.text)
    for line in (*notes, *(f"{one.name}: {one.note}" for one in maps)):
        print(line)
    _write(arguments.html, answer_page(arguments.prompt, answer.text, image, box, maps, notes))
    print(arguments.html)


def _asked(
    arguments: argparse.Namespace, processor: Processor, sample: Sample, prompt: Example
) -> tuple[Answer, Look | None, KnockOut | None]:
    """What the model answers, and where that comes from; no knock-out of an empty answer or in a model with layers that
    keep a state, from which nothing can be hidden."""
    changes: dict[str, object] = {}
    if arguments.dtype is not None:
        changes = {"param_dtype": arguments.dtype, "compute_dtype": arguments.dtype}
    model, _, mesh, _ = sources.load(arguments.model, changes=changes)
    mesh = make_mesh(MeshConfig()) if mesh is None else mesh
    tokens = round_up(len(prompt.tokens), TOKEN_BUCKET)
    patches = round_up(prompt.patches.length, processor.rules.patch_sizes.window)
    shape = BatchShape(round_up(arguments.rows, row_ways(mesh)), tokens, patches)
    subject = ModelSubject(model, processor, mesh, shape, arguments.max_new_tokens)
    (answer,) = subject.answer([sample])
    if isinstance(answer, SampleError):
        raise ConfigError(str(answer)) from answer
    (seen,) = subject.look([sample], [answer])
    text = model.config.text
    if len(text.attention_layers) < text.num_layers:
        return answer, seen, None
    (found,) = subject.knock_out([sample], [answer], arguments.blocks)
    return answer, seen, found


def maps_of(seen: Look, hidden: KnockOut | None, box: Box | None) -> list[Map]:
    """The maps of one answer, each with its share in the box."""

    def against(share: float) -> str:
        if box is None:
            return ""
        return f"{share:.1%} in the box, whose area is {area(box):.1%} ({share / max(area(box), 1e-9):.2f} x uniform)"

    def share(of: Look | KnockOut) -> float:
        if box is None:
            return 0.0
        return of.in_box(box) if isinstance(of, Look) else of.in_box(box) / max(float(of.loss.sum()), 1e-30)

    found = (
        ("attention of the answer", seen),
        ("attention of the question", seen.of_question),
        ("what hiding a part costs", hidden),
    )
    return [Map(name, one.times_even(), against(share(one))) for name, one in found if one is not None]


def _prompt(processor: Processor, sample: Sample) -> Example:
    """Before the weights are read, which may take minutes."""
    try:
        return processor.encode(sample.prompt, add_generation_prompt=True, name=sample.id)
    except SampleError as error:
        raise ConfigError(str(error)) from error


def _box(box: tuple[float, ...], width: int, height: int) -> Box:
    x1, y1, x2, y2 = box
    if not (0 <= x1 < x2 <= width and 0 <= y1 < y2 <= height):
        given = " ".join(f"{side:g}" for side in box)
        raise ConfigError(f"--box {given}: expected X1 Y1 X2 Y2 with 0 <= X1 < X2 <= {width}, 0 <= Y1 < Y2 <= {height}")
    return relative_box((x1, y1, x2, y2), width, height)


def _check_writable(path: Path) -> None:
    if path.is_dir():
        raise ConfigError(f"--html {path}: it is a directory, expected the name of a file")
    if not path.parent.is_dir():
        raise ConfigError(f"--html {path}: there is no folder {path.parent}: make it first")


def _write(path: Path, text: str) -> None:
    try:
        write_whole(path, lambda file: file.write(text.encode("utf-8", "backslashreplace")))
        path.chmod(0o644)
    except OSError as error:
        raise ConfigError(f"--html {path}: cannot be written: {error.strerror or error}") from error

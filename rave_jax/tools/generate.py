"""`rave-jax generate`: answers of a model to a prompt, to a file of requests, or in a conversation."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from rave_jax.config import ConfigError
from rave_jax.data.processor import Processor
from rave_jax.data.sample import SampleError
from rave_jax.inference import Generator, Request, Sampling, SlotConfig
from rave_jax.tools import source as sources
from rave_jax.tools.answer import show
from rave_jax.tools.chat import chat
from rave_jax.tools.flags import add_fields, given_fields
from rave_jax.tools.folder import PictureFolder
from rave_jax.tools.jsonl import answer_file
from rave_jax.tools.request import question

SIZES = (
    "max_length",
    "max_text",
    "max_kept",
    "slots",
    "cache",
    "chunk",
    "regions_in",
    "max_stop_ids",
    "request_timeout",
)
SOME_REFUSED = 1
"""Exit code of a file of requests, or a conversation, of which some could not be answered."""


def add_flags(parser: argparse.ArgumentParser) -> None:
    """How tokens are chosen and how large the slots are."""
    add_fields(parser, Sampling, "how an answer is sampled and when it ends; fields of a request override these")
    default = f"default: {SlotConfig.slots} with --requests, else 1"
    add_fields(parser, SlotConfig, "sizes", SIZES, notes={"slots": default})


def generate(arguments: argparse.Namespace) -> int:
    """Run the command; returns its exit code.

    Raises:
        ConfigError: the flags, the model, the prompt or a file cannot be used.
    """
    _check(arguments)
    sampling = Sampling(**given_fields(arguments, Sampling))
    sizes: dict[str, Any] = given_fields(arguments, SlotConfig)
    if arguments.requests is None:
        sizes = {"slots": 1} | sizes
    slots = SlotConfig(**sizes)
    processor = sources.processor_of(arguments.model, arguments.special_tokens_in_text)

    def generator() -> Generator:
        return load(arguments.model, processor, slots, arguments.dtype)

    if arguments.requests is not None:
        tally = answer_file(
            arguments.requests, arguments.out, sampling, generator, arguments.verbose, arguments.image_dir
        )
        return SOME_REFUSED if tally.refused else 0
    system = [] if arguments.system is None else [{"role": "system", "content": arguments.system}]
    pictures, videos = tuple(map(str, arguments.image)), tuple(map(str, arguments.video))
    if arguments.interactive:
        folder = PictureFolder.of(Path(), arguments.image_dir)
        whole = chat(generator, sampling, folder, system, pictures, arguments.prompt, arguments.verbose)
        return 0 if whole else SOME_REFUSED
    request = Request([*system, question(arguments.prompt, pictures, videos)], sampling, "--prompt")
    try:
        # Before the weights are read, which may take minutes.
        processor.encode(request.messages, add_generation_prompt=True, name=request.name)
    except SampleError as error:
        raise ConfigError(str(error)) from error
    show(generator().stream([request]), arguments.verbose)
    return 0


def _check(arguments: argparse.Namespace) -> None:
    """Which flags go together."""
    lines = arguments.requests is not None
    if lines:
        having = {
            "--prompt": arguments.prompt is not None,
            "--interactive": arguments.interactive,
            "--image": bool(arguments.image),
            "--video": bool(arguments.video),
            "--system": arguments.system is not None,
        }
        for flag in (flag for flag, given in having.items() if given):
            raise ConfigError(f"{flag} cannot be used with --requests, whose lines have their own messages")
    elif arguments.out is not None:
        raise ConfigError("--out needs --requests; an answer to --prompt goes to stdout")
    elif arguments.prompt is None and not arguments.interactive:
        raise ConfigError("there is no question: give --prompt TEXT, --requests FILE or --interactive")
    elif arguments.interactive and arguments.video:
        raise ConfigError("--video cannot be used with --interactive: give --prompt, or a video in --requests")
    elif arguments.image_dir is not None and not arguments.interactive:
        raise ConfigError("--image-dir needs --requests or --interactive; --image FILE may be anywhere")


def load(path: Path, processor: Processor, sizes: SlotConfig, dtype: str | None = None) -> Generator:
    """A generator for the model of a path.

    Args:
        path: HuggingFace directory, native checkpoint or run directory.
        processor: of the model.
        sizes: of the slots.
        dtype: number type of parameters and activations; None is that of the model's options.

    Raises:
        ConfigError: it cannot be read.
        StoreError: a checkpoint of a run cannot be read.
    """
    source = sources.load(path, changes=sources.for_generation(path, dtype))
    return sources.generator_of(source.model, processor, sizes, source.mesh)

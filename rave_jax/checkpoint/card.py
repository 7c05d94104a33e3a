"""What an export says of itself: README.md (a model card), a key in config.json, and lines for the terminal.

transformers computes the backbone that a HuggingFace directory holds, and nothing that `rave_jax` adds to it. It keeps
and ignores config keys that it does not know, and so the export says there what is missing.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rave_jax import config as configs
from rave_jax.checkpoint.hf_files import SIDECAR, SIDECAR_JSON, STATED_KEY
from rave_jax.models.config import Lora, ModelOptions

LoraForm = Literal["merge", "peft", "beside"]
"""How an export holds LoRA: merged into the weights, as a PEFT adapter directory, or beside the weights that it does
not change, as it was trained."""

README, OTHER_README = "README.md", "BASE_README.md"
MARK = "<!-- written by rave_jax -->"


@dataclass(frozen=True)
class Origin:
    """Where an exported model comes from."""

    base: str = ""
    """The directory whose weights training began with, or ""."""
    run: str = ""
    """What made it: a sentence without its full stop."""


def beyond_backbone(options: ModelOptions) -> list[str]:
    """What of a model transformers does not compute, one phrase each."""
    found = []
    for mechanism in options.mechanisms:
        numbers = mechanism.layers
        listed = ", ".join(map(str, numbers))
        where = "all layers" if numbers == "all" else f"layer{'s' if len(numbers) > 1 else ''} {listed}"
        found.append(f"{type(mechanism).__name__} in {where}")
    if options.context is not None:
        found.append(f"{options.context.count} context tokens behind each picture")
    if options.lora is not None:
        found.append(lora_phrase(options.lora))
    if options.extra_mlp is not None:
        found.append(f"an extra mlp of width {options.extra_mlp.width} in all layers")
    return found


def lora_phrase(lora: Lora) -> str:
    """One phrase that names an adapter."""
    return f"LoRA of rank {lora.rank} on {', '.join(lora.targets)}"


def stated(options: ModelOptions) -> dict[str, Any]:
    """The value of the key in config.json."""
    return {
        "note": f"transformers computes only the backbone; the parts named here are in {SIDECAR_JSON} and {SIDECAR}",
        **{name: configs.to_json(getattr(options, name)) for name in ("mechanisms", "context", "lora", "extra_mlp")},
    }


def notes(options: ModelOptions, lora: Lora | None, form: LoraForm, rounded_to: str | None) -> list[str]:
    """Whole sentences on what became of what transformers does not know.

    Args:
        options: what the export holds beside its weights.
        lora: of the model that is written.
        form: what became of it.
        rounded_to: the number type that merged weights were rounded to, None for float32.
    """
    lines = []
    if lora is not None and form == "merge":
        cast = "" if rounded_to is None else f" and rounded to {rounded_to}"
        lines.append(f"{lora_phrase(lora)} is merged into the weights, in float32{cast}.")
    if lora is not None and form == "peft":
        lines.append(f"{lora_phrase(lora)} is a PEFT adapter; the base model's weights are not in this directory.")
    missing = beyond_backbone(options)
    if missing:
        lines.append(
            f"transformers computes only the backbone, without {'; '.join(missing)}: its answers differ. Load the "
            f"directory with rave_jax, which reads {SIDECAR_JSON} and {SIDECAR}."
        )
    return lines


def model_card(name: str, options: ModelOptions, sentences: list[str], origin: Origin, *, vision: bool) -> str:
    """The text of README.md: YAML front matter, what the model is and how to load it.

    Args:
        name: of the directory.
        options: what the export holds beside its weights.
        sentences: as `notes` gives them.
        origin: where the model comes from.
        vision: does it take pictures?
    """
    missing = bool(beyond_backbone(options))
    front = {
        "library_name": "rave_jax" if missing else "transformers",
        "pipeline_tag": "image-text-to-text" if vision else "text-generation",
        "tags": ["rave_jax", *sorted({type(m).__name__.lower() for m in options.mechanisms})],
    }
    other = "transformers reads only the backbone" if missing else "`from_pretrained` of transformers loads it too"
    how = ["## Load it", f"```bash\nrave-jax generate {name} --prompt ...\n```", f"{other}."]
    return _card(name, front, origin, [*sentences, *how])


def adapter_card(name: str, sentences: list[str], origin: Origin, *, vision: bool) -> str:
    """The text of README.md beside a PEFT adapter; arguments as those of `model_card`."""
    front = {
        "library_name": "peft",
        "pipeline_tag": "image-text-to-text" if vision else "text-generation",
        "tags": ["rave_jax", "lora"],
    }
    loads = (
        f"```bash\nrave-jax convert from-hf {name} native --base BASE\nrave-jax generate native --prompt ...\n```"
        f'\n\nPEFT loads the adapter on its base model: `PeftModel.from_pretrained(base, "{name}")`.'
    )
    return _card(name, front, origin, [*sentences, "## Load it", loads])


def _card(name: str, front: dict[str, Any], origin: Origin, parts: list[str]) -> str:
    if origin.base:
        front |= {"base_model": origin.base}
    # JSON is YAML: a path with a colon in it stays one value.
    rows = [f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in front.items()]
    made = "Written by `rave-jax convert to-hf`."
    if origin.run:
        made += f" {origin.run}" + (f", from the weights of `{origin.base}`." if origin.base else ".")
    return "\n\n".join(["\n".join(["---", *rows, "---"]), MARK, f"# {name}", made, *parts]) + "\n"


def write_card(folder: Path, source: Path | None, text: str) -> None:
    """README.md; that of the model it was made from is kept beside it."""
    previous = None if source is None else source / README
    if previous is not None and previous.is_file():
        other = previous.read_bytes()
        if MARK.encode() not in other:
            (folder / OTHER_README).write_bytes(other)
    (folder / README).write_text(text, encoding="utf-8")


def with_stated(config: dict[str, Any], options: ModelOptions) -> dict[str, Any]:
    """An HF config that says what of the options transformers does not compute, and nothing where there is none."""
    plain = {key: value for key, value in config.items() if key != STATED_KEY}
    return plain | {STATED_KEY: stated(options)} if beyond_backbone(options) else plain

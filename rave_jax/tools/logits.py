"""`rave-jax logits`: the logits of a model for one conversation, for comparison with other implementations."""

from __future__ import annotations

import errno
import os
import tempfile
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from rave_jax.config import ConfigError
from rave_jax.data.chat import SpecialTokens
from rave_jax.data.processor import Processor
from rave_jax.data.sample import SampleError
from rave_jax.inference import NotFinite
from rave_jax.inference.forward import forward
from rave_jax.models.vlm import Vlm
from rave_jax.tools import source as sources
from rave_jax.tools.request import read_request


def write_logits(
    model: Path,
    request: Path,
    out: Path,
    add_generation_prompt: bool = False,
    image_dir: Path | None = None,
    special_tokens_in_text: SpecialTokens | None = None,
) -> None:
    """Write `input_ids` [T] and float32 `logits` [T,V] of a conversation.

    Args:
        model: HuggingFace directory, native checkpoint or run directory.
        request: JSON list of messages in HF chat format; image paths relative to this file, or absolute.
        out: .npz to write.
        add_generation_prompt: end the prompt where an answer would begin.
        image_dir: the folder that pictures must lie below; None is that of the request.
        special_tokens_in_text: as in `sources.processor_of`.

    Raises:
        ConfigError: the model, the request or a picture cannot be used, or `out` cannot be written.
    """
    messages = read_request(request, image_dir)
    processor = sources.processor_of(model, special_tokens_in_text)
    changes = {"param_dtype": "float32", "compute_dtype": "float32"}
    loaded = sources.load(model, changes=changes)
    try:
        ids, values = logits(loaded.model, processor, messages, add_generation_prompt, loaded.mesh)
    except SampleError as error:
        raise ConfigError(f"{request}: {error}") from error
    _write(out, ids, values)
    print(f"{out}: input_ids {list(ids.shape)}, logits {list(values.shape)}")


def logits(
    model: Vlm,
    processor: Processor,
    messages: list[dict[str, Any]],
    add_generation_prompt: bool = False,
    mesh: Mesh | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Token ids [T] and float32 logits [T,V] of a conversation, at highest matmul precision.

    Raises:
        SampleError: a message or a picture that cannot be used.
        OverBudget: more tokens than the model has positions; nothing is computed then.
        NotFinite: a logit is NaN or infinite.
    """
    with jax.default_matmul_precision("highest"):
        done = forward(model, processor, messages, mesh=mesh, add_generation_prompt=add_generation_prompt)
    ids, found = done.tokens, np.asarray(done.logits, np.float32)
    (broken,) = np.nonzero(~np.isfinite(found).all(axis=1))
    if len(broken):
        raise NotFinite(
            f"the logits of {len(broken)} of {len(ids)} positions are NaN or infinite, first at position {broken[0]} "
            f"(token id {ids[broken[0]]}): look for NaN in the checkpoint's weights"
        )
    return ids, found


def _write(out: Path, ids: np.ndarray, values: np.ndarray) -> None:
    """All or nothing: the file appears under its name when it is complete."""
    out = out.resolve()
    if out.exists() and not out.is_file():
        raise ConfigError(f"cannot write {out}: it exists and is not a file")
    part = None
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=out.parent, prefix=f".{out.name}.", delete=False) as file:
            part = Path(file.name)
            np.savez(file, input_ids=ids, logits=values)
        part.chmod(0o644)
        part.replace(out)
    except OSError as error:
        if part is not None:
            part.unlink(missing_ok=True)
        raise ConfigError(f"cannot write {out}: {error.strerror or os.strerror(error.errno or errno.EIO)}") from error

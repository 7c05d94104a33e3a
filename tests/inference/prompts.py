"""Prompts for the engine, laid out by hand, and the oracle: a whole forward pass over prompt and answer."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np

from rave_jax.batch import Kind, Patches, Role, TokenInfo
from rave_jax.data.layout import lay_out
from rave_jax.data.sample import Example
from rave_jax.families.config import VlmConfig
from rave_jax.layout import VisualLayout
from rave_jax.models.vlm import Vlm
from tests.models.layout import Document, batch


def example_of(doc: Document, config: VlmConfig, layout: VisualLayout | None = None) -> Example:
    """The document as the processor would give it; its context tokens are in it already."""
    T, P = len(doc.tokens), len(doc.patches)
    row: Any = batch([[doc]], config, T, P)
    info = TokenInfo(*(code[0] for code in row.info))
    example = Example(
        tokens=row.tokens[0],
        loss_mask=np.zeros(T, np.float32),
        info=info,
        positions=row.positions[:, 0],
        visual_index=row.visual_index[0],
        patches=Patches(*(x[0] for x in row.patches)),
    )
    return lay_out(example, dataclasses.replace(layout or VisualLayout(), context=None))


def with_answer(prompt: Document, answer: list[int]) -> Document:
    """The prompt with answer tokens after it, written out by hand."""
    after = max(max(p) for p in prompt.positions) + 1
    start = len(prompt.tokens)
    codes = [{"kind": Kind.TEXT, "role": Role.RESPONSE, "turn": 1, "offset": start + i} for i in range(len(answer))]
    return Document(
        tokens=prompt.tokens + answer,
        codes=prompt.codes + codes,
        positions=prompt.positions + [(after + i,) * 3 for i in range(len(answer))],
        units=prompt.units + [0] * len(answer),
        patches=prompt.patches,
        frame=prompt.frame,
        place=prompt.place,
        window=prompt.window,
    )


@jax.jit
def _logits(model: Vlm, whole: Any) -> jax.Array:
    return model.logits(model.hidden(whole))


def whole_forward(model: Vlm, prompts: list[Document], answers: list[list[int]], T: int, P: int) -> list[np.ndarray]:
    """Logits [N,V] that a pass over prompt and answer at once gives where each of the N answer tokens was chosen."""
    documents = [with_answer(p, a) for p, a in zip(prompts, answers, strict=True)]
    whole = batch([[d] for d in documents], model.config, T, P)
    region = np.zeros_like(whole.info.region)
    for row, doc in enumerate(documents):
        region[row, : len(doc.tokens)] = example_of(doc, model.config, model.options.layout).info.region
    whole = whole._replace(info=whole.info._replace(region=region))
    found = np.asarray(_logits(model, whole))
    starts = [len(p.tokens) - 1 for p in prompts]
    return [row[s : s + len(a)] for row, s, a in zip(found, starts, answers, strict=True)]

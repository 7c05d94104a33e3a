"""Batches for model tests, laid out here by plain loops over the rules of `rave_jax.batch`.

Written apart from the library's own data code on purpose: when both agree with transformers, neither is wrong.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from rave_jax.batch import Batch, Kind, Patches, Role, TokenInfo
from rave_jax.families.config import VlmConfig
from rave_jax.families.shared.grids.config import GridTowerConfig
from rave_jax.layout import ContextTokens


@dataclass(frozen=True)
class Visual:
    """An image (t = 1) or video; the grid counts patches, frames counted in temporal patches."""

    t: int
    h: int
    w: int
    video: bool = False
    seconds: float = 1.0


@dataclass
class Document:
    """One document: per-token lists, patches in our order, and what transformers wants."""

    tokens: list[int] = field(default_factory=list)
    codes: list[dict[str, int]] = field(default_factory=list)
    positions: list[tuple[int, int, int]] = field(default_factory=list)
    units: list[int] = field(default_factory=list)
    patches: list[np.ndarray] = field(default_factory=list)
    frame: list[int] = field(default_factory=list)
    place: list[tuple[int, int]] = field(default_factory=list)
    window: list[int] = field(default_factory=list)
    hf_pixels: dict[str, list[np.ndarray]] = field(default_factory=lambda: {"image": [], "video": []})
    hf_grids: dict[str, list[tuple[int, int, int]]] = field(default_factory=lambda: {"image": [], "video": []})
    hf_seconds: list[float] = field(default_factory=list)


def document(
    parts: list[int | Visual], config: VlmConfig, rng: np.random.Generator, context: ContextTokens | None = None
) -> Document:
    """A document of text runs (their lengths) and pictures, with random tokens and pixels, and context tokens behind
    each frame or picture."""
    doc, position, image = Document(), 0, 0
    for part in parts:
        if isinstance(part, int):
            for _ in range(part):
                doc.tokens.append(int(rng.integers(0, config.text.vocab_size - 6)))
                doc.codes.append({"kind": Kind.TEXT, "role": Role.QUESTION, "turn": 1})
                doc.positions.append((position,) * 3)
                doc.units.append(0)
                position += 1
            continue
        assert config.vision is not None
        image += 1
        m = config.vision.merge_size
        unit_of = _add_patches(doc, part, config.vision, rng)
        grid = {"grid_t": part.t, "grid_h": part.h // m, "grid_w": part.w // m}
        step = config.tokens_per_second * part.seconds if part.video else 1
        behind = position + max(part.h // m, part.w // m, int((part.t - 1) * step) + 1)
        count = 0 if context is None else context.count
        said = {"role": Role.QUESTION, "turn": 1, "image": image, **grid}
        for t in range(part.t):
            time = position + int(t * step)
            for row, col in np.ndindex(part.h // m, part.w // m):
                doc.codes.append({"kind": Kind.VISUAL, "frame": t, "row": row, "col": col, **said})
                doc.positions.append((time, position + row, position + col))
                doc.units.append(unit_of[t, row, col])
            if context is not None and (context.per == "frame" or t == part.t - 1):
                for n in range(count):
                    doc.codes.append({"kind": Kind.CONTEXT, "frame": t, "row": n, "col": 0, **said})
                    doc.positions.append((time, behind + n, behind + n))
                    doc.units.append(0)
        placeholder = config.video_token_id if part.video else config.image_token_id
        doc.tokens += [placeholder] * (len(doc.codes) - len(doc.tokens))
        position = behind + count
    for place, code in enumerate(doc.codes):
        code["offset"] = place
    return doc


def _add_patches(doc: Document, visual: Visual, vision: GridTowerConfig, rng: np.random.Generator) -> dict:
    """Add a picture's patches window by window; returns which merge unit of the document each token's place is."""
    m = vision.merge_size
    side = max(visual.h, visual.w) if vision.window_units is None else vision.window_units * m
    pixels = rng.integers(0, 256, (visual.t, visual.h, visual.w, vision.patch_width), dtype=np.uint8)
    kind = "video" if visual.video else "image"
    raster = [
        pixels[t, row * m + i, col * m + j]
        for t, row, col in np.ndindex(visual.t, visual.h // m, visual.w // m)
        for i, j in np.ndindex(m, m)
    ]
    doc.hf_pixels[kind].append(np.stack(raster))
    doc.hf_grids[kind].append((visual.t, visual.h, visual.w))
    if visual.video:
        doc.hf_seconds.append(visual.seconds)
    unit_of = {}
    for t in range(visual.t):
        frame = max(doc.frame, default=0) + 1
        for top in range(0, visual.h, side):
            for left in range(0, visual.w, side):
                window = max(doc.window, default=0) + 1
                for row in range(top, min(top + side, visual.h), m):
                    for col in range(left, min(left + side, visual.w), m):
                        unit_of[t, row // m, col // m] = len(doc.patches) // m**2
                        for i, j in np.ndindex(m, m):
                            doc.patches.append(pixels[t, row + i, col + j])
                            doc.place.append((row + i, col + j))
                            doc.frame.append(frame)
                            doc.window.append(window)
    return unit_of


def batch(rows: list[list[Document]], config: VlmConfig, tokens: int, patches: int) -> Batch:
    """Rows of packed documents, padded on the right to `tokens` and `patches`."""
    made = [_row(documents, config, tokens, patches) for documents in rows]
    first = made[0]
    stacked = {name: np.stack([row[name] for row in made]) for name in first}
    stacked["positions"] = np.moveaxis(stacked["positions"], 0, 1)
    info = TokenInfo(**{name: stacked.pop(name) for name in TokenInfo._fields})
    patches = Patches(**{name: stacked.pop(f"patch_{name}") for name in Patches._fields})
    return Batch(info=info, patches=patches, **stacked)


def _row(documents: list[Document], config: VlmConfig, T: int, P: int) -> dict[str, np.ndarray]:
    C = 0 if config.vision is None else config.vision.patch_width
    unit = 1 if config.vision is None else config.vision.merge_unit
    row = {name: np.zeros(T, np.int32) for name in (*TokenInfo._fields, "tokens", "targets", "visual_index")}
    row |= {"loss_weights": np.zeros(T, np.float32), "positions": np.zeros((3, T), np.int32)}
    row |= {"patch_pixels": np.zeros((P, C), np.uint8), "patch_place": np.zeros((P, 2), np.int32)}
    row |= {name: np.zeros(P, np.int32) for name in ("patch_frame", "patch_window")}
    row |= {"patch_source": np.zeros((0, 0), np.int32), "patch_weight": np.zeros((0, 0), np.float32)}
    token = patch = frame = window = images = 0
    for number, doc in enumerate(documents, 1):
        n, p = len(doc.tokens), len(doc.patches)
        assert token + n <= T and patch + p <= P, "the test's own shape is too small"
        here, there = slice(token, token + n), slice(patch, patch + p)
        row["tokens"][here], row["positions"][:, here], row["document"][here] = (
            doc.tokens,
            np.array(doc.positions).T,
            number,
        )
        row["targets"][token : token + n - 1] = doc.tokens[1:]
        row["loss_weights"][token : token + n - 1] = 1
        for i, code in enumerate(doc.codes):
            for name, value in code.items():
                row[name][token + i] = value + (images if name == "image" and value else 0)
            if code["kind"] == Kind.VISUAL:
                row["visual_index"][token + i] = doc.units[i] + patch // unit
        if p:
            row["patch_pixels"][there], row["patch_place"][there] = np.stack(doc.patches), doc.place
            row["patch_frame"][there] = np.array(doc.frame) + frame
            row["patch_window"][there] = np.array(doc.window) + window
            frame, window = frame + max(doc.frame), window + max(doc.window)
        images += max((code.get("image", 0) for code in doc.codes), default=0)
        token, patch = token + n, patch + p
    return row

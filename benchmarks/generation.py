"""Generation with slots against transformers + torch on one CPU, or one GPU: a 43 M Qwen2.5-VL shape, greedy.

Three loads. `one`: a prompt alone. `eight`: eight prompts of one length with answers of one length. `mixed`: 48
requests whose prompts, pictures and answers differ, as they come to a server; transformers takes them in batches of
eight in the order they come, padded on the left, and each batch runs to its longest answer. Tokens that nobody asked
for do not count. Each round times one call of ours and one of theirs; ratios are medians over rounds, above 1 when we
are faster. Both sides hold and compute in the same number type, float32 and then bfloat16. 100 mixed requests on fresh
slots count compilations and how full the slots were. Where jax has a GPU, both sides are on it, transformers with the
quickest of its attentions; torch there needs CUDA. Without one a row says that this is unmeasured.

    RAVE_JAX_TORCH_PYTHON=/path/to/python-with-torch python benchmarks/generation.py [--json FILE] [--rounds 5]
        [--dtypes float32 bfloat16]
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import tempfile
from pathlib import Path
from typing import Any, NamedTuple, get_args

import jax
import numpy as np
from small_vlm import (
    IMAGE,
    SEED,
    Prompt,
    TorchSide,
    compare,
    our_model,
    prompt,
)

from rave_jax.inference import Engine, Sampling, SlotConfig
from rave_jax.inference.slots import compilations
from rave_jax.models.config import FloatName
from rave_jax.models.vlm import Vlm

SLOTS = 8
SIZES = SlotConfig(slots=SLOTS, max_length=512, chunk=256, smallest=64, prefill_rows=1, decode_steps=16)


class Asked(NamedTuple):
    """A prompt, and how many tokens its answer has."""

    prompt: Prompt
    new_tokens: int


def mixed(rng: np.random.Generator, count: int) -> list[Asked]:
    """Requests of all kinds: 0 to 2 pictures of 112 or 224 pixels, 20 to 250 tokens, answers of 4 to 96."""
    asked = []
    for _ in range(count):
        sides = rng.choice([112, 224], rng.integers(0, 3)).tolist()
        visual = sum((side // 28) ** 2 + 2 for side in sides)
        asked.append(Asked(prompt(rng, int(rng.integers(20, 90)) + visual, sides), int(rng.integers(4, 97))))
    return asked


def loads() -> dict[str, list[Asked]]:
    """All loads by name."""
    rng = np.random.default_rng(SEED)
    alike = [Asked(prompt(rng, 128, [224]), 64) for _ in range(SLOTS)]
    return {"one": alike[:1], "eight": alike, "mixed": mixed(rng, 48)}


def padded(batch: list[Asked]) -> dict[str, np.ndarray]:
    """What transformers' generate takes: prompts padded on the left, pixels of all pictures end to end."""
    width = max(len(asked.prompt.input_ids) for asked in batch)
    ids = np.zeros((len(batch), width), np.int64)
    mask = np.zeros_like(ids)
    for row, asked in enumerate(batch):
        start = width - len(asked.prompt.input_ids)
        ids[row, start:], mask[row, start:] = asked.prompt.input_ids, 1
    arrays = {"input_ids": ids, "attention_mask": mask, "mm_token_type_ids": (ids == IMAGE).astype(np.int64)}
    for name in ("pixel_values", "image_grid_thw"):
        found = [value for asked in batch if (value := getattr(asked.prompt, name)) is not None]
        arrays |= {name: np.concatenate(found)} if found else {}
    return arrays


def engine(model: Vlm, sizes: SlotConfig) -> Engine:
    """Slots without stop ids: every answer has the length it is asked for."""
    return Engine(model, sizes, ())


def answer(slots: Engine, asked: list[Asked]) -> None:
    """All answers, whole."""
    for one in asked:
        slots.submit(one.prompt.ours, Sampling(one.new_tokens))
    given = 0
    while slots.running or slots.waiting:
        given += sum(len(progress.tokens) for progress in slots.step())
    assert given == sum(one.new_tokens for one in asked)


def measure(rounds: int, dtype: FloatName, counted: bool) -> list[dict[str, Any]]:
    """Rows of the result.

    Args:
        rounds: timed for each load.
        dtype: of both sides' parameters, and what they compute in.
        counted: whether compilations and occupancy, the same in every number type, are counted too.
    """
    all_loads = loads()
    with tempfile.TemporaryDirectory() as folder:
        arrays, steps = {}, {}
        for load, asked in all_loads.items():
            batches = [asked[start : start + SLOTS] for start in range(0, len(asked), SLOTS)]
            steps[load] = [max(one.new_tokens for one in batch) for batch in batches]
            for number, batch in enumerate(batches):
                arrays |= {f"{load}.{number}.{name}": value for name, value in padded(batch).items()}
        np.savez(f"{folder}/inputs.npz", allow_pickle=False, **arrays)
        torch = TorchSide("generation_torch.py", folder, {"loads": steps}, dtype, gpu=True)
        model = our_model(folder, dtype)
        sizes = {
            "one": dataclasses.replace(SIZES, slots=1),
            "eight": dataclasses.replace(SIZES, prefill_rows=SLOTS),
            "mixed": SIZES,
        }
        rows = []
        for load, aim in (("one", 1.0), ("eight", 2.0), ("mixed", 2.0)):
            asked = all_loads[load]
            ours = functools.partial(answer, engine(model, sizes[load]), asked)
            tokens = sum(one.new_tokens for one in asked)
            rows.append(compare(torch, load, ours, tokens=tokens, aim=aim, rounds=rounds, uncounted=1))
        where = torch.where
        torch.close()
    return rows + (count(model, where) if counted else [])


def count(model: Vlm, where: str) -> list[dict[str, Any]]:
    """Compilations and occupancy of 100 mixed requests on slots that no other load has."""
    slots = engine(model, dataclasses.replace(SIZES, slots=SLOTS - 1, decode_steps=15))
    before = compilations()
    answer(slots, mixed(np.random.default_rng(SEED + 1), 100))
    compiled, buckets = compilations() - before, len(slots.usage.programs)
    occupancy = slots.usage.occupancy
    return [
        {
            "name": "compilations over 100 mixed requests",
            "where": where,
            "value": compiled,
            "unit": "programs",
            "aim": f"== {buckets}, the buckets used",
            "holds": compiled == buckets,
        },
        {
            "name": "slot occupancy over the same",
            "where": where,
            "value": round(occupancy, 3),
            "unit": "share of slot steps",
            "aim": ">= 0.9",
            "holds": occupancy >= 0.9,
        },
    ]


def main() -> None:
    """Measure and print; with --json also write the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="file that the rows are written to")
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds per load, after one that is not counted")
    parser.add_argument("--dtypes", nargs="+", choices=get_args(FloatName), default=get_args(FloatName))
    options = parser.parse_args()
    rows = []
    for number, dtype in enumerate(options.dtypes):
        found = measure(options.rounds, dtype, counted=number == 0)
        rows += found
        for row in found:
            print("  ".join(f"{key}={value}" for key, value in row.items()), flush=True)
    if jax.default_backend() != "gpu":
        why = "no GPU here"
        print(f"the same on a GPU: unmeasured, {why}", flush=True)
        row = {"name": "the same on a GPU", "where": why, "value": None, "unit": "ratio", "aim": ">= 1.0 or 2.0"}
        rows.append({**row, "holds": None, "unmeasured": why})
    if options.json:
        options.json.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()

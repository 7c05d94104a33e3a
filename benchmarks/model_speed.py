"""Forward, train step and greedy generation of a 43 M Qwen2.5-VL shape against transformers + torch on one CPU.

Both sides hold the same weights and read the same inputs, in float32, with the same number of threads. Each
round times one call of ours and one of theirs, so that a machine that slows down slows both; the reported ratio
is the median over rounds of theirs / ours, above 1 when we are faster.

    RAVE_JAX_TORCH_PYTHON=/path/to/python-with-torch python benchmarks/model_speed.py [--json FILE] [--rounds 9]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from rave_jax.batch import Batch, Kind, TokenInfo
from rave_jax.checkpoint.hf_import import import_hf
from rave_jax.data.collate import BatchShape, collate
from rave_jax.data.images import PatchGrid, image_patches
from rave_jax.data.positions import Visual, grid_places, mrope_positions
from rave_jax.data.sample import Example
from rave_jax.inference.greedy import generate
from rave_jax.models.config import ModelOptions
from rave_jax.models.vlm import Vlm
from rave_jax.training.objective import chunked_cross_entropy

SEED, ROWS, TOKENS, SIDE, NEW_TOKENS = 0, 4, 128, 224, 32
VOCAB, IMAGE, START, END = 8192, 8000, 8001, 8002
UNUSED = 8003  # an id that greedy decoding may not stop at
CONFIG: dict[str, Any] = {
    "image_token_id": IMAGE,
    "video_token_id": UNUSED,
    "vision_start_token_id": START,
    "vision_end_token_id": END,
    "tie_word_embeddings": False,
    "text_config": {
        "vocab_size": VOCAB,
        "hidden_size": 512,
        "num_hidden_layers": 10,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "intermediate_size": 1408,
        "rope_parameters": {"rope_type": "default", "mrope_section": [8, 12, 12], "rope_theta": 1e6},
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
        "tie_word_embeddings": False,
    },
    "vision_config": {
        "depth": 6,
        "hidden_size": 256,
        "num_heads": 4,
        "intermediate_size": 704,
        "out_hidden_size": 512,
        "fullatt_block_indexes": [2, 5],
    },
}


def documents(rng: np.random.Generator) -> tuple[list[list[Example]], dict[str, np.ndarray]]:
    """The same inputs for both: our examples, and the arrays that transformers takes."""
    grid = PatchGrid(patch=14, temporal=2, merge=2, window=4)
    images = [rng.integers(0, 256, (SIDE, SIDE, 3), np.uint8) for _ in range(ROWS)]
    theirs = Qwen2VLImageProcessorPil()(images=images, return_tensors="np")
    rows, ids = [], []
    for image in images:
        patches = image_patches(image, grid, 56 * 56, SIDE * SIDE)
        visual = len(patches.order)
        tokens = rng.integers(0, 7999, TOKENS).astype(np.int32)
        tokens[16], tokens[17 : 17 + visual], tokens[17 + visual] = START, IMAGE, END
        zeros = np.zeros(TOKENS, np.int32)
        span, index, kind = slice(17, 17 + visual), zeros.copy(), np.full(TOKENS, int(Kind.TEXT), np.int32)
        index[span], kind[span] = patches.order, int(Kind.VISUAL)
        codes: dict[str, Any] = dict.fromkeys(TokenInfo._fields, zeros)
        codes |= {"segment": zeros + 1, "place": np.arange(TOKENS, dtype=np.int32), "kind": kind}
        for name, place in zip(("frame", "row", "col"), grid_places(patches.grid), strict=True):
            codes[name] = zeros.copy()
            codes[name][span] = place
        positions = mrope_positions(TOKENS, [Visual(17, patches.grid)], 2.0)
        layout = (patches.pixels, patches.segment, patches.place, patches.window)
        mask = np.ones(TOKENS, np.float32)
        rows.append([Example(tokens, mask, TokenInfo(**codes), positions, index, *layout)])
        ids.append(tokens)
    input_ids = np.stack(ids).astype(np.int64)
    return rows, {
        "input_ids": input_ids,
        "attention_mask": np.ones_like(input_ids),
        "mm_token_type_ids": (input_ids == IMAGE).astype(np.int64),
        "pixel_values": theirs["pixel_values"],
        "image_grid_thw": theirs["image_grid_thw"],
        "labels": input_ids,
    }


def our_tasks(model: Vlm, batch: Batch) -> dict[str, Callable[[], Any]]:
    """Each task as a function that returns what must be ready when it is done."""
    optimizer = optax.adamw(1e-5, weight_decay=0.01)

    def loss(model: Vlm) -> jax.Array:
        sums = chunked_cross_entropy(model.hidden(batch), model.head_weight(), batch.targets, batch.loss_weights, 128)
        return sums.loss / sums.weight

    @jax.jit
    def forward(model: Vlm) -> jax.Array:
        return model.logits(model.hidden(batch))

    leaves, treedef = jax.tree.flatten(model)

    def train_step(leaves: Any, moments: Any) -> tuple[Any, Any, jax.Array]:
        value, grads = jax.value_and_grad(lambda x: loss(jax.tree.unflatten(treedef, x)))(leaves)
        updates, moments = optimizer.update(grads, moments, leaves)
        return optax.apply_updates(leaves, updates), moments, value

    # The trained copy is donated step by step; the other tasks keep the model they were given.
    state = [*jax.jit(lambda x: (jax.tree.map(jnp.copy, x), optimizer.init(x)))(leaves)]
    train_jit = jax.jit(train_step, donate_argnums=(0, 1))

    def train() -> jax.Array:
        state[0], state[1], value = train_jit(*state)
        return value

    return {
        "forward": lambda: forward(model),
        "train": train,
        "generate": lambda: generate(model, batch, max_new_tokens=NEW_TOKENS, stop_ids=(-1,)).tokens,
    }


def measure(rounds: int) -> list[dict[str, Any]]:
    """Rows of the result: per task the median ratio and both speeds in tokens/s."""
    torch_python = os.environ.get("RAVE_JAX_TORCH_PYTHON")
    if not torch_python:
        raise SystemExit("RAVE_JAX_TORCH_PYTHON is not set: name a Python that has torch and transformers")
    threads = len(os.sched_getaffinity(0))
    rows, arrays = documents(np.random.default_rng(SEED))
    with tempfile.TemporaryDirectory() as folder:
        np.savez(f"{folder}/inputs.npz", allow_pickle=False, **arrays)
        shape = {"config": CONFIG, "seed": SEED, "threads": threads, "new_tokens": NEW_TOKENS}
        Path(folder, "shape.json").write_text(json.dumps(shape))
        command = [torch_python, str(Path(__file__).with_name("model_speed_torch.py")), folder]
        worker = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1)
        assert worker.stdin and worker.stdout
        versions = json.loads(worker.stdout.readline())
        # As a user would on a CPU: nothing is copied out of a stack. Torch keeps its layers apart too.
        model = import_hf(folder, ModelOptions(scan_layers=False), None, jax.random.key(SEED))
        patch_numbers = rows[0][0].patches.shape[1]
        shape_of = BatchShape(ROWS, TOKENS, len(rows[0][0].patches))
        batch = jax.tree.map(jnp.asarray, collate(rows, shape_of, patch_numbers))
        tasks = our_tasks(model, batch)

        def ours(task: str) -> float:
            start = time.perf_counter()
            jax.block_until_ready(tasks[task]())
            return time.perf_counter() - start

        def theirs(task: str) -> float:
            assert worker.stdin and worker.stdout
            print(task, file=worker.stdin, flush=True)
            return float(worker.stdout.readline())

        results = []
        where = f"CPU, {threads} threads, float32, jax {jax.__version__}, torch {versions['torch']}, seed {SEED}"
        for task in tasks:
            tokens = ROWS * (NEW_TOKENS if task == "generate" else TOKENS)
            pairs = [(ours(task), theirs(task)) for _ in range(rounds + 2)][2:]
            ratio = statistics.median(b / a for a, b in pairs)
            speeds = [tokens / statistics.median(column) for column in zip(*pairs, strict=True)]
            results.append(
                {
                    "name": f"{task}: tokens/s against transformers + torch",
                    "where": where,
                    "value": round(ratio, 3),
                    "unit": "ratio",
                    "aim": ">= 1.0",
                    "holds": ratio >= 1.0,
                    "ours_tokens_per_s": round(speeds[0]),
                    "torch_tokens_per_s": round(speeds[1]),
                    "parameters": versions["parameters"],
                }
            )
        worker.stdin.close()
        worker.wait()
    return results


def main() -> None:
    """Measure and print; with --json also write the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="file that the rows are written to")
    parser.add_argument("--rounds", type=int, default=9, help="timed rounds per task, after two that are not counted")
    options = parser.parse_args()
    rows = measure(options.rounds)
    for row in rows:
        print("  ".join(f"{key}={value}" for key, value in row.items()))
    if options.json:
        options.json.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()

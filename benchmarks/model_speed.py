"""Forward, train step and greedy generation of a 43 M Qwen2.5-VL shape against transformers + torch on one CPU.

Both sides hold the same weights and read the same inputs, in float32, with the same number of threads. Each
round times one call of ours and one of theirs, so that a machine that slows down slows both; the reported ratio
is the median over rounds of theirs / ours, above 1 when we are faster.

    RAVE_JAX_TORCH_PYTHON=/path/to/python-with-torch python benchmarks/model_speed.py [--json FILE] [--rounds 9]
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from small_vlm import IMAGE, MERGE_PATCHES, PATCH_NUMBERS, SEED, WINDOW_PATCHES, TorchSide, compare, our_model, prompt

from rave_jax.batch import Batch
from rave_jax.data.collate import BatchShape, collate
from rave_jax.data.sample import Example
from rave_jax.families.config import PatchSizes
from rave_jax.inference import Engine, Sampling, SlotConfig
from rave_jax.models.vlm import Vlm
from rave_jax.training.objective import chunked_cross_entropy

ROWS, TOKENS, SIDE, NEW_TOKENS = 4, 128, 224, 32


def inputs(rng: np.random.Generator) -> tuple[list[Example], dict[str, np.ndarray]]:
    """The same inputs for both: our examples, and the arrays that transformers takes."""
    prompts = [prompt(rng, TOKENS, [SIDE]) for _ in range(ROWS)]
    input_ids = np.stack([p.input_ids for p in prompts])
    return [p.ours for p in prompts], {
        "input_ids": input_ids,
        "attention_mask": np.ones_like(input_ids),
        "mm_token_type_ids": (input_ids == IMAGE).astype(np.int64),
        "pixel_values": np.concatenate([p.pixel_values for p in prompts if p.pixel_values is not None]),
        "image_grid_thw": np.concatenate([p.image_grid_thw for p in prompts if p.image_grid_thw is not None]),
        "labels": input_ids,
    }


def our_generation(model: Vlm, examples: list[Example]) -> Callable[[], int]:
    """Answers of NEW_TOKENS tokens to all prompts at once, through slots."""
    whole = TOKENS + NEW_TOKENS
    sizes = SlotConfig(
        slots=ROWS, max_length=whole, chunk=whole, smallest=TOKENS, prefill_rows=ROWS, decode_steps=NEW_TOKENS
    )
    engine = Engine(model, sizes, ())

    def generate() -> int:
        for example in examples:
            engine.submit(example, Sampling(NEW_TOKENS))
        count = 0
        while engine.running or engine.waiting:
            count += sum(len(progress.tokens) for progress in engine.step())
        assert count == ROWS * NEW_TOKENS
        return count

    return generate


def our_tasks(model: Vlm, batch: Batch, examples: list[Example]) -> dict[str, Callable[[], Any]]:
    """Each task as a function that returns what must be ready when it is done."""
    optimizer = optax.adamw(1e-5, weight_decay=0.01)

    def loss(model: Vlm) -> jax.Array:
        hidden = model.forward(batch).hidden
        sums = chunked_cross_entropy(hidden, model.head_weight(), batch.targets, batch.loss_weights, 128)
        return sums.loss / sums.weight

    @jax.jit
    def forward(model: Vlm) -> jax.Array:
        return model.logits(model.forward(batch).hidden)

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
        "generate": our_generation(model, examples),
    }


def measure(rounds: int) -> list[dict[str, Any]]:
    """Rows of the result: per task the median ratio and both speeds in tokens/s."""
    examples, arrays = inputs(np.random.default_rng(SEED))
    with tempfile.TemporaryDirectory() as folder:
        np.savez(f"{folder}/inputs.npz", allow_pickle=False, **arrays)
        torch = TorchSide("model_speed_torch.py", folder, {"new_tokens": NEW_TOKENS})
        model = our_model(folder)
        shape = BatchShape(ROWS, TOKENS, examples[0].patches.length)
        batch = jax.tree.map(
            jnp.asarray,
            collate(
                [[example] for example in examples], shape, PatchSizes(PATCH_NUMBERS, MERGE_PATCHES, WINDOW_PATCHES)
            ),
        )
        tasks = our_tasks(model, batch, examples)

        results = []
        for task, ours in tasks.items():
            tokens = ROWS * (NEW_TOKENS if task == "generate" else TOKENS)
            results.append(compare(torch, task, ours, tokens=tokens, aim=1.0, rounds=rounds, uncounted=2))
        torch.close()
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

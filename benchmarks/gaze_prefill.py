"""Does a long video fit? Bytes that reading it chunk by chunk takes on a TPU, compiled without one.

Two decoder layers of Qwen2.5-VL 7B in bfloat16 with Gaze, one row, 64 frames of 16 x 20 visual tokens in regions of
8 x 10. The program is that of generation, `inference.programs.prefill`: what a chunk needs beside weights, cache and
results, for chunks of 512 tokens and for the whole prompt at once. The tower is another program.

    python benchmarks/gaze_prefill.py [--chip v5e] [--chunks 512 20992] [--json FILE]
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from rave_jax.attention import Gaze, RegionReach
from rave_jax.batch import TokenInfo
from rave_jax.families.qwen2_5_vl.presets import qwen2_5_vl_7b
from rave_jax.inference.programs import Admission, Chunk, empty_state, prefill
from rave_jax.inference.sampling import RowSampling
from rave_jax.layout import FixedRegions
from rave_jax.models.config import ModelOptions
from rave_jax.models.vlm import Vlm
from rave_jax.tools.tpu import Case, compile_cases

LAYERS, FRAMES, GRID, TEXT = 2, 64, (16, 20), 512
REGIONS = FixedRegions(8, 10)
VISUAL = FRAMES * GRID[0] * GRID[1]
MIB = 2**20


def read_program(place: Any, *, chunk: int) -> tuple[Any, tuple[Any, ...]]:
    """The program that reads the video's last chunk of so many tokens, and what it is given."""
    count = VISUAL // REGIONS.tokens
    config = qwen2_5_vl_7b()
    config = dataclasses.replace(config, text=dataclasses.replace(config.text, num_layers=LAYERS), vision=None)
    gaze = Gaze(REGIONS, max_regions=count, top_k=0.1, share="group")
    options = ModelOptions((gaze,), param_dtype="bfloat16", compute_dtype="bfloat16")
    model = jax.eval_shape(lambda key: Vlm(config, options, key=key), jax.random.key(0))
    state = jax.eval_shape(lambda model: empty_state(model, 1, TEXT, 1, 0, 1, "compute"), model)

    def ints(*shape: int) -> Any:
        return jax.ShapeDtypeStruct(shape, jnp.int32)

    info = TokenInfo(*[ints(1, chunk)] * len(TokenInfo._fields))
    tokens = Chunk(ints(1, chunk), info, ints(3, 1, chunk), ints(1, chunk), ints(1, chunk))
    sampling: RowSampling = jax.tree.map(lambda x: jax.ShapeDtypeStruct((1,), x.dtype), state.sampling)
    row, begins = ints(1), jax.eval_shape(lambda: jnp.zeros(1, bool))
    asked = Admission(row, begins, row, row, row, row, ints(1, 1), sampling)

    def run(model: Any, state: Any, tokens: Chunk, asked: Admission) -> Any:
        return prefill(model, state, tokens, asked, reach=TEXT, regions=RegionReach(count, VISUAL))

    return run, jax.tree.map(lambda x: place(x.shape, x.dtype), (model, state, tokens, asked))


def main() -> None:
    """Compile and print; with --json also write the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chip", default="v5e")
    parser.add_argument("--chunks", type=int, nargs="+", default=[512, VISUAL + TEXT])
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    cases = [Case(str(chunk), "gaze_prefill:read_program", {"chunk": chunk}) for chunk in given.chunks]
    rows = []
    for name, found in compile_cases(given.chip, cases).items():
        if found.memory is None:
            raise SystemExit(f"chunks of {name}: {found.error}")
        rows.append(
            {
                "name": f"temporaries of a chunk of {name} tokens of {VISUAL + TEXT}, {LAYERS} layers",
                "where": f"compiled for {given.chip}",
                "value": round(found.memory.temporaries / MIB, 1),
                "unit": "MiB",
            }
        )
        print(rows[-1], f"compiled in {found.seconds:.0f} s", flush=True)
    if given.json:
        given.json.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()

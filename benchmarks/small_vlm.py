"""What the speed benchmarks share: a 43 M Qwen2.5-VL shape, prompts that both sides can read, the torch worker."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from rave_jax.batch import Kind, TokenInfo
from rave_jax.checkpoint.hf_import import import_hf
from rave_jax.data.images import cut_image
from rave_jax.data.patches import join_patches
from rave_jax.data.sample import Example
from rave_jax.families.config import PatchSizes
from rave_jax.families.pictures import Visual, grid_coordinates
from rave_jax.families.qwen2_5_vl.presets import qwen2_5_vl_7b
from rave_jax.families.shared.grids.pictures import Pictures
from rave_jax.families.shared.grids.positions import mrope_positions
from rave_jax.models.config import FloatName, ModelOptions
from rave_jax.models.vlm import Vlm

SEED = 0
VOCAB, IMAGE, START, END = 8192, 8000, 8001, 8002
UNUSED = 8003  # an id that greedy decoding may not stop at
WINDOW_PATCHES, MERGE_PATCHES, PATCH_NUMBERS = 64, 4, 1176
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


class Prompt(NamedTuple):
    """The same prompt for both: our example, and the arrays that transformers takes (pixels None without pictures)."""

    ours: Example
    input_ids: np.ndarray
    pixel_values: np.ndarray | None
    image_grid_thw: np.ndarray | None


def prompt(rng: np.random.Generator, tokens: int, sides: Sequence[int]) -> Prompt:
    """Random text of `tokens` tokens in all, with a random square picture of each side in it, from token 16 on."""
    images = [rng.integers(0, 256, (side, side, 3), np.uint8) for side in sides]
    ids = rng.integers(0, 7999, tokens).astype(np.int32)
    codes: dict[str, Any] = {name: np.zeros(tokens, np.int32) for name in TokenInfo._fields}
    codes["document"][:], codes["kind"][:], codes["offset"][:] = 1, int(Kind.TEXT), np.arange(tokens)
    index, visuals, cuts, at, units = np.zeros(tokens, np.int32), [], [], 16, 0
    for number, image in enumerate(images, 1):
        cut = cut_image(image, Pictures(qwen2_5_vl_7b(), max_pixels=image.shape[0] ** 2))
        count = len(cut.order)
        span = slice(at + 1, at + 1 + count)
        ids[at], ids[span], ids[span.stop] = START, IMAGE, END
        index[span], codes["kind"][span], codes["image"][span] = cut.order + units, int(Kind.VISUAL), number
        for name, place in zip(("frame", "row", "col"), grid_coordinates(cut.grid), strict=True):
            codes[name][span] = place
        visuals.append(Visual(span.start, cut.grid))
        cuts.append(cut)
        at, units = span.stop + 1, units + count
    assert at <= tokens, "the pictures do not fit"

    example = Example(
        tokens=ids,
        loss_mask=np.ones(tokens, np.float32),
        info=TokenInfo(**codes),
        positions=mrope_positions(tokens, visuals, 2.0),
        visual_index=index,
        patches=join_patches([cut.patches for cut in cuts], PatchSizes(PATCH_NUMBERS, MERGE_PATCHES)),
    )
    theirs = Qwen2VLImageProcessorPil()(images=images, return_tensors="np") if images else {}
    return Prompt(example, ids.astype(np.int64), theirs.get("pixel_values"), theirs.get("image_grid_thw"))


class TorchSide:
    """The same checkpoint in transformers, in a process of its own: `name` asks it to do a task and gives the seconds.

    Args:
        script: of this folder.
        folder: where it makes the checkpoint and finds its inputs.
        shape: what it is told, beside the model's config, seed, number type and threads.
        dtype: number type of its parameters and of what it computes with.
        gpu: can the script compute on a GPU, where jax does?
    """

    def __init__(
        self, script: str, folder: str, shape: dict[str, Any], dtype: FloatName = "float32", gpu: bool = False
    ):
        platform = jax.default_backend()
        if platform not in ("cpu", "gpu") or (platform == "gpu" and not gpu):
            raise SystemExit(f"jax computes on a {platform} and {script} on a CPU: set JAX_PLATFORMS=cpu")
        interpreter = os.environ.get("RAVE_JAX_TORCH_PYTHON")
        if not interpreter:
            raise SystemExit("RAVE_JAX_TORCH_PYTHON is not set: name a Python that has torch and transformers")
        self.threads, self.dtype = len(os.sched_getaffinity(0)), dtype
        device = "cuda" if platform == "gpu" else "cpu"
        told = {"config": CONFIG, "seed": SEED, "threads": self.threads, "dtype": dtype, "device": device, **shape}
        Path(folder, "shape.json").write_text(json.dumps(told))
        # -P: transformers looks for a package `kernels`, and would find the benchmark of that name in this folder.
        command = [interpreter, "-P", str(Path(__file__).with_name(script)), folder]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1)
        self.says = json.loads(self._line())

    def seconds(self, task: str) -> float:
        """Do it once."""
        assert self._process.stdin
        print(task, file=self._process.stdin, flush=True)
        return float(self._line())

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin
        self._process.stdin.close()
        self._process.wait()

    @property
    def where(self) -> str:
        """Machine and versions, for a row of results."""
        device = jax.devices()[0]
        on = f"CPU, {self.threads} threads" if device.platform == "cpu" else device.device_kind
        attention = f", {self.says['attention']}" if "attention" in self.says else ""
        return f"{on}, {self.dtype}, jax {jax.__version__}, torch {self.says['torch']}{attention}, seed {SEED}"

    def _line(self) -> str:
        assert self._process.stdout
        return self._process.stdout.readline()


def compare(
    torch: TorchSide, task: str, ours: Callable[[], Any], *, tokens: int, aim: float, rounds: int, uncounted: int
) -> dict[str, Any]:
    """A row of results: how many times as quick as torch we are, as a median over rounds of one call of each.

    Args:
        torch: does `task`.
        task: its name there.
        ours: the same on our side; returns what must be ready when it is done.
        tokens: of one call.
        aim: least ratio.
        rounds: how many are counted.
        uncounted: rounds before them.
    """

    def seconds() -> float:
        start = time.perf_counter()
        jax.block_until_ready(ours())
        return time.perf_counter() - start

    pairs = [(seconds(), torch.seconds(task)) for _ in range(rounds + uncounted)][uncounted:]
    ratio = statistics.median(theirs / mine for mine, theirs in pairs)
    speeds = [tokens / statistics.median(column) for column in zip(*pairs, strict=True)]
    return {
        "name": f"{task}: tokens/s against transformers + torch",
        "where": torch.where,
        "value": round(ratio, 3),
        "unit": "ratio",
        "aim": f">= {aim}",
        "holds": ratio >= aim,
        "ours_tokens_per_s": round(speeds[0], 1),
        "torch_tokens_per_s": round(speeds[1], 1),
        "parameters": torch.says["parameters"],
    }


def our_model(folder: str, dtype: FloatName = "float32") -> Vlm:
    """The checkpoint in our model, as a user would run it on a CPU: torch keeps its layers apart too."""
    options = ModelOptions(scan_layers=False, param_dtype=dtype, compute_dtype=dtype)
    return import_hf(folder, options, None, jax.random.key(SEED))

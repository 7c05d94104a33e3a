"""The torch side of generation.py: transformers' generate on the same prompts, in batches padded on the left.

Run by generation.py under the interpreter that has torch. Reads one load's name per line, answers with seconds.
"""

from __future__ import annotations

import json
import sys
import time

import numpy as np
import torch
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration


def main(directory: str) -> None:
    """Make the checkpoint in `directory`, say so, then time loads until standard input ends."""
    with open(f"{directory}/shape.json") as file:
        shape = json.load(file)
    torch.set_num_threads(shape["threads"])
    torch.manual_seed(shape["seed"])
    model = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(**shape["config"])).float().eval()
    model.save_pretrained(directory)
    model = model.to(getattr(torch, shape["dtype"]))  # what is saved stays float32, so that ours reads it whole
    arrays = np.load(f"{directory}/inputs.npz")

    def batch(load: str, number: int) -> dict[str, torch.Tensor]:
        start = f"{load}.{number}."
        return {k.removeprefix(start): torch.from_numpy(v) for k, v in arrays.items() if k.startswith(start)}

    loads = {
        load: [(batch(load, number), steps) for number, steps in enumerate(new_tokens)]
        for load, new_tokens in shape["loads"].items()
    }
    parameters = sum(p.numel() for p in model.parameters())
    print(json.dumps({"torch": torch.__version__, "parameters": parameters}), flush=True)
    for line in sys.stdin:
        start = time.perf_counter()
        with torch.inference_mode():
            for inputs, n in loads[line.strip()]:
                out = model.generate(**inputs, max_new_tokens=n, min_new_tokens=n, do_sample=False)
                assert out.shape[1] == inputs["input_ids"].shape[1] + n
        print(time.perf_counter() - start, flush=True)


if __name__ == "__main__":
    main(sys.argv[1])

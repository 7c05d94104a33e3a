"""The torch side of model_speed.py: the same model and inputs in transformers, timed on request.

Run by model_speed.py under the interpreter that has torch. Reads one task name per line, answers with seconds.
"""

from __future__ import annotations

import json
import sys
import time

import numpy as np
import torch
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration


def main(directory: str) -> None:
    """Make the checkpoint in `directory`, say so, then time tasks until standard input ends."""
    with open(f"{directory}/shape.json") as file:
        shape = json.load(file)
    torch.set_num_threads(shape["threads"])
    torch.manual_seed(shape["seed"])
    config = Qwen2_5_VLConfig(**shape["config"])
    model = Qwen2_5_VLForConditionalGeneration(config).float().eval()
    model.save_pretrained(directory)
    inputs = {k: torch.from_numpy(v) for k, v in np.load(f"{directory}/inputs.npz").items()}
    prompt = {k: v for k, v in inputs.items() if k != "labels"}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)

    def forward() -> None:
        with torch.inference_mode():
            model(**prompt)

    def train() -> None:
        model(**inputs).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def generate() -> None:
        n = shape["new_tokens"]
        with torch.inference_mode():
            out = model.generate(**prompt, max_new_tokens=n, min_new_tokens=n, do_sample=False)
        assert out.shape[1] == prompt["input_ids"].shape[1] + n

    tasks = {"forward": forward, "train": train, "generate": generate}
    parameters = sum(p.numel() for p in model.parameters())
    print(json.dumps({"torch": torch.__version__, "parameters": parameters}), flush=True)
    for line in sys.stdin:
        start = time.perf_counter()
        tasks[line.strip()]()
        print(time.perf_counter() - start, flush=True)


if __name__ == "__main__":
    main(sys.argv[1])

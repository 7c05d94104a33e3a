"""The torch side of generation.py: transformers' generate on the same prompts, in batches padded on the left.

Run by generation.py under the interpreter that has torch, on a CPU or a GPU as that says. On a GPU it takes the
quickest of transformers' attentions. Reads one load's name per line, answers with seconds.
"""

from __future__ import annotations

import importlib.util
import json
import sys
import time
from collections.abc import Callable, Sequence

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
    # What is saved stays float32, so that ours reads it whole.
    model = model.to(shape["device"], getattr(torch, shape["dtype"]))
    arrays = np.load(f"{directory}/inputs.npz")

    def batch(load: str, number: int) -> dict[str, torch.Tensor]:
        start = f"{load}.{number}."
        mine = {k.removeprefix(start): torch.from_numpy(v) for k, v in arrays.items() if k.startswith(start)}
        return {name: value.to(shape["device"]) for name, value in mine.items()}

    loads = {
        load: [(batch(load, number), steps) for number, steps in enumerate(new_tokens)]
        for load, new_tokens in shape["loads"].items()
    }

    def seconds(load: str) -> float:
        start = time.perf_counter()
        with torch.inference_mode():
            for inputs, n in loads[load]:
                out = model.generate(**inputs, max_new_tokens=n, min_new_tokens=n, do_sample=False)
                assert out.shape[1] == inputs["input_ids"].shape[1] + n
        if shape["device"] == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    says = {"torch": torch.__version__, "parameters": sum(p.numel() for p in model.parameters())}
    attention = {}
    if shape["device"] == "cuda":
        torch.set_float32_matmul_precision("high")  # what XLA takes for float32 on a GPU unless told otherwise
        flash = shape["dtype"] != "float32" and importlib.util.find_spec("flash_attn")
        names = ("eager", "sdpa", *(["flash_attention_2"] if flash else []))
        attention = {load: quickest(model.set_attn_implementation, names, lambda x=load: seconds(x)) for load in loads}
        says["attention"] = ", ".join(f"{name} for {load}" for load, name in attention.items())
    print(json.dumps(says), flush=True)
    for line in sys.stdin:
        load = line.strip()
        if load in attention:
            model.set_attn_implementation(attention[load])
        print(seconds(load), flush=True)


def quickest(choose: Callable[[str], object], names: Sequence[str], seconds: Callable[[], float]) -> str:
    """The name whose second run takes least."""
    taken = {}
    for name in names:
        choose(name)
        seconds()
        taken[name] = seconds()
    return min(taken, key=taken.__getitem__)


if __name__ == "__main__":
    main(sys.argv[1])

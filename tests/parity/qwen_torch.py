"""The torch side of the parity tests: random checkpoints by transformers, and what it computes with them.

    python qwen_torch.py FOLDER

FOLDER/cases.json lists cases {name, model: "vlm" | "text", config, seed, attention}; FOLDER/NAME.npz holds the inputs.
Writes the checkpoint to FOLDER/NAME/ and the logits to FOLDER/NAME.out.npz.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3Config,
    Qwen3ForCausalLM,
)

MODELS = {"vlm": (Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration), "text": (Qwen3Config, Qwen3ForCausalLM)}


def randomise(model: torch.nn.Module, seed: int) -> None:
    """Weights large enough, and norms and biases far enough from their start, that every term shows in the logits."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim > 1:
                parameter.copy_(noise / parameter[0].numel() ** 0.5)
            else:
                parameter.copy_(0.3 * noise + (0 if name.endswith("bias") else 1))


def run(folder: Path, case: dict) -> None:
    config_class, model_class = MODELS[case["model"]]
    config = config_class(**case["config"])
    config._attn_implementation = case["attention"]
    model = model_class(config).eval()
    randomise(model, case["seed"])
    model.save_pretrained(folder / case["name"])
    inputs = {name: torch.from_numpy(value) for name, value in np.load(folder / f"{case['name']}.npz").items()}
    with torch.no_grad():
        logits = model(**inputs, use_cache=False).logits
    np.savez(folder / f"{case['name']}.out.npz", logits=logits.float().numpy())


if __name__ == "__main__":
    torch.manual_seed(0)
    folder = Path(sys.argv[1])
    for case in json.loads((folder / "cases.json").read_text()):
        run(folder, case)

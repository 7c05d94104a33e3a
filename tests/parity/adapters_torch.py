"""The torch side of test_adapters: adapters of experts, router, head and embedding, by PEFT.

    python adapters_torch.py FOLDER

FOLDER/cases.json lists cases {name, tokens}. FOLDER/NAME/base is a model, FOLDER/NAME/ours an adapter of it, and
FOLDER/NAME/merged the same with the adapter in its weights. Writes an adapter of PEFT's own to FOLDER/NAME/theirs, and
to FOLDER/NAME/out.npz the logits of the tokens: of the three adapted models and, as "base", of none.
"""

import json
import sys
import warnings
from pathlib import Path

import numpy as np
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file


def load(folder: Path) -> torch.nn.Module:
    name = json.loads((folder / "config.json").read_text())["architectures"][0]
    model, info = getattr(transformers, name).from_pretrained(
        folder, dtype="auto", attn_implementation="eager", output_loading_info=True
    )
    assert not any(info[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    return model.eval()


def with_ours(base: torch.nn.Module, folder: Path) -> torch.nn.Module:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="(?i).*(missing|unexpected).*key")  # how PEFT tells of them
        model = PeftModel.from_pretrained(base, folder)
    stored = load_file(folder / "adapter_model.safetensors")
    held = {
        key.replace(".default.weight", ".weight").removesuffix(".default"): value
        for key, value in model.state_dict().items()
        if ".lora_" in key
    }
    assert held.keys() == stored.keys()
    assert all(torch.equal(held[key], value) for key, value in stored.items())
    return model.eval()


def with_theirs(base: torch.nn.Module, folder: Path) -> torch.nn.Module:
    """One pair for gate_up_proj, which both of its halves share."""
    config = LoraConfig(
        r=2,
        lora_alpha=3,
        target_modules=["q_proj", "lm_head", "embed_tokens"],
        target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj", "mlp.gate.weight"],
        alpha_pattern={r".*\.down_proj": 5},
    )
    model = get_peft_model(base, config)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if ".lora_" in name:
                value.normal_(std=0.3)
    model.save_pretrained(folder)
    return model.eval()


if __name__ == "__main__":
    torch.manual_seed(0)
    root = Path(sys.argv[1])
    for case in json.loads((root / "cases.json").read_text()):
        folder, tokens = root / case["name"], torch.tensor([case["tokens"]])
        models = {
            "base": lambda folder=folder: load(folder / "base"),
            "merged": lambda folder=folder: load(folder / "merged"),
            "ours": lambda folder=folder: with_ours(load(folder / "base"), folder / "ours"),
            "theirs": lambda folder=folder: with_theirs(load(folder / "base"), folder / "theirs"),
        }
        with torch.no_grad():
            logits = {name: make()(input_ids=tokens, use_cache=False).logits[0] for name, make in models.items()}
        np.savez(folder / "out.npz", **{name: value.float().numpy() for name, value in logits.items()})

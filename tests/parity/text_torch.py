"""The torch side of the parity tests of text families.

    python text_torch.py FOLDER

FOLDER/cases.json lists cases {name, config, seed, tokens, new_tokens, penalty}. Writes a random checkpoint to
FOLDER/NAME/, and to FOLDER/NAME.out.npz the logits of the tokens and the greedy answer to them.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
from qwen_torch import randomise
from transformers import AutoConfig, AutoModelForCausalLM


def run(folder: Path, case: dict) -> None:
    config = AutoConfig.for_model(**case["config"])
    config._attn_implementation = "eager"
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    randomise(model, case["seed"])
    model.save_pretrained(folder / case["name"])
    tokens = torch.tensor([case["tokens"]])
    with torch.no_grad():
        logits = model(tokens, use_cache=False).logits[0]
        answer = model.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            max_new_tokens=case["new_tokens"],
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
            repetition_penalty=case["penalty"],
        )[0, tokens.shape[1] :]
    np.savez(folder / f"{case['name']}.out.npz", logits=logits.float().numpy(), answer=answer.numpy())


if __name__ == "__main__":
    torch.manual_seed(0)
    folder = Path(sys.argv[1])
    for case in json.loads((folder / "cases.json").read_text()):
        run(folder, case)

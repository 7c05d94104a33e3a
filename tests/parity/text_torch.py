"""The torch side of the parity tests of text families.

    python text_torch.py FOLDER

FOLDER/cases.json lists cases {name, config, seed, tokens, new_tokens, penalty,
router}. Writes a random checkpoint to
FOLDER/NAME/, and to FOLDER/NAME.out.npz the logits of the tokens, the greedy answer to them, and with `router` the
routers' loss and its gradients.
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
    results = {"logits": logits.float().numpy(), "answer": answer.numpy()}
    np.savez(folder / f"{case['name']}.out.npz", **results, **(router(model, tokens) if case["router"] else {}))


def router(model: torch.nn.Module, tokens: torch.Tensor) -> dict[str, np.ndarray]:
    """The routers' loss of the tokens and of their first half, padded, weighted; and its gradients, by name."""
    rows = torch.cat([tokens, tokens])
    mask = torch.ones_like(rows)
    mask[1, tokens.shape[1] // 2 :] = 0
    out = model(rows, attention_mask=mask, output_router_logits=True, use_cache=False)
    loss = model.config.router_aux_loss_coef * out.aux_loss
    loss.backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss.detach().numpy()} | {f"grad {name}": grad.numpy() for name, grad in found.items()}


if __name__ == "__main__":
    torch.manual_seed(0)
    folder = Path(sys.argv[1])
    for case in json.loads((folder / "cases.json").read_text()):
        run(folder, case)

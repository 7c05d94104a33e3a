"""The torch side of tests/parity/test_sampling.py: filtered logits as transformers' generate makes them.

    python sampling_torch.py FOLDER

FOLDER/cases.npz holds logits [N, V], tokens [N, T] (prompt and answer) and settings [N, 5] (repetition penalty,
temperature, top_k, top_p, min_p); FOLDER/out.npz gets `filtered` [N, V] and `order`, the names of the rules that
generate applies, in its order.
"""

import sys
from pathlib import Path

import numpy as np
import torch
from transformers import GenerationConfig, GPT2Config, GPT2LMHeadModel


def processors(model: GPT2LMHeadModel, settings: np.ndarray):
    """The list that generate itself makes of these settings."""
    penalty, temperature, top_k, top_p, min_p = settings.tolist()
    config = GenerationConfig(
        do_sample=True,
        repetition_penalty=penalty,
        temperature=temperature,
        top_k=int(top_k),
        top_p=top_p,
        min_p=min_p,
    )
    return model._get_logits_processor(config, input_ids_seq_length=1, device="cpu")


def main(folder: Path) -> None:
    cases = np.load(folder / "cases.npz")
    model = GPT2LMHeadModel(GPT2Config(vocab_size=8, n_positions=8, n_embd=8, n_layer=1, n_head=1))
    results, names = [], []
    for logits, tokens, settings in zip(cases["logits"], cases["tokens"], cases["settings"], strict=True):
        rules = processors(model, settings)
        results.append(rules(torch.from_numpy(tokens)[None], torch.from_numpy(logits)[None])[0].numpy())
        names.append(" ".join(type(rule).__name__ for rule in rules))
    np.savez(folder / "out.npz", filtered=np.stack(results), order=np.array(names))


if __name__ == "__main__":
    main(Path(sys.argv[1]))

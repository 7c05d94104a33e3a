"""What a directory is instead of a model that we read, or what its keys have in front: said once, with what to do.

None of it is needed to read a sound checkpoint. The cases are those that people meet: downloads that stopped half way,
wrappers whose state was saved with them, formats of other programs.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import Any

from rave_jax.checkpoint.kinds import kind_of
from rave_jax.checkpoint.safetensors_file import CheckpointError
from rave_jax.families import Family
from rave_jax.files import LFS_POINTER

LFS_LARGEST = 1024
"""Bytes of the largest pointer."""
CHECKED_FOR_LFS = ("*.json", "*.safetensors", "*.txt", "*.model", "*.jinja")
GGUF = "GGUF files"
OTHER_FORMATS = {
    "*.bin": "pickles",
    "*.pt": "pickles",
    "*.pth": "pickles",
    "*.ckpt": "pickles",
    "*.gguf": GGUF,
    "*.h5": "TensorFlow's files",
    "*.msgpack": "Flax's files",
    "*.onnx": "ONNX programs",
    "consolidated*.safetensors": "Mistral's own format",
}
SHARD = re.compile(r".*-(\d{5})-of-(\d{5})\.safetensors")
PREFIXES = {
    "_orig_mod.": "torch.compile: save the model inside it (`model._orig_mod.save_pretrained(...)`)",
    "base_model.model.": "PEFT: merge the adapter (`model.merge_and_unload().save_pretrained(...)`)",
    "module.": "torch's DataParallel or DeepSpeed: save the model inside (`model.module.save_pretrained(...)`)",
    "_fsdp_wrapped_module.": "torch's FSDP: save its full state dict",
}
QUANTIZED = re.compile(
    r".*\.(weight_scale(_inv)?|input_scale|qweight|qzeros|scales|g_idx|weight_packed|weight_shape|SCB|absmax|quant_map"
    r"|nested_absmax|quant_state\.\w+)"
)
UNQUANTIZED_ADVICE = "quantized weights are not read: take the release in bfloat16, or dequantize it with transformers"


def check_lfs(directory: Path) -> None:
    """Refuse a clone whose large files were not fetched.

    Raises:
        CheckpointError: names every file that Git LFS has left a pointer of.
    """
    pointers = sorted({f.name for pattern in CHECKED_FOR_LFS for f in directory.glob(pattern) if _is_pointer(f)})
    if pointers:
        raise CheckpointError(
            f"{directory}: Git LFS has left a pointer in place of {_some(pointers)}: fetch the files with "
            "`git lfs pull` in that directory"
        )


def _is_pointer(file: Path) -> bool:
    try:
        if not file.is_file() or file.stat().st_size > LFS_LARGEST:
            return False
        with file.open("rb") as opened:
            return opened.read(len(LFS_POINTER)) == LFS_POINTER
    except OSError:
        return False


def peft_alone(directory: Path) -> str:
    """What to do with the directory of an adapter."""
    return (
        f"{directory}: is a PEFT adapter and not a whole model: import it on its base with `rave-jax convert from-hf "
        f"{directory} NATIVE --base BASE`, or merge it with PEFT (`merge_and_unload()`, `save_pretrained`)"
    )


def peft_beside(directory: Path) -> str:
    """What to do with an adapter beside full weights."""
    return (
        f"{directory}: holds a PEFT adapter (adapter_config.json) beside a whole model, and does not say whether it is "
        "merged: delete the adapter's files to read the weights as they are, or move them to a directory of their own "
        f"and import it on these (`rave-jax convert from-hf ADAPTER NATIVE --base {directory}`)"
    )


def check_quantization(config: Any, where: str = "config.json") -> None:
    """Refuse a config of quantized weights.

    Raises:
        CheckpointError: names the method.
    """
    for key in ("quantization_config", "compression_config"):
        stated = config.get(key)
        if not stated:
            continue
        method = stated.get("quant_method") if isinstance(stated, dict) else None
        loads = [n for n in ("load_in_4bit", "load_in_8bit") if isinstance(stated, dict) and n in stated]
        if method in (None, "bitsandbytes") and loads:
            if not any(stated[name] for name in loads):
                continue
            method = "bitsandbytes"
        found = f"quant_method {method!r}" if method else repr(stated)[:80]
        raise CheckpointError(f"{where}: {key} has {found}: {UNQUANTIZED_ADVICE}")


def no_weights(directory: Path) -> str:
    """What lies in a directory that has neither model.safetensors nor an index."""
    named = sorted(f.name for f in directory.glob("*.safetensors"))
    shards = [found for name in named if (found := SHARD.fullmatch(name))]
    index = "model.safetensors.index.json"
    if shards:
        count = f"{len(shards)} of {max(int(shard[2]) for shard in shards)} shards"
        names = _some([shard[0] for shard in shards])
        return f"{directory}: holds {count} ({names}) but not {index}, the list of tensors: download it too"
    for pattern, kind in OTHER_FORMATS.items():
        files = sorted(f.name for f in directory.glob(pattern))
        if files and kind == "pickles":
            return (
                f"{directory}: the weights are pickles ({_some(files)}), which can run code when read and are never "
                "loaded: convert them to safetensors first"
            )
        if files and kind == GGUF:
            return (
                f"{directory}: the weights are {kind} ({_some(files)}): make a model directory of one of them with "
                "`rave-jax convert from-gguf FILE DIR`"
            )
        if files:
            return (
                f"{directory}: the weights are {kind} ({_some(files)}): take the release in safetensors of transformers"
            )
    if kind_of(run := directory.resolve().parent) == "run":
        return f"{directory}: holds no weights: it is a part of the training run {run}, which keeps them; give the run"
    expected = f"expected model.safetensors, or {index} and the files it lists"
    others = sorted(str(f.relative_to(directory)) for d in ("*", "*/*") for f in directory.glob(f"{d}.safetensors"))
    if others:
        return f"{directory}: holds no weights under the usual name, but {_some(others)}; {expected}"
    return f"{directory}: holds no weights, {expected}"


def prefix_of(missing: Collection[str], unknown: Collection[str], family: Family) -> tuple[str, str] | None:
    """What the keys of a file have in front or lack, and one line on it; None where that explains nothing.

    Args:
        missing: canonical keys that the model needs and the files lack.
        unknown: keys of the files that the model has no place for, as `family.canonical_key` gives them.
        family: of the model.
    """
    counts = Counter(prefix for key in unknown for prefix in _before(key, missing, family.canonical_key))
    for prefix, count in counts.most_common(1):
        if 2 * count >= len(missing):
            reasons = [text for name, text in PREFIXES.items() if name in prefix]
            why = f" of {reasons[0]}" if reasons else ": save the model without its wrapper, or rename the keys"
            return prefix, f"{count} keys begin with {prefix!r}{why}"
    styles = [{family.other_key(key, n) for n in range(len(family.styles))} for key in missing]
    bare = Counter(prefix for keys in styles for prefix in {p for key in keys for p in _before(key, unknown, str)})
    for prefix, count in bare.most_common(1):
        if 2 * count >= len(unknown):
            return (
                "",
                f"{count} keys lack {prefix!r} in front: only a part of the model was saved; save the whole model",
            )
    return None


def _before(key: str, wanted: Collection[str], canonical: Callable[[str], str]) -> Iterable[str]:
    """What stands before a wanted key; of several, the longest key counts."""
    start = 0
    while (start := key.find(".", start) + 1) > 0:
        if canonical(key[start:]) in wanted:
            yield key[:start]
            return


def quantized_line(unknown: Collection[str]) -> str | None:
    """One line for tensors that only quantized weights have."""
    found = sorted(key for key in unknown if QUANTIZED.fullmatch(key))
    if not found:
        return None
    return f"{len(found)} tensors belong to quantized weights ({_some(found)}): {UNQUANTIZED_ADVICE}"


def _some(names: list[str], most: int = 3) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")

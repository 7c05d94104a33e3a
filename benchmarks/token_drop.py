"""Reading a prompt with a picture and answering it, with three quarters of its visual tokens leaving after the second
layer, or all of them, against the same model that keeps them.

The decoder of the 43 M shape of `model_speed.py` (10 layers, layers apart), random weights, float32, pictures given as
features. The programs are generation's: one prompt is read at once into a cache of its bucket, and eight rows are
answered by 16 tokens each. A round runs each of them in turn; a ratio is the median of the rounds'. FLOPs are those
that the compiler counts for reading the prompt; bytes are of the entries that an answer reads.

    python benchmarks/token_drop.py --json token_drop.json
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rave_jax.attention import Dyvte, MechanismConfig, Pruning
from rave_jax.batch import Kind, Role, TokenInfo
from rave_jax.families.qwen2_5_vl.presets import qwen2_5_vl_7b
from rave_jax.inference.buckets import Buckets, SlotConfig
from rave_jax.models.config import ModelOptions
from rave_jax.models.forward import Chunk, ImageFeatures
from rave_jax.models.parameters import named_parameters, with_values
from rave_jax.models.vlm import Vlm

TEXT, BEFORE, ANSWER, ROWS = 64, 16, 16, 8
ARMS: dict[str, tuple[MechanismConfig, ...]] = {
    "a quarter kept": (Pruning(keep=0.25, layers=(1,)),),
    "none kept": (Dyvte(layers=(1,)),),
}


def model_of(mechanisms: tuple[MechanismConfig, ...]) -> Vlm:
    """A model with random numbers, whose router, if it has one, lets all leave."""
    config = qwen2_5_vl_7b()
    sizes = {"vocab_size": 8192, "hidden_size": 512, "num_layers": 10, "num_heads": 8, "num_kv_heads": 2}
    text = dataclasses.replace(config.text, **sizes, head_dim=64, mlp_size=1408, mrope_section=(8, 12, 12))
    config = dataclasses.replace(config, text=text, vision=None)
    options = ModelOptions(mechanisms, scan_layers=False)
    abstract = jax.eval_shape(lambda: Vlm(config, options, key=jax.random.key(0)))
    random, values = np.random.default_rng(0), {}
    for path, param in named_parameters(abstract).items():
        value = random.normal(size=param.shape).astype(np.float32) / np.sqrt(param.shape[-1]) + ("norm" in path)
        if path.endswith(".second"):
            value = np.broadcast_to(np.array([[0], [1]], np.float32), param.shape)
        values[path] = jnp.asarray(value)
    return with_values(abstract, values)


class Arm:
    """One model, and what it reads and answers."""

    def __init__(self, mechanisms: tuple[MechanismConfig, ...], visual: int):
        self.model = model = model_of(mechanisms)
        length = visual + TEXT
        buckets = Buckets(SlotConfig(max_length=length + ANSWER), None, model.options.layout, whole=True)
        self.width = buckets.chunk_of(length)
        kept = [tuple(TEXT + n for n in bounds) for bounds in model.decoder.stays(visual, 1)]
        after = [tuple(n + ANSWER for n in bounds) for bounds in kept]
        self.reading = buckets.behind(kept, self.width) or None
        self.reach = buckets.reach(length + ANSWER)
        self.answering = buckets.behind(after, self.reach) or None
        codes = {name: np.zeros((1, self.width), np.int32) for name in TokenInfo._fields}
        there = np.arange(self.width) < length
        picture = there & (np.arange(self.width) >= BEFORE) & (np.arange(self.width) < BEFORE + visual)
        said = {"document": there, "offset": np.arange(self.width), "role": there * Role.QUESTION, "image": picture}
        for name, value in (*said.items(), ("kind", np.where(picture, Kind.VISUAL, there * Kind.TEXT))):
            codes[name][0] = value
        random = np.random.default_rng(1)
        index = np.maximum(np.arange(self.width) - BEFORE, 0)[None].astype(np.int32)
        tokens = random.integers(0, 8000, (1, self.width)).astype(np.int32)
        place: Any = np.broadcast_to(np.arange(self.width, dtype=np.int32), (3, 1, self.width))
        features = ImageFeatures(jnp.asarray(random.normal(size=(1, visual, 512)).astype(np.float32)))
        info = TokenInfo(**jax.tree.map(jnp.asarray, codes))
        chunk = Chunk(jnp.asarray(tokens), info, jnp.asarray(place), jnp.asarray(index))
        last = np.array([[length - 1]], np.int32)
        self.read = jax.jit(self._read).lower(model, chunk, features, last).compile()
        self.asked = (model, chunk, features, last)
        first, cache = self.read(*self.asked)
        self.cache = jax.jit(self._filled)(cache)
        self.answer = jax.jit(self._answer).lower(model, self.cache, jnp.int32(length)).compile()
        self.first, self.length = first, length

    def _filled(self, cache: Any) -> Any:
        """The prompt in every row of a cache with room for its answer."""
        reaches = self.model.decoder.reaches(self.width, self.reading)
        whole = self.model.empty_cache(ROWS, self.reach)
        part = cache.take(np.zeros(ROWS, np.int32), self.width, reaches=reaches)
        whole = whole.put(part, None)
        return whole.take(None, self.reach, reaches=self.model.decoder.reaches(self.reach, self.answering))

    def _read(self, model: Vlm, chunk: Chunk, features: ImageFeatures, last: Any) -> Any:
        empty: Any = model.empty_cache(1, self.width)
        empty = empty.take(None, self.width, reaches=model.decoder.reaches(self.width, self.reading))
        out, cache = model.extend(chunk, empty, features, last, lengths=self.reading)
        return model.logits(out.hidden), cache

    def _answer(self, model: Vlm, cache: Any, length: Any) -> Any:
        def step(n: Any, carry: Any) -> Any:
            token, cache = carry
            zero = jnp.zeros((ROWS, 1), jnp.int32)
            info = TokenInfo(*[zero] * len(TokenInfo._fields))
            info = info._replace(
                document=zero + 1, offset=zero + length + n, kind=zero + Kind.TEXT, role=zero + Role.RESPONSE
            )
            place = jnp.broadcast_to(length + n, (3, ROWS, 1)).astype(jnp.int32)
            out, cache = model.extend(Chunk(token, info, place), cache, lengths=self.answering)
            return jnp.argmax(model.logits(out.hidden), axis=-1).astype(jnp.int32), cache

        return jax.lax.fori_loop(0, ANSWER, step, (jnp.zeros((ROWS, 1), jnp.int32), cache))[0]

    def seconds(self) -> tuple[float, float]:
        """Of reading the prompt, and of the answers."""
        times = []
        for run in (
            lambda: self.read(*self.asked),
            lambda: self.answer(self.model, self.cache, jnp.int32(self.length)),
        ):
            start = time.perf_counter()
            jax.block_until_ready(run())
            times.append(time.perf_counter() - start)
        return times[0], times[1]

    @property
    def flops(self) -> float:
        """Of reading the prompt, as the compiler counts them."""
        found: Any = self.read.cost_analysis()
        return float(found["flops"])

    @property
    def entry_bytes(self) -> int:
        """Of the keys and values that a step of the answers reads."""
        return self.cache.nbytes


def rows_of(visual: int, rounds: int) -> Iterator[dict[str, Any]]:
    """What is measured at so many visual tokens."""
    plain = Arm((), visual)
    arms = {name: Arm(mechanisms, visual) for name, mechanisms in ARMS.items()}
    every = {"plain": plain, **arms}
    for arm in every.values():
        arm.seconds()
    taken = [{name: arm.seconds() for name, arm in every.items()} for _ in range(rounds)]
    for name, arm in arms.items():
        for n, what in enumerate(("reading a prompt", f"{ANSWER} tokens of {ROWS} answers")):
            ratio = statistics.median(one[name][n] / one["plain"][n] for one in taken)
            yield {"name": f"{visual} visual tokens, {name}: {what}, time", "value": round(ratio, 3), "unit": "x"}
        # A router's program holds both sizes, and the compiler counts the larger one.
        if name != "none kept":
            ratio = arm.flops / plain.flops
            yield {"name": f"{visual} visual tokens, {name}: FLOPs of reading", "value": round(ratio, 3), "unit": "x"}
            ratio = arm.entry_bytes / plain.entry_bytes
            yield {"name": f"{visual} visual tokens, {name}: bytes of the cache", "value": round(ratio, 3), "unit": "x"}


def main() -> None:
    """Measure and print; with --json also write the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--visual", type=int, nargs="+", default=[576, 2304])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    rows = []
    for visual in given.visual:
        for row in rows_of(visual, given.rounds):
            rows.append({**row, "where": jax.devices()[0].platform})
            print(rows[-1], flush=True)
    if given.json:
        given.json.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()

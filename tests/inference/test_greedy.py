"""Greedy generation against its definition: at each step the argmax of a whole forward pass."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rave_jax.attention import MechanismConfig, Rave, SlidingWindow, TextPositions
from rave_jax.batch import Batch
from rave_jax.inference import generate
from rave_jax.models.config import ModelOptions
from rave_jax.models.families.presets import tiny
from rave_jax.models.vlm import Vlm
from tests.models.layout import Document, Visual, batch, document
from tests.models.made import model

CONFIG = tiny(tie_embeddings=False)  # tied, a random model repeats what it read
NEW, TOKENS, PATCHES = 6, 40, 64
PROMPTS: tuple[list[int | Visual], ...] = (
    [3, Visual(1, 4, 4), 4],
    [2, Visual(1, 4, 6), 1, Visual(1, 2, 4), 5],
    [7],
)
SETTINGS: dict[str, tuple[MechanismConfig, ...]] = {
    "plain": (),
    "rave": (Rave(rank=4, layers=(0, 2), queries="text", form="tanh"),),
    "window": (SlidingWindow(window=5),),
    "text positions": (TextPositions(),),
}


def make_model(mechanisms: tuple[MechanismConfig, ...] = (), seed: int = 0) -> Vlm:
    return model(CONFIG, ModelOptions(mechanisms=mechanisms), seed)


@pytest.fixture(scope="module")
def prompts() -> list[Document]:
    rng = np.random.default_rng(0)
    return [document(parts, CONFIG, rng) for parts in PROMPTS]


def as_batch(documents: list[Document], tokens: int = TOKENS) -> Batch:
    return jax.tree.map(jnp.asarray, batch([[d] if d.tokens else [] for d in documents], CONFIG, tokens, PATCHES))


def extended(prompt: Document, answer: list[int]) -> Document:
    """The prompt with answer tokens after it, written out by hand."""
    after = max(max(p) for p in prompt.positions) + 1
    codes = [{"kind": 1, "role": 3, "turn": 1, "place": len(prompt.tokens) + i} for i in range(len(answer))]
    return Document(
        tokens=prompt.tokens + answer,
        codes=prompt.codes + codes,
        positions=prompt.positions + [(after + i,) * 3 for i in range(len(answer))],
        units=prompt.units + [0] * len(answer),
        patches=prompt.patches,
        segment=prompt.segment,
        place=prompt.place,
        window=prompt.window,
    )


@pytest.mark.parametrize("name", SETTINGS)
def test_each_token_is_the_argmax_of_a_whole_forward(name: str, prompts: list[Document]) -> None:
    vlm = make_model(SETTINGS[name])
    made = generate(vlm, as_batch(prompts), max_new_tokens=NEW, stop_ids=())
    tokens = np.asarray(made.tokens)
    assert np.asarray(made.lengths).tolist() == [NEW] * len(prompts)
    assert len(set(tokens.reshape(-1).tolist())) > 3, "a model that says one thing proves nothing"
    documents = [extended(p, row.tolist()) for p, row in zip(prompts, tokens, strict=True)]
    logits = np.asarray(jax.jit(lambda m, b: m.logits(m.hidden(b)))(vlm, as_batch(documents, TOKENS + NEW)))
    for row, (prompt, answer) in enumerate(zip(prompts, tokens, strict=True)):
        last = len(prompt.tokens) - 1
        assert logits[row, last : last + NEW].argmax(-1).tolist() == answer.tolist()


def test_layers_apart_say_the_same(prompts: list[Document]) -> None:
    build = jax.jit(lambda options: Vlm(CONFIG, options, key=jax.random.key(1)), static_argnums=0)
    mechanisms = (Rave(rank=4, start="random"),)
    stacked, apart = (build(ModelOptions(mechanisms=mechanisms, scan_layers=scan)) for scan in (True, False))
    made = [generate(m, as_batch(prompts), max_new_tokens=NEW, stop_ids=()) for m in (stacked, apart)]
    assert made[0].tokens.tolist() == made[1].tokens.tolist()


def test_a_batch_says_what_each_row_says_alone(prompts: list[Document]) -> None:
    vlm = make_model((Rave(rank=4),))
    together = generate(vlm, as_batch(prompts), max_new_tokens=NEW, stop_ids=())
    for row, prompt in enumerate(prompts):
        alone = generate(vlm, as_batch([prompt], TOKENS + 8), max_new_tokens=NEW, stop_ids=())
        assert alone.tokens[0].tolist() == together.tokens[row].tolist()


def test_stop_tokens_end_a_row_and_only_that_row(prompts: list[Document]) -> None:
    vlm = make_model()
    free = np.asarray(generate(vlm, as_batch(prompts), max_new_tokens=NEW, stop_ids=()).tokens)
    stop = int(free[0, 2])
    made = generate(vlm, as_batch(prompts), max_new_tokens=NEW, stop_ids=(stop, 1))
    for row, given in enumerate(free.tolist()):
        length = next((i for i, token in enumerate(given) if token in (stop, 1)), NEW)
        assert int(made.lengths[row]) == length
        assert made.tokens[row].tolist() == given[:length] + [0] * (NEW - length)
    assert int(made.lengths[0]) < NEW


def test_padding_rows_say_nothing_and_the_shape_compiles_once(prompts: list[Document]) -> None:
    vlm = make_model(seed=5)
    before = generate._cache_size()
    first = generate(vlm, as_batch([*prompts[:2], Document()]), max_new_tokens=3, stop_ids=(9,))
    second = generate(vlm, as_batch([prompts[2], Document(), prompts[0]]), max_new_tokens=3, stop_ids=(9,))
    assert generate._cache_size() == before + 1
    assert int(first.lengths[2]) == 0 and int(second.lengths[1]) == 0
    assert first.tokens[0].tolist() == second.tokens[2].tolist()


def test_one_token_needs_no_decoding(prompts: list[Document]) -> None:
    vlm = make_model()
    one = generate(vlm, as_batch(prompts), max_new_tokens=1, stop_ids=())
    many = generate(vlm, as_batch(prompts), max_new_tokens=NEW, stop_ids=())
    assert one.tokens[:, 0].tolist() == many.tokens[:, 0].tolist()
    with pytest.raises(ValueError, match="max_new_tokens is 0"):
        generate(vlm, as_batch(prompts), max_new_tokens=0, stop_ids=())

"""Numbers of each prompt: answers in slots are those of whole passes with the numbers of each prompt alone."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rave_jax.attention import AttentionDims, Gift, Mechanism, MechanismConfig, Moh, Vhr, build_mechanisms
from rave_jax.attention.calibrate.vhr import reinforcing
from rave_jax.batch import Batch
from rave_jax.config import ConfigError
from rave_jax.families.qwen2_5_vl.presets import tiny
from rave_jax.inference import Engine, Sampling, SlotConfig
from rave_jax.inference.prompted import PromptNumbers, asking, found_numbers, with_numbers
from rave_jax.models.config import ModelOptions
from rave_jax.models.forward import Chunk, Want
from rave_jax.models.vlm import Vlm
from rave_jax.parallel.mesh import MeshConfig, make_mesh
from rave_jax.training.config import TrainConfig
from tests.inference.prompts import example_of, with_answer
from tests.models.layout import Document, Visual, batch, document
from tests.models.made import model

CONFIG = tiny(tie_embeddings=False, vision_depth=1, full_attention_blocks=(), num_layers=3)
NEW, T, P = 5, 64, 96
PARTS: tuple[list[int | Visual], ...] = (
    [3, Visual(1, 4, 4), 4],
    [2, Visual(1, 4, 6), 1, Visual(1, 2, 4), 5],
    [9, Visual(1, 4, 8), 4, Visual(1, 4, 4), 9],
    [14],
)
SIZES = SlotConfig(
    slots=3, max_length=60, chunk=20, smallest=20, patches=40, prefill_rows=2, decode_steps=4, max_stop_ids=2
)
BOTH = (Vhr(choose="prompt", layers=(0, 2)), Gift(alpha=4.0, beta=1.5, saliency_layer=1, layers=(1, 2)))


@functools.cache
def prompts() -> list[Document]:
    rng = np.random.default_rng(0)
    return [document(parts, CONFIG, rng) for parts in PARTS]


def without(doc: Document) -> Document:
    """The same document without its pictures."""
    tokens = [token for token, code in zip(doc.tokens, doc.codes, strict=True) if not code.get("image")]
    alone = document([len(tokens)], CONFIG, np.random.default_rng(0))
    return dataclasses.replace(alone, tokens=tokens)


def words(tokens: np.ndarray) -> np.ndarray:
    """Which tokens count as words with a content: some."""
    return np.asarray(tokens) % 3 > 0


def whole(rows: Batch) -> Chunk:
    return Chunk(rows.tokens, rows.info, rows.positions, rows.visual_index)


@functools.cache
def a_model(mechanisms: tuple[MechanismConfig, ...] = BOTH) -> Vlm:
    return model(CONFIG, ModelOptions(mechanisms=mechanisms), seed=3)


@functools.cache
def numbers() -> PromptNumbers:
    """Of all prompts, each in a row of its own."""
    seen = batch([[doc] for doc in prompts()], CONFIG, T, P)
    blind = batch([[without(doc)] for doc in prompts()], CONFIG, T, 0)

    @jax.jit
    def found(vlm: Vlm, seen: Batch, blind: Batch, content: jax.Array) -> PromptNumbers:
        features = vlm.embed_images(seen.patches)
        return found_numbers(vlm, whole(seen), whole(blind), features, T, content)

    return found(a_model(), seen, blind, words(seen.tokens))


def answers(slots: Engine, documents: Sequence[Document]) -> list[list[int]]:
    said: dict[int, list[int]] = {}
    for doc in documents:
        blind = example_of(without(doc), CONFIG)
        example = example_of(doc, CONFIG)
        said[slots.submit(example, Sampling(NEW), blind=blind, content=words(example.tokens))] = []
    while slots.waiting or slots.running:
        for progress in slots.step():
            said[progress.request] += progress.tokens
    return list(said.values())


@functools.cache
def alone() -> list[list[int]]:
    """Answers on one device."""
    return answers(Engine(a_model(), SIZES, ()), prompts())


@pytest.mark.slow
def test_each_token_is_the_argmax_of_a_whole_pass_with_the_numbers_of_its_prompt() -> None:
    said = alone()
    rows = batch([[with_answer(p, a)] for p, a in zip(prompts(), said, strict=True)], CONFIG, T, P)

    @jax.jit
    def logits(vlm: Vlm, numbers: PromptNumbers, rows: Batch) -> jax.Array:
        vlm = with_numbers(vlm, numbers)
        return vlm.logits(vlm.forward(rows).hidden)

    found, plain = (np.asarray(logits(a_model(), x, rows)) for x in (numbers(), neutral()))
    for row, other, prompt, answer in zip(found, plain, prompts(), said, strict=True):
        span = slice(len(prompt.tokens) - 1, len(prompt.tokens) - 1 + NEW)
        assert row[span].argmax(-1).tolist() == answer
        best = np.sort(row[span], axis=-1)
        assert (best[:, -1] - best[:, -2]).min() > 1e-4, "no tie decides"
        changed = np.abs(row[span] - other[span]).max()
        assert changed > 0.05 or not any(code.get("image") for code in prompt.codes)
    assert answers(Engine(a_model(), SIZES, ()), prompts()[::-1]) == said[::-1]


def neutral() -> PromptNumbers:
    return tuple(x * 0 + n for x, n in zip(numbers(), (1, 0), strict=True))


@pytest.mark.slow
def test_a_mesh_of_eight_answers_alike() -> None:
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    slots = Engine(a_model(), dataclasses.replace(SIZES, slots=4, prefill_rows=4), (), mesh)
    assert answers(slots, prompts()) == alone()


@pytest.mark.slow
def test_heads_are_those_that_the_search_finds_for_the_prompt_alone() -> None:
    """And a prompt without a picture changes nothing."""
    scales, saliency = (np.asarray(x) for x in numbers())
    assert scales.shape == (4, 3, 4) and set(np.unique(scales)) == {1.0, 2.0}
    assert np.all(scales[:, 1] == 1), "a layer without it"
    assert np.all(scales[3] == 1) and np.all(saliency[3] == 0)
    for doc, mine in zip(prompts()[:3], saliency[:3], strict=True):
        visual = [n for n, code in enumerate(doc.codes) if code.get("image")]
        assert mine[visual].min() == 0 and np.delete(mine, visual).max() == 0
        np.testing.assert_allclose(mine[visual].max(), 1, rtol=1e-6)
    pair = batch([[prompts()[0]], [without(prompts()[0])]], CONFIG, T, P)

    @jax.jit
    def search(vlm: Vlm, pair: Batch) -> jax.Array:
        vlm = with_numbers(vlm, (jnp.ones((2, 3, 4)), jnp.zeros((2, T))))
        decoder = reinforcing(vlm.decoder, 2.0, jnp.asarray([True, False, True]))
        return decoder(vlm.embedded(pair), pair.info, pair.positions, Want(gates=True)).gates

    gates = np.asarray(search(a_model(), pair))[:, 0, 0]
    np.testing.assert_array_equal(scales[0], gates)


PAGE = Path(__file__).resolve().parents[2] / "docs" / "mechanisms.md"
OF_PAGE: dict[str, Any] = {"__name__": "tests.page"}
exec(re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)[2], OF_PAGE)
Dim: type[MechanismConfig] = OF_PAGE["Dim"]
"""The page's mechanism of each prompt, whose number is the share of pictures."""
OWN = (Dim(), Gift(alpha=4.0, saliency_layer=1, layers=(1,)))


@pytest.mark.slow
def test_a_users_own_mechanism_of_each_prompt_beside_a_built_in_one() -> None:
    vlm, said = a_model(OWN), answers(Engine(a_model(OWN), SIZES, ()), prompts())
    seen = batch([[doc] for doc in prompts()], CONFIG, T, P)
    rows = batch([[with_answer(p, a)] for p, a in zip(prompts(), said, strict=True)], CONFIG, T, P)

    @jax.jit
    def logits(vlm: Vlm, seen: Batch, rows: Batch, content: jax.Array) -> tuple[PromptNumbers, jax.Array]:
        numbers = found_numbers(vlm, whole(seen), None, vlm.embed_images(seen.patches), T, content)
        vlm = with_numbers(vlm, numbers)
        return numbers, vlm.logits(vlm.forward(rows).hidden)

    (shares, _), found = logits(vlm, seen, rows, words(seen.tokens))
    pictures = [sum(bool(code.get("image")) for code in doc.codes) for doc in prompts()]
    sizes = [len(doc.tokens) for doc in prompts()]
    np.testing.assert_allclose(shares, np.divide(pictures, sizes), rtol=1e-6)
    for row, prompt, answer in zip(np.asarray(found), prompts(), said, strict=True):
        assert row[len(prompt.tokens) - 1 :][:NEW].argmax(-1).tolist() == answer


def test_a_users_own_mechanism_of_each_prompt_says_so_in_its_config() -> None:
    class Undeclared(MechanismConfig):
        def build(self, dims: AttentionDims, key: jax.Array) -> Mechanism:
            return OF_PAGE["Dimming"]()

    asked = asking(abstract((Dim(),)))
    assert asked.anything and not (asked.blind or asked.words)
    with pytest.raises(ConfigError, match=r"Undeclared: Dimming is a Prompted, .* Undeclared does not say `of_prompt`"):
        build_mechanisms((Undeclared(),), AttentionDims(4, 2, 8), jax.random.key(0))
    with pytest.raises(ConfigError, match=r"model\.mechanisms\.0 is Dim.*decided for each prompt that is answered"):
        TrainConfig(model=ModelOptions(mechanisms=(Dim(),)))


def test_numbers_that_slots_cannot_hold_are_refused_by_their_config() -> None:
    class Counting(OF_PAGE["Dimming"]):
        def found(self, prompts: Any, sizes: Any) -> jax.Array:
            return jnp.sum(prompts.info.document > 0, axis=1)

    class Counted(Dim):
        def build(self, dims: AttentionDims, key: jax.Array) -> Mechanism:
            return Counting()

    seen = batch([[doc] for doc in prompts()], CONFIG, T, P)
    with pytest.raises(ConfigError, match=r"Counted: the hook `found` gave 'int32\[4\]', expected .* 'float32\[4\]'"):
        jax.eval_shape(
            lambda vlm: found_numbers(vlm, whole(seen), None, vlm.embed_images(seen.patches), T), abstract((Counted(),))
        )


def test_what_cannot_be_found_is_refused_by_its_name() -> None:
    for mechanisms, match in (
        ((Dim(), *BOTH), "Vhr chooses heads for each prompt, and Dim scales heads too"),
        ((*BOTH, Moh(layers=(1,))), "Vhr chooses heads for each prompt, and Moh scales heads too"),
        ((Gift(layers=(1,), saliency_layer=0), Gift(layers=(2,), saliency_layer=1)), r"saliency_layer is \[0, 1\]"),
    ):
        with pytest.raises(ConfigError, match=match):
            asking(abstract(mechanisms))
    assert not asking(abstract(())).anything


def test_training_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"model\.mechanisms\.0 is Vhr.*decided for each prompt that is answered"):
        TrainConfig(model=ModelOptions(mechanisms=BOTH))


def abstract(mechanisms: tuple[MechanismConfig, ...]) -> Vlm:
    return jax.eval_shape(lambda: Vlm(CONFIG, ModelOptions(mechanisms=mechanisms), key=jax.random.key(0)))

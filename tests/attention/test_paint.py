"""PAINT: two sets of visual tokens by what the tower's class token looks at, and scores that rise by their size."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rave_jax.attention import Paint, Rave, causal_codes
from rave_jax.attention.attend import mask_codes
from rave_jax.attention.paint import sets_of
from rave_jax.batch import Kind, Patches, Role, TokenInfo
from rave_jax.config import ConfigError
from rave_jax.data.sample import Example
from rave_jax.families.qwen2_5_vl import presets
from rave_jax.inference import Engine, Sampling, SlotConfig
from rave_jax.inference.prompted import PromptNumbers, found_numbers, with_numbers
from rave_jax.kernels.attention.base import tile_allow
from rave_jax.models.config import ModelOptions
from rave_jax.models.forward import Chunk
from rave_jax.models.vit import VitTower
from rave_jax.models.vlm import Vlm
from tests.attention.packed import DIMS, KEY, ROWS, attend, features, info_of, normalised, outputs
from tests.families.every import question, small


def test_sets_are_the_outliers_of_the_one_block_and_a_quarter_by_the_other() -> None:
    """As the source finds them, a picture at a time: numpy's quartiles, the largest quarter, no token in both."""
    rng, T = np.random.default_rng(0), 64
    image = np.zeros((2, T), np.int32)
    image[0, 3:27], image[0, 30:51], image[1, 1:13] = 1, 2, 1
    looks = rng.lognormal(sigma=1.2, size=(2, T, 2)).astype(np.float32)
    zero = np.zeros((2, T), np.int32)
    info = TokenInfo(**{name: jnp.asarray(zero) for name in TokenInfo._fields})
    info = info._replace(document=info.document + 1, image=image, kind=np.where(image > 0, Kind.VISUAL, Kind.TEXT))
    found, seen = np.asarray(sets_of(jnp.asarray(looks), info, 0.25)), 0
    for b, n in ((0, 1), (0, 2), (1, 1)):
        (mine,) = np.nonzero(image[b] == n)
        low, high = np.percentile(looks[b, mine, 1], (25, 75))
        summary = {*mine[looks[b, mine, 1] > high + 1.5 * (high - low)]}
        local = {*mine[np.argsort(-looks[b, mine, 0])[: len(mine) // 4]]} - summary
        assert {*np.nonzero((image[b] == n) & (found[b] == 2))[0]} == summary
        assert {*np.nonzero((image[b] == n) & (found[b] == 1))[0]} == local
        seen += len(summary)
    assert seen > 1 and not found[image == 0].any()


@pytest.mark.parametrize("which", ["reference", "xla"])
def test_scores_rise_as_the_source_says(which: Any) -> None:
    x, info = features(), info_of(*ROWS)
    config = Paint(local=0.7, summary=0.4)
    mechanism = config.build(DIMS, KEY)
    of = np.random.default_rng(1).integers(0, 3, (2, 16))
    mechanism.given = jnp.asarray(of)
    s = np.einsum("BTHh,BSHh->BTHS", np.float64(x.q), np.repeat(np.float64(x.k), 2, axis=2)) * DIMS.head_dim**-0.5
    kind, role, place = np.asarray(info.kind), np.asarray(info.role), np.asarray(info.offset)
    mine = np.where(kind == Kind.VISUAL, np.take_along_axis(of, place, axis=1), 0)
    strength = np.array([0, 0.7, 0.4])[mine][:, None, None]
    s = np.where((role == Role.RESPONSE)[:, :, None, None], s + strength * np.abs(s), s)
    allow = np.asarray(tile_allow(mask_codes([], info, info, causal_codes(info))))[:, 0, 0, :, None]
    expected = outputs(normalised(np.where(allow, np.exp(s), 0.0)), x)
    np.testing.assert_allclose(attend(x, info, [mechanism], implementation=which).out, expected, atol=1e-5)


OPTIONS = ModelOptions((Paint(local=4.0, summary=8.0, share=0.5, layers="all"), Rave(rank=4)))
SIZES = SlotConfig(slots=2, max_length=64, chunk=16, smallest=16, patches=64, prefill_rows=2, decode_steps=4)


@functools.cache
def llava() -> tuple[Any, Vlm]:
    made = small("llava", OPTIONS, vision_layers=3)
    return made, made.model(OPTIONS)


def test_the_tower_says_what_its_class_token_looks_at() -> None:
    """Dense attention of the first block and of the last but one, over the patches of each picture."""
    made, model = llava()
    patches = Patches(*(np.asarray(x)[None] for x in made.encode(question("Which?", (30, 44), (21, 64))).patches))
    tower = model.vision
    assert isinstance(tower, VitTower) and tower.looking == (0, 1)
    found = np.asarray(jax.jit(lambda tower: tower.looks(tower.states(patches), patches))(tower))[0]
    states, frame, first = tower.states(patches), patches.frame[0], patches.place[0, :, 0] < 0
    for n in (0, 1):
        block = jax.tree.map(lambda x: x[0], tower.layer_runs[n].layers)
        q, k = (
            np.float64(one(block.attention_norm(states[n])))[0] for one in (block.attention.query, block.attention.key)
        )
        for picture in range(1, frame.max() + 1):
            (mine,) = np.nonzero(frame == picture)
            (head,) = np.nonzero((frame == picture) & first)
            score = np.exp(np.einsum("Hh,PHh->HP", q[head[0]], k[mine]) * q.shape[-1] ** -0.5)
            share = (score / score.sum(-1, keepdims=True)).sum(0)
            np.testing.assert_allclose(found[mine, n], np.where(first[mine], 0, share), atol=1e-5)
    units = tower(patches)
    assert units.looks.shape[:2] == units.tokens.shape[:2] and units.looks.min() >= 0
    assert not np.any(np.asarray(units.looks)[..., 0] == np.asarray(units.looks)[..., 1])


def test_a_tower_without_a_class_token_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="Paint reads what the class token of the vision tower looks at, and that"):
        jax.eval_shape(lambda: Vlm(presets.tiny(), OPTIONS, key=jax.random.key(0)))
    with pytest.raises(ConfigError, match=r"Paint\.layers is 'later'.* has only 2 of them"):
        Paint().layers_of((0, 1))


@pytest.mark.slow
def test_answers_in_slots_are_those_of_a_whole_pass_with_the_sets_of_the_prompt() -> None:
    made, model = llava()
    prompts = [made.encode(question(text, size, seed=n), generation=True) for n, (text, size) in enumerate(ASKED)]
    slots = Engine(model, SIZES, ())
    said: dict[int, list[int]] = {slots.submit(prompt, Sampling(5)): [] for prompt in prompts}
    while slots.waiting or slots.running:
        for progress in slots.step():
            said[progress.request] += progress.tokens
    changed = 0.0
    for prompt, answer in zip(prompts, said.values(), strict=True):
        painted, plain = (np.asarray(x) for x in whole(model, prompt, answer))
        assert painted.argmax(-1).tolist() == answer
        changed = max(changed, float(np.abs(painted - plain).max()))
    assert changed > 0.01


ASKED = (("Which digit is on the red cell?", (30, 44)), ("How many?", (21, 64)), ("What?", (44, 44)))


def whole(model: Vlm, prompt: Example, answer: list[int]) -> tuple[jax.Array, jax.Array]:
    """Logits where each token of the answer was chosen, with the sets of the prompt and without."""
    row = jax.tree.map(lambda x: jnp.asarray(x)[None], prompt)
    n, more = len(prompt.tokens), len(answer)
    index = jnp.arange(more, dtype=jnp.int32)[None]

    def behind(x: Any, new: Any, axis: int = 1) -> jax.Array:
        return jnp.concatenate([x, jnp.broadcast_to(jnp.asarray(new, x.dtype), (*x.shape[:axis], more))], axis)

    info, said = (
        row.info,
        {"document": 1, "kind": Kind.TEXT, "role": Role.RESPONSE, "offset": n + index, "turn": info_turn(prompt)},
    )
    info = TokenInfo(*(behind(code, said.get(name, 0)) for name, code in info._asdict().items()))
    positions = prompt.positions.max() + 1 + index
    grown = jnp.concatenate([jnp.asarray(prompt.positions), jnp.broadcast_to(positions, (3, more))], 1)[:, None]
    tokens, places = behind(row.tokens, jnp.asarray([answer])), behind(row.visual_index, 0)

    @jax.jit
    def logits(model: Vlm) -> tuple[jax.Array, jax.Array]:
        features = model.embed_images(row.patches)
        seen = Chunk(row.tokens, row.info, jnp.asarray(prompt.positions)[:, None], row.visual_index)
        numbers = found_numbers(model, seen, None, features, SIZES.max_length)

        def of(numbers: PromptNumbers) -> jax.Array:
            mine = with_numbers(model, numbers)
            x = mine.embed_tokens(tokens, info, features, places)
            return mine.logits(mine.decoder(x, info, grown).hidden)[0, n - 1 : -1]

        return of(numbers), of(jax.tree.map(jnp.zeros_like, numbers))

    return logits(model)


def info_turn(prompt: Example) -> int:
    return int(prompt.info.turn[-1])

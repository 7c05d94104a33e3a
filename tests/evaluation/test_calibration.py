"""A calibration set measures what generation would write and how sure the model is, for any gammas in one program."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest

from rave_jax.config import ConfigError
from rave_jax.data.collate import BatchShape, collate, smallest_shape
from rave_jax.data.processor import Processor
from rave_jax.data.sample import EmptyAnswer, Example, Sample
from rave_jax.evaluation.answered import with_answer
from rave_jax.evaluation.calibration import CalibrationSet, asked_at, compilations, encoded
from rave_jax.families.qwen2_5_vl.presets import tiny
from rave_jax.inference import Completion, Generator, Request, Sampling, SlotConfig
from rave_jax.models.parameters import with_values
from rave_jax.models.vlm import Vlm
from rave_jax.parallel.mesh import MeshConfig, make_mesh
from tests.data.conftest import TEMPLATE, byte_tokenizer, tiny_settings
from tests.data.pictures import noise
from tests.models.made import model

PLAIN = np.ones((2, 4))

SMALL = tiny(vocab_size=270, num_layers=2, tie_embeddings=False, vision_depth=1, full_attention_blocks=())


@pytest.fixture(scope="module")
def processor() -> Processor:
    tokenizer = byte_tokenizer()
    return Processor(tokenizer, tiny_settings(tokenizer), TEMPLATE)


@pytest.fixture(scope="module")
def vlm(processor: Processor) -> Vlm:
    ids = {"image_token_id": processor.rules.image_token_id, "video_token_id": processor.rules.video_token_id}
    config = dataclasses.replace(SMALL, **ids)
    assert (config.text.num_layers, config.text.num_heads) == PLAIN.shape
    return model(config, seed=1)


def sample(question: str, size: tuple[int, int] | None, answer: str | None = "yes") -> Sample:
    picture = [] if size is None else [{"type": "image", "image": noise(*size)}]
    messages = [{"role": "user", "content": [*picture, {"type": "text", "text": question}]}]
    if answer is not None:
        messages.append({"role": "assistant", "content": answer})
    return Sample(id=question, messages=tuple(messages), answers=(answer or "",))


SAMPLES = (sample("What?", (24, 16)), sample("No picture", None), sample("How many are there?", (16, 32)))


def measuring(vlm: Vlm, processor: Processor, examples: list[Example], criterion, devices: int = 1) -> CalibrationSet:
    mesh = make_mesh(MeshConfig(), jax.devices()[:devices])
    return CalibrationSet(vlm, processor, examples, criterion, mesh, rows=2)


@pytest.mark.slow
def test_right_is_what_greedy_generation_writes(vlm: Vlm, processor: Processor) -> None:
    generator = Generator(vlm, processor, SlotConfig(slots=2, max_length=128, chunk=64))
    examples = []
    for one, length in zip(SAMPLES, (1, 4, 3), strict=True):
        (end,) = generator.answers([Request(one.prompt, Sampling(max_new_tokens=length))])
        assert isinstance(end, Completion) and len(end.tokens) == length
        example = with_answer(encoded(processor, one, "entropy"), end.tokens)
        example.loss_mask[-length:] = 1
        wrong = example.tokens.copy()
        wrong[-1] += 1
        examples += [example, example._replace(tokens=wrong)]
    before = compilations()
    measure = measuring(vlm, processor, examples, "accuracy")
    assert measure(PLAIN).tolist() == [1, 0] * 3
    others = [measure(np.where(np.arange(4) == head, 1e3, PLAIN)) for head in range(4)]
    assert compilations() == before + 1
    assert any(other[0::2].sum() < 3 for other in others), "a thousandfold first token changed no answer"
    assert measuring(vlm, processor, examples, "accuracy", devices=4)(PLAIN).tolist() == [1, 0] * 3
    broken = with_values(vlm, {"decoder.norm.weight": vlm.decoder.norm.weight[...] * np.nan})
    with pytest.raises(ConfigError, match=r"for 6 of 6 samples .* are NaN or infinite, first for sample 0"):
        measuring(broken, processor, examples, "accuracy")(PLAIN)


def test_entropy_is_of_the_first_token_and_needs_no_labels(vlm: Vlm, processor: Processor) -> None:
    unlabelled = [dataclasses.replace(one, messages=one.prompt) for one in SAMPLES]
    examples = [encoded(processor, one, "entropy") for one in unlabelled]
    settings = processor.rules
    wanted = []
    # The largest shape for all: one program.
    shapes = [smallest_shape([[example]], 64, settings.patch_sizes.window) for example in examples]
    shape = BatchShape(*np.max(shapes, axis=0).tolist())
    run = jax.jit(lambda m, b: m.logits(m.forward(b).hidden))
    for example in examples:
        batch = collate([[example]], shape, settings.patch_sizes)
        logits = run(vlm, batch)[0, len(example.tokens) - 1]
        log_probs = np.asarray(jax.nn.log_softmax(logits), np.float64)
        wanted.append(-(np.exp(log_probs) * log_probs).sum())
    found = measuring(vlm, processor, examples, "entropy")
    np.testing.assert_allclose(found(PLAIN), wanted, rtol=1e-5)
    assert np.abs(found(3 * PLAIN) - wanted).max() > 1e-4
    with pytest.raises(ConfigError, match=r"for 3 of 3 samples .* are NaN or infinite, first for sample 0"):
        found(np.nan * PLAIN)
    np.testing.assert_allclose(measuring(vlm, processor, examples, "entropy", 4)(PLAIN), wanted, rtol=1e-5)


def test_the_last_answer_alone_is_measured(processor: Processor) -> None:
    first, last = SAMPLES[0], SAMPLES[1]
    one = asked_at(encoded(processor, last, "accuracy"), "accuracy")[1]
    both = dataclasses.replace(last, messages=(*first.messages, *last.messages))
    at, tokens = asked_at(encoded(processor, both, "accuracy"), "accuracy")
    np.testing.assert_array_equal(tokens, one)
    np.testing.assert_array_equal(encoded(processor, both, "accuracy").tokens[at + 1], one)
    assert processor.tokenizer.decode(tokens[:-1]) == "yes" and tokens[-1] == processor.end_id


def test_what_cannot_be_measured_is_one_error(vlm: Vlm, processor: Processor) -> None:
    with pytest.raises(ConfigError, match="the calibration set is '0 samples'"):
        measuring(vlm, processor, [], "entropy")
    with pytest.raises(EmptyAnswer, match="Why: has no answer, which --criterion accuracy needs"):
        encoded(processor, sample("Why", None, None), "accuracy")
    measure = measuring(vlm, processor, [encoded(processor, SAMPLES[1], "entropy")], "entropy")
    with pytest.raises(ConfigError, match=r"shape \(2, 5\), expected \(layers, heads\) of \(2, 4\)"):
        measure(np.ones((2, 5)))

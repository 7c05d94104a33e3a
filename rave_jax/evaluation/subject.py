"""Who is asked: anything that answers samples, and a model that does so by greedy generation."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np
from jax.sharding import Mesh

from rave_jax.batch import Batch
from rave_jax.data.collate import BatchShape, collate
from rave_jax.data.processor import Processor
from rave_jax.data.sample import Example, OverBudget, Sample, SampleError, without_pictures
from rave_jax.evaluation.accounting import account
from rave_jax.evaluation.answered import (
    answer_attention,
    answer_glances,
    answer_routes,
    program,
    prompt_numbers,
    question_rows,
    with_answer,
)
from rave_jax.evaluation.routing import Route, cells_of
from rave_jax.evaluation.vas import VasSums, vas_sums, with_vas
from rave_jax.inference import Completion, Generator, Request, Sampling, SlotConfig
from rave_jax.inference.content import content_tokens
from rave_jax.inference.programs import SlotState
from rave_jax.inference.prompted import PromptNumbers, asking
from rave_jax.look.blocks import Blocks, KnockOut, blocks_of
from rave_jax.look.knockout import NOTHING, log_probability
from rave_jax.look.maps import Look, over_picture
from rave_jax.models.vlm import Vlm
from rave_jax.parallel.rows import batch_shardings, global_batch
from rave_jax.parallel.sharding import use_mesh
from rave_jax.typing import Array, Bool, Float, Int, NpArray

Check = Callable[[], None]
"""Called between two pieces of work; what it raises ends the work."""
Reading = Callable[[Vlm, Batch, Bool[Array, "B T"]], Any]
"""A function of a model, prompts with their answers, one a row, and which tokens are the answers. It gives a tree of
arrays that begin with B, and runs under `jax.jit`."""
Glances = Float[NpArray, "L N y x"]
"""Attention of the row that chose each of N tokens over the cells of the first picture, averaged over heads."""
CHUNK = 512
"""Tokens of a prompt that are read at once; of a model whose tokens see later ones, all of them."""


def no_check() -> None:
    """Nothing ends the work."""


@dataclass(frozen=True)
class Answer:
    """What was answered: the text, and the tokens it was read from (none if the subject has no tokens)."""

    text: str
    tokens: tuple[int, ...] = ()


class PromptOverBudget(OverBudget):
    """A prompt that the evaluation's rows do not hold, with the tokens and patches that it needs."""

    def __init__(self, name: str, tokens: int, patches: int, most: BatchShape):
        super().__init__(
            f"{name}: the prompt has {tokens} tokens and {patches} patches, over the budget of tokens {most.tokens} "
            f"and patches {most.patches}"
        )
        self.tokens, self.patches = tokens, patches


class Subject(Protocol):
    """Anything that can be examined."""

    def answer(self, samples: Sequence[Sample]) -> list[Answer | SampleError]:
        """An answer to each sample's last question, or why it could not be asked."""
        ...

    def look(self, samples: Sequence[Sample], answers: Sequence[Answer]) -> list[Look | None]:
        """Where each answer looked in the picture with the evidence, the first where none is known; None for a sample
        without a picture, or with a video."""
        ...

    def knock_out(self, samples: Sequence[Sample], answers: Sequence[Answer], most: int) -> list[KnockOut | None]:
        """How far each answer's log-probability falls when one of at most so many blocks of that picture is hidden from
        all text; None for a sample without a picture, with a video, or with an empty answer."""
        ...

    def vas(self, samples: Sequence[Sample]) -> VasSums:
        """What the samples' prompts add to the visual attention score, of `evaluation/vas.py`."""
        ...

    def route(self, samples: Sequence[Sample], answers: Sequence[Answer]) -> list[Route | None]:
        """What each answer's queries read of the pictures; None for a subject that cannot tell."""
        ...

    def per_sample(self, reading: Reading, samples: Sequence[Sample], answers: Sequence[Answer]) -> list[Any] | None:
        """What a function of the model gives of each sample with its answer: its trees, row by row, as numpy arrays;
        None for a subject without a model."""
        ...

    def glances(
        self, samples: Sequence[Sample], answers: Sequence[Answer], layers: tuple[int, ...]
    ) -> list[Glances | SampleError | None]:
        """Where each token of an answer was chosen by looking at the first picture, in some layers by global number.
        The last is what followed the answer, where it was not cut off. None for a sample without a picture, or with a
        video; an error for one that cannot be asked."""
        ...


class _Answered(NamedTuple):
    """A block of samples with their answers: in numbers, on the mesh, what mechanisms ask of the prompts, and the
    queries that chose the answers' tokens with their weights in a mean."""

    prompts: list[Example]
    examples: list[Example]
    batch: Batch
    numbers: PromptNumbers
    queries: Int[Array, "B N"]
    weights: Float[Array, "B N"]


class _Hiding(NamedTuple):
    """One row of a knock-out: a prompt with its answer, and which of its tokens are hidden."""

    sample: Sample
    prompt: Example
    answer: Answer
    hidden: Bool[NpArray, "S"]


class ModelSubject:
    """A model, its processor and its mesh. It answers in slots, and every batch it looks at has one shape.

    All processes must call it alike with the same samples; each places the rows its devices own, and all get
    all answers.
    """

    def __init__(self, model: Vlm, processor: Processor, mesh: Mesh, shape: BatchShape, max_new_tokens: int):
        """
        Args:
            model: on the mesh; an abstract one from `jax.eval_shape` answers nothing before `use`.
            processor: of the model.
            mesh: the devices.
            shape: holds the prompt alone; the answer gets `max_new_tokens` more.
            max_new_tokens: most tokens of an answer.
        """
        self._set(model, no_check)
        self._processor, self._mesh = processor, mesh
        self._shape, self._sampling = shape, Sampling(max_new_tokens)
        chunk = shape.tokens if model.decoder.looks_ahead else CHUNK
        slots = SlotConfig(
            slots=shape.rows,
            max_length=shape.tokens + max_new_tokens,
            max_prompt=shape.tokens,
            max_patches=shape.patches,
            # Short prompts of a benchmark are worth neither more sizes nor waiting for each other.
            smallest=min(128, chunk),
            chunk=chunk,
            prefill_rows=max(1, shape.rows // 4),
        )
        self._generator = Generator(model, processor, slots, mesh)
        self._log_probability = program(log_probability, mesh)
        self._answer_attention = program(answer_attention, mesh)
        self._vas_sums = program(vas_sums, mesh)
        self._answer_routes = program(answer_routes, mesh)
        self._found_numbers = jax.jit(prompt_numbers, static_argnames="size")
        self._readings: dict[Reading, Any] = {}
        self._answer_glances = program(answer_glances, mesh, "layers")

    def shapes(self) -> SlotState:
        """Shapes of what is kept on the devices to answer."""
        return self._generator.shapes()

    def use(self, model: Vlm, check: Check = no_check) -> None:
        """Answer with these weights from here on; no program is compiled again.

        Args:
            model: built like the one before, in the same places.
            check: called between two programs, at the same places on all processes; what it raises ends the work.
        """
        self._generator.use(model)
        self._set(model, check)

    def release(self) -> None:
        """Let go of weights and caches until `use` gives weights."""
        self._generator.release()
        self._set(jax.eval_shape(lambda model: model, self._model), no_check)

    def _set(self, model: Vlm, check: Check) -> None:
        self._model, self._reading, self._check = model, with_vas(model), check

    def why_not(self, sample: Sample) -> SampleError | None:
        """Why a sample's prompt could not be asked, as far as its size is concerned; None where it can."""
        try:
            prompt = self._prompt(sample)
        except SampleError as error:
            return error
        tokens, patches = len(prompt.tokens), prompt.patches.length
        if tokens <= self._shape.tokens and patches <= self._shape.patches:
            return None
        return PromptOverBudget(sample.called, tokens, patches, self._shape)

    def answer(self, samples: Sequence[Sample]) -> list[Answer | SampleError]:
        asked = [Request(sample.prompt, self._sampling, sample.called) for sample in samples]
        return [
            Answer(end.text.strip(), end.tokens) if isinstance(end, Completion) else self._with_needs(sample, end)
            for sample, end in zip(samples, self._generator.answers(asked, self._check), strict=True)
        ]

    def _with_needs(self, sample: Sample, error: SampleError) -> SampleError:
        """For a prompt over the budget, how large a budget it needs, in words of the evaluation's config."""
        if not isinstance(error, OverBudget):
            return error
        needs = self.why_not(sample)
        # Another error is that of a text so long that its tokens are not counted.
        return needs if isinstance(needs, PromptOverBudget) else error

    def look(self, samples: Sequence[Sample], answers: Sequence[Answer]) -> list[Look | None]:
        looks: list[Look | None] = []
        for start in range(0, len(samples), self._shape.rows):
            self._check()
            stop = start + self._shape.rows
            looks += self._look_chunk(samples[start:stop], answers[start:stop])
        return looks

    def knock_out(self, samples: Sequence[Sample], answers: Sequence[Answer], most: int) -> list[KnockOut | None]:
        rows: list[_Hiding] = []
        blocks: list[Blocks | None] = []
        for sample, answer in zip(samples, answers, strict=True):
            prompt = self._prompt(sample)
            usable = len(answer.tokens) > 0 and not self._has_video(prompt)
            found = blocks_of(prompt.info, prompt.shown, sample.evidence_image + 1, most) if usable else None
            blocks.append(found)
            if found is not None:
                every = found.shows.any(axis=0)
                hidden = (np.zeros_like(every), *found.shows, every)
                rows += [_Hiding(sample, prompt, answer, of) for of in hidden]
        said = iter(self._log_probabilities(rows))
        return [None if found is None else _knock_out(found, said) for found in blocks]

    def _log_probabilities(self, rows: Sequence[_Hiding]) -> list[float]:
        found: list[float] = []
        for start in range(0, len(rows), self._shape.rows):
            self._check()
            part = rows[start : start + self._shape.rows]
            block = self._placed([r.sample for r in part], [r.prompt for r in part], [r.answer for r in part])
            hidden = np.zeros(block.batch.tokens.shape, bool)
            tokens = np.full(block.queries.shape, NOTHING, np.int32)
            for i, row in enumerate(part):
                hidden[i, : len(row.hidden)], tokens[i, : len(row.answer.tokens)] = row.hidden, row.answer.tokens
            with use_mesh(self._mesh):
                where = batch_shardings(self._mesh, self._shape.rows).tokens
                placed = jax.device_put((hidden, tokens), where)
                said = self._log_probability(
                    self._model, block.numbers, block.batch, placed[0], block.queries, placed[1]
                )
            found += np.asarray(said)[: len(part)].tolist()
        return found

    def vas(self, samples: Sequence[Sample]) -> VasSums:
        total = ratios = 0.0
        for start in range(0, len(samples), self._shape.rows):
            self._check()
            part = samples[start : start + self._shape.rows]
            prompts = [self._prompt(sample) for sample in part]
            numbers = self._numbers(part, prompts)
            with use_mesh(self._mesh):
                found = self._vas_sums(self._reading, numbers, self._batch(prompts, self._shape))
            total, ratios = total + float(found.total), ratios + float(found.ratios)
        return VasSums(total, ratios)

    def _prompt(self, sample: Sample) -> Example:
        most = 64 * self._shape.tokens
        return self._processor.encode(sample.prompt, add_generation_prompt=True, name=sample.called, most_tokens=most)

    def route(self, samples: Sequence[Sample], answers: Sequence[Answer]) -> list[Route | None]:
        routes: list[Route | None] = []
        for start in range(0, len(samples), self._shape.rows):
            self._check()
            stop = start + self._shape.rows
            routes += self._route_chunk(samples[start:stop], answers[start:stop])
        return routes

    def per_sample(self, reading: Reading, samples: Sequence[Sample], answers: Sequence[Answer]) -> list[Any]:
        if reading not in self._readings:
            self._readings[reading] = program(reading, self._mesh)
        found: list[Any] = []
        for start in range(0, len(samples), self._shape.rows):
            self._check()
            some = slice(start, start + self._shape.rows)
            block = self._answered(samples[some], answers[some])
            asked = zip(block.prompts, block.examples, strict=True)
            given = np.zeros(block.batch.tokens.shape, bool)
            for row, (prompt, example) in enumerate(asked):
                given[row, len(prompt.tokens) : len(example.tokens)] = True
            with use_mesh(self._mesh):
                placed = jax.device_put(given, batch_shardings(self._mesh, len(given)).tokens)
                tree = jax.tree.map(
                    np.asarray, self._readings[reading](self._model, block.numbers, block.batch, placed)
                )
            found += [jax.tree.map(lambda x, row=row: x[row], tree) for row in range(len(block.examples))]
        return found

    def glances(
        self, samples: Sequence[Sample], answers: Sequence[Answer], layers: tuple[int, ...]
    ) -> list[Glances | SampleError | None]:
        found: list[Glances | SampleError | None] = [self.why_not(sample) for sample in samples]
        good = [n for n, error in enumerate(found) if error is None]
        attending = self._model.config.text.attention_layers
        places = tuple(attending.index(layer) for layer in layers)
        for start in range(0, len(good), self._shape.rows):
            self._check()
            some = good[start : start + self._shape.rows]
            block = self._answered([samples[n] for n in some], [answers[n] for n in some])
            # The queries that chose the answer's tokens, and the one behind them.
            first = np.array([len(prompt.tokens) - 1 for prompt in block.prompts], np.int32)
            queries = np.zeros(block.queries.shape, np.int32)
            queries[: len(some)] = first[:, None] + np.arange(queries.shape[1])
            queries = np.minimum(queries, block.batch.tokens.shape[1] - 1)
            with use_mesh(self._mesh):
                placed = jax.device_put(queries, batch_shardings(self._mesh, len(queries)).tokens)
                weights = np.asarray(
                    self._answer_glances(self._model, block.numbers, block.batch, placed, layers=places)
                )
            for row, (n, example) in enumerate(zip(some, block.examples, strict=True)):
                steps = min(len(answers[n].tokens) + 1, queries.shape[1])
                mine = weights[:, row, :steps, : len(example.tokens)]
                found[n] = None if self._has_video(example) else over_picture(example.info, mine, example.shown)
        return found

    def _look_chunk(self, samples: Sequence[Sample], answers: Sequence[Answer]) -> list[Look | None]:
        block = self._answered(samples, answers)
        asking = [
            question_rows(prompt.info, prompt.shown, sample.evidence_image + 1)
            for sample, prompt in zip(samples, block.prompts, strict=True)
        ]
        of_answers = self._attention(block, (block.queries, block.weights))
        of_questions = self._attention_of_rows(block, asking)
        layers = self._model.config.text.attention_layers
        looks: list[Look | None] = []
        for i, (sample, example) in enumerate(zip(samples, block.examples, strict=True)):
            picture = sample.evidence_image + 1
            grid = None if self._has_video(example) else _over(picture, example, of_answers[:, i])
            question = _over(picture, example, of_questions[:, i]) if len(asking[i]) else None
            looks.append(None if grid is None else Look(grid, layers, question))
        return looks

    def _attention(self, block: _Answered, rows: Any) -> Float[NpArray, "L B H S"]:
        """Attention averaged over some rows, which are queries and their weights."""
        with use_mesh(self._mesh):
            return np.asarray(self._answer_attention(self._model, block.numbers, block.batch, *rows))

    def _attention_of_rows(self, block: _Answered, rows: Sequence[Int[NpArray, "N"]]) -> Float[NpArray, "L B H S"]:
        """Attention averaged over any number of rows of each sample, by the program that reads those of answers."""
        count, width = block.queries.shape
        total: Any = 0.0
        for start in range(0, max(map(len, rows)), width):
            queries, weights = np.zeros((count, width), np.int32), np.zeros((count, width), np.float32)
            for i, mine in enumerate(rows):
                part = mine[start : start + width]
                queries[i, : len(part)], weights[i, : len(part)] = part, 1 / len(mine) if len(mine) else 0
            with use_mesh(self._mesh):
                placed = jax.device_put((queries, weights), batch_shardings(self._mesh, count).tokens)
            total = total + self._attention(block, placed)
        return total

    def _route_chunk(self, samples: Sequence[Sample], answers: Sequence[Answer]) -> list[Route | None]:
        block = self._answered(samples, answers)
        found = None
        if self._model.options.layout.regions is not None:
            with use_mesh(self._mesh):
                found = np.asarray(
                    self._answer_routes(self._model, block.numbers, block.batch, block.queries, block.weights)
                )
        routes: list[Route | None] = []
        for i, (sample, prompt) in enumerate(zip(samples, block.prompts, strict=True)):
            reading = account(prompt.info, self._model.config.text, self._model.options)
            cells = None if self._has_video(prompt) else cells_of(prompt.info, prompt.shown, sample.evidence_image + 1)
            if found is None or cells is None:
                routes.append(Route(None, None, reading))
            else:
                routes.append(Route(found[:, i, :, : int(prompt.info.region.max())], cells, reading))
        return routes

    def _has_video(self, example: Example) -> bool:
        """With a video in it, the visuals of a prompt are not counted as its pictures are."""
        return bool(np.any(example.tokens == self._processor.rules.video_token_id))

    def _answered(self, samples: Sequence[Sample], answers: Sequence[Answer]) -> _Answered:
        return self._placed(samples, [self._prompt(sample) for sample in samples], answers)

    def _placed(self, samples: Sequence[Sample], prompts: list[Example], answers: Sequence[Answer]) -> _Answered:
        examples = [with_answer(p, a.tokens) for p, a in zip(prompts, answers, strict=True)]
        shape = BatchShape(self._shape.rows, self._shape.tokens + self._sampling.max_new_tokens, self._shape.patches)
        # A token is chosen by the query before it: the last of the prompt for the first, and so on.
        queries = np.zeros((shape.rows, self._sampling.max_new_tokens), np.int32)
        weights = np.zeros((shape.rows, self._sampling.max_new_tokens), np.float32)
        for i, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
            count = max(len(answer.tokens), 1)
            queries[i, :count] = len(prompt.tokens) - 1 + np.arange(count)
            weights[i, :count] = 1.0 / count
        numbers = self._numbers(samples, prompts)
        with use_mesh(self._mesh):
            where = batch_shardings(self._mesh, shape.rows).tokens
            placed = jax.device_put((queries, weights), where)
            return _Answered(prompts, examples, self._batch(examples, shape), numbers, *placed)

    def _numbers(self, samples: Sequence[Sample], prompts: Sequence[Example]) -> PromptNumbers:
        """What mechanisms ask of the prompts, as generation finds it."""
        asked = asking(self._model)
        if not asked.anything:
            return ()
        size = self._shape.tokens + self._sampling.max_new_tokens
        with use_mesh(self._mesh):
            seen, blind, content = self._batch(prompts, self._shape), None, None
            if asked.words:
                words = np.zeros(seen.tokens.shape, bool)
                for row, prompt in enumerate(prompts):
                    words[row, : len(prompt.tokens)] = content_tokens(self._processor.tokenizer, prompt.tokens)
                content = jax.device_put(words, batch_shardings(self._mesh, len(words)).tokens)
            if asked.blind:
                alone = [
                    self._processor.encode(tuple(map(without_pictures, sample.prompt)), add_generation_prompt=True)
                    for sample in samples
                ]
                blind = self._batch(alone, self._shape._replace(patches=0))
            return self._found_numbers(self._model, seen, blind, content, size=size)

    def _batch(self, examples: Sequence[Example], shape: BatchShape) -> Batch:
        rules = self._processor.rules

        def load(span: range) -> Batch:
            mine = [[example] for example in examples[span.start : span.stop]]
            return collate(mine, shape._replace(rows=len(span)), rules.patch_sizes)

        return global_batch(load, self._mesh, shape.rows)


def _knock_out(blocks: Blocks, said: Iterator[float]) -> KnockOut:
    """What was said of an answer with nothing hidden, with each block hidden, and with all of them."""
    seen = next(said)
    falls = [seen - next(said) for _ in range(blocks.rows * blocks.cols)]
    return KnockOut(np.reshape(falls, (blocks.rows, blocks.cols)), seen - next(said), seen)


def _over(picture: int, example: Example, weights: Float[NpArray, "L H S"]) -> Float[NpArray, "L H y x"] | None:
    """Attention to a padded example's tokens, over one of its pictures."""
    return over_picture(example.info, weights[..., : len(example.tokens)], example.shown, picture)

"""Documents packed into rows against each of them alone: what a model makes of them, and every gradient."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import strategies as st

from rave_jax.batch import Batch, Kind
from rave_jax.checkpoint.tiny import BYTES
from rave_jax.data.collate import BatchShape, collate, smallest_shape
from rave_jax.data.layout import region_major
from rave_jax.data.sample import Example, Message
from rave_jax.models.decoder import ROUTER
from rave_jax.models.forward import Want
from rave_jax.models.parameters import named_parameters
from rave_jax.models.vlm import Vlm
from rave_jax.training.objective import chunked_cross_entropy
from tests.data.pictures import noise
from tests.families.every import Small, answer, question

TOLERANCE = 1e-5
"""Of the largest number (what layers and the head give), of a loss, and of the norm of a parameter's gradient. Float32
gives 3e-6 and less."""
DELTA = 3e-4
"""The same where layers have the gated delta rule. A head that reads next to nothing is normalised behind it, and its
rounding grows with it: a wrong last bit of what enters the layer becomes thirty times as large, in a document alone
too."""
CANCELLED = 3e-8
"""Of the norm of all gradients: what a parameter's gradient may be wrong by however small it is. That of a bias of keys
that no rotation follows is zero but for rounding, since a softmax takes no notice of it."""
PROGRESS = 0.2
"""Of the training run: where a mechanism has a schedule, it is on its way."""
ROWS = 2
Rows = Sequence[Sequence[int]]
"""Numbers of the documents of each row."""


class Share(NamedTuple):
    """How much of these losses is in what is differentiated, beside that of tokens."""

    mechanisms: float
    router: float


TOKENS, MECHANISMS, ROUTERS = Share(0.0, 0.0), Share(1.0, 0.0), Share(0.0, 1.0)


class Measured(NamedTuple):
    """What a model makes of a batch.

    Fields:
        states: what enters each layer, and what leaves the last [L+1,B,T,D].
        logits: of every token [B,T,V].
        loss: weighted sum of the negative log-likelihood.
        losses: sums of the mechanisms' and the routers' losses, by name.
        gradients: of the sum of all of them, by the name of the parameter.
    """

    states: np.ndarray
    logits: np.ndarray
    loss: np.ndarray
    losses: dict[str, np.ndarray]
    gradients: dict[str, np.ndarray]


def told(model: Vlm, batch: Batch, share: Share) -> tuple[jax.Array, Any]:
    """What is differentiated, and what is told beside it."""
    out = model.forward(batch, Want(losses=True, inputs=True, progress=jnp.float32(PROGRESS)))
    chunk = batch.tokens.shape[1]
    sums = chunked_cross_entropy(out.hidden, model.head_weight(), batch.targets, batch.loss_weights, chunk)
    part = {name: share.router if name == ROUTER else share.mechanisms for name in out.losses}
    whole = sum((part[name] * loss for name, loss in out.losses.items()), sums.loss)
    states = jnp.concatenate([out.inputs, out.hidden[None]])
    return whole, (states, model.logits(out.hidden), sums.loss, out.losses)


@functools.partial(jax.jit, static_argnames="learning")
def program(model: Vlm, batch: Batch, share: Share, learning: bool) -> tuple[Any, dict[str, Any]]:
    """The one compiled program of a model here, whatever stands in the rows; `learning` has gradients."""
    with jax.default_matmul_precision("highest"):
        if not learning:
            return told(model, batch, share)[1], {}
        gradients, rest = jax.grad(told, has_aux=True)(model, batch, share)
    return rest, {name: value[...] for name, value in named_parameters(gradients).items()}


class Documents:
    """Documents of one model in batches of one shape, which has room for all of them in one row."""

    def __init__(
        self,
        of: Small,
        model: Vlm,
        conversations: Sequence[Sequence[Message]],
        *,
        tolerance: float = TOLERANCE,
        learning: bool = True,
        windows: int = 0,
    ):
        """
        Args:
            of, model: the model, and what encodes for it.
            conversations: the documents.
            tolerance: what the rounding of this model comes to.
            learning: are gradients compared too?
            windows: of the tower, by which rows are longer than they need be, and by as many tokens as eight for each.
        """
        self.tolerance, self.learning = tolerance, learning
        self._of, self._sizes, self.model = of, of.processor.rules.patch_sizes, model
        self.examples = [self.encode(messages) for messages in conversations]
        least = smallest_shape([self.examples], 8, self._sizes.window)
        more = windows * self._sizes.window
        self.shape = BatchShape(ROWS, least.tokens + 8 * windows, least.patches + more)
        self._alone: dict[int, Measured] = {}

    def encode(self, messages: Sequence[Message]) -> Example:
        """A conversation as a loader gives it to rows."""
        example = self._of.encode(*messages)
        return example if self._of.processor.layout.regions is None else region_major(example)

    def batch(self, rows: Sequence[Sequence[Example]]) -> Batch:
        """Rows of any examples."""
        return collate(rows, self.shape, self._sizes)

    def measure(self, batch: Batch, share: Share = MECHANISMS) -> Measured:
        """What the model makes of a batch."""
        found, gradients = jax.device_get(program(self.model, batch, share, self.learning))
        return Measured(*found, gradients)

    def of_rows(self, rows: Rows, share: Share = MECHANISMS) -> Measured:
        """What it makes of rows of these documents."""
        return self.measure(self.batch([[self.examples[number] for number in row] for row in rows]), share)

    def alone(self, number: int) -> Measured:
        """What it makes of one document with nothing beside it."""
        if number not in self._alone:
            self._alone[number] = self.of_rows([[number], []])
        return self._alone[number]

    def places(self, rows: Rows) -> dict[int, tuple[int, slice]]:
        """The row and the tokens of each document."""
        found = {}
        for row, numbers in enumerate(rows):
            start = 0
            for number in numbers:
                stop = start + len(self.examples[number].tokens)
                found[number] = row, slice(start, stop)
                start = stop
        return found


def not_learned(example: Example) -> Example:
    """The example without a loss."""
    return example._replace(loss_mask=np.zeros_like(example.loss_mask))


def with_other_content(example: Example) -> Example:
    """The example with other letters and other colours; all sizes and places are the same."""
    letters = (example.info.kind == Kind.TEXT) & (example.tokens < BYTES)
    tokens = np.where(letters, (example.tokens + 1) % BYTES, example.tokens)
    return example._replace(tokens=tokens, patches=example.patches._replace(pixels=255 - example.patches.pixels))


def conversations(pictures: bool, videos: bool = False) -> list[list[Message]]:
    """Several turns of text with a system message; a picture of odd size; three pictures in two turns; nine pictures; a
    short text; a video. Without pictures, the texts of these."""

    def asked(text: str, *sizes: tuple[int, int], seed: int) -> Message:
        return question(text, *(sizes if pictures else ()), seed=seed)

    found: list[list[Message]] = [
        [
            {"role": "system", "content": "Be brief."},
            *(question("Is it so?"), answer("yes")),
            *(question("Why?"), {**answer("so it is"), "weight": 0.5}),
        ],
        [asked("12?", (30, 44), seed=0), answer("56")],
        [
            *(asked("Which?", (21, 64), (50, 20), seed=3), answer("both")),
            *(asked("And this?", (33, 33), seed=5), {**answer("none"), "weight": 0}),
            *(question("Sure?"), answer("no")),
        ],
        [asked("How many?", *[(15, 15)] * 9, seed=9), answer("nine")],
        [question("Hm?"), answer("ok")],
    ]
    if videos:
        frames = [noise(28, 42, seed=50 + n) for n in range(4)]
        parts = [{"type": "video", "video": frames, "fps": 2.0}, {"type": "text", "text": "What moves?"}]
        found.append([{"role": "user", "content": parts}, answer("a ball")])
    return found


MANY = 3
"""The document of `conversations` with nine pictures."""


def arrangements(count: int) -> st.SearchStrategy[list[list[int]]]:
    """Some of `count` documents in two rows, in any order, with whatever room is left behind them."""

    def rows(drawn: tuple[list[int], int, int]) -> list[list[int]]:
        order, some, cut = drawn
        return [order[: min(cut, some)], order[cut:some]]

    numbers = st.integers(1, count), st.integers(0, count)
    return st.tuples(st.permutations(range(count)), *numbers).map(rows)


def check(documents: Documents, rows: Rows) -> None:
    """What each document gives, and the sums over all of them, are those of the documents alone.

    Raises:
        AssertionError: names the document and the first layer, or the parameter.
    """
    found, close = documents.of_rows(rows), documents.tolerance
    alone = {number: documents.alone(number) for row in rows for number in row}
    for number, (row, tokens) in documents.places(rows).items():
        length = tokens.stop - tokens.start
        pairs = zip(found.states[:, row, tokens], alone[number].states[:, 0, :length], strict=True)
        for layer, (packed, wanted) in enumerate(pairs):
            assert difference(packed, wanted) < close, f"document {number} of {rows}, what enters layer {layer}"
        wrong = difference(found.logits[row, tokens], alone[number].logits[0, :length])
        assert wrong < close, f"logits of document {number} of {rows}"
    wanted = sum(one.loss for one in alone.values())
    np.testing.assert_allclose(found.loss, wanted, rtol=close, err_msg=str(rows))
    for name in found.losses.keys() - {ROUTER}:
        added = [one.losses[name] for one in alone.values()]
        np.testing.assert_allclose(
            found.losses[name], sum(added), atol=close * sum(map(abs, added)), err_msg=f"{name} of {rows}"
        )
    if alone:
        wanted = {name: sum(one.gradients[name] for one in alone.values()) for name in found.gradients}
        check_gradients(found, wanted, close)


def check_gradients(found: Measured, wanted: dict[str, Any], close: float) -> None:
    """The gradients of every parameter are those that are wanted."""
    whole = norm([norm(value) for value in wanted.values()])
    for name, value in found.gradients.items():
        wrong = norm(value - wanted[name])
        assert wrong <= close * norm(wanted[name]) + CANCELLED * whole, f"gradient of {name}"


def check_neighbours(documents: Documents) -> None:
    """Other letters and colours before a document, behind it and in the next row change no bit of what the layers and
    the head give for it, and none of any gradient of its loss. Nor does it matter whether there are any behind it."""
    rows = [[2, 1, MANY], [0]]
    own = documents.examples[1]
    examples = [[documents.examples[n] for n in row] for row in rows]
    learned = [[one if one is own else not_learned(one) for one in row] for row in examples]
    others = [[one if one is own else with_other_content(one) for one in row] for row in learned]
    found, other = (documents.measure(documents.batch(some), TOKENS) for some in (learned, others))
    (row, tokens) = documents.places(rows)[1]
    assert difference(found.logits[row], other.logits[row]) > 1e-3, "the neighbours differ"
    np.testing.assert_array_equal(found.states[:, row, tokens], other.states[:, row, tokens])
    np.testing.assert_array_equal(found.logits[row, tokens], other.logits[row, tokens])
    for name, gradient in found.gradients.items():
        np.testing.assert_array_equal(gradient, other.gradients[name], err_msg=name)
    followed, tokens = documents.of_rows([[1, 2], [0]]), slice(0, len(own.tokens))
    np.testing.assert_array_equal(followed.states[:, 0, tokens], documents.alone(1).states[:, 0, tokens])


def difference(a: np.ndarray, b: np.ndarray) -> float:
    """As a part of the largest number."""
    return float(np.abs(a - b).max() / np.abs(b).max())


def norm(x: Any) -> float:
    """The Euclidean norm, in float64."""
    return float(np.sqrt(np.sum(np.square(np.asarray(x, np.float64)))))

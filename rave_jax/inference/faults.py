"""What can go wrong with one answer while the others go on."""

from __future__ import annotations

from rave_jax.data.sample import SampleError


class Fault(SampleError):
    """An answer that was begun and cannot be finished."""

    reason = "no whole answer"


class NotFinite(Fault):
    """The model's logits are NaN or infinite, so no token can be chosen from them."""

    reason = "logits not finite"


class TimedOut(Fault):
    """An answer took longer than it may."""

    reason = "timed out"


def not_finite(called: str, prompt: int, given: int) -> NotFinite:
    """The error of an answer whose next token cannot be chosen.

    Args:
        called: what stands before it: the request's name.
        prompt: tokens of the prompt.
        given: tokens of the answer before this one.
    """
    return NotFinite(
        f"{called}the model's logits for token {given + 1} of the answer, at position {prompt + given} of the "
        "conversation, are NaN or infinite, so no token can be chosen: look for NaN in the checkpoint's weights, or "
        "compute in a wider number type (float32)"
    )


def timed_out(called: str, seconds: float, given: int) -> TimedOut:
    """The error of an answer that took longer than `seconds`, with `given` tokens by then."""
    return TimedOut(
        f"{called}the answer was not finished {seconds:g} s after its prompt began to be read, with {given} tokens so "
        "far: ask for fewer (max_new_tokens), or give a larger request_timeout (--request-timeout)"
    )

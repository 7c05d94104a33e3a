"""Generation from a trained model: a cache with slots, sampling, and text as it comes."""

from rave_jax.inference.buckets import SlotConfig
from rave_jax.inference.faults import Fault, NotFinite, TimedOut
from rave_jax.inference.generate import Completion, Generator, Piece, Request
from rave_jax.inference.sampling import Sampling
from rave_jax.inference.slots import Engine

__all__ = [
    "Completion",
    "Engine",
    "Fault",
    "Generator",
    "NotFinite",
    "Piece",
    "Request",
    "Sampling",
    "SlotConfig",
    "TimedOut",
]

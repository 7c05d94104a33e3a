"""What can be known of a TPU program without a TPU: libtpu's compiler runs on any machine it installs on."""

from rave_jax.tools.tpu.compile import TOPOLOGIES, Case, CompilerUnavailable, available, compile_cases
from rave_jax.tools.tpu.copies import Operand, copied_bytes
from rave_jax.tools.tpu.result import Array, Bundles, Compiled, Memory, Stretch

__all__ = [
    "TOPOLOGIES",
    "Array",
    "Bundles",
    "Case",
    "Compiled",
    "CompilerUnavailable",
    "Memory",
    "Operand",
    "Stretch",
    "available",
    "compile_cases",
    "copied_bytes",
]

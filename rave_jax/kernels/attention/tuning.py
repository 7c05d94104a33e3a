"""Which block sizes the Pallas kernels use on which chip.

From `benchmarks/tune_kernels.py`: the TPU compiler's static cycles for one kv group (head_dim 128, rank 16, bfloat16).
**No entry has been verified on hardware**, and TPU7x has the blocks of v5p, which were only seen to compile: the
estimator has numbers for few of its kernels. Where two choices are within 3 % the kernels get equal blocks of queries:
the arrays are then cut at whole blocks of both. What is best for two heads need not be for seven: on v6e, T 4096,
blocks of 1024 take 4 % off log_gate's backward pass with two, and add 9 % with seven. They also take long to compile.

A linear gate rides in further channels of <q, k> where the matrix unit is 256 deep and a head fills 128 of it: the
product then costs what it costs without a gate. On a unit 128 deep it would cost a second pass, as the gate's own
product does, and the keys would have to be turned for it.
"""

from __future__ import annotations

from rave_jax.kernels.attention.pallas_tpu.blocks import BlockSizes

BY_DEVICE_KIND = {
    "TPU v5 lite": BlockSizes((512, 512), (512, 512)),
    "TPU v5": BlockSizes((512, 512), (512, 512)),
    "TPU v5p": BlockSizes((512, 512), (512, 512)),
    "TPU v6 lite": BlockSizes((1024, 1024), (512, 512), fold_linear=True),
    "TPU7x": BlockSizes((512, 512), (512, 512), key_bytes=20 << 20, fold_linear=True),
}
OTHER = BlockSizes((256, 512), (256, 512), key_bytes=12 << 20)
"""For chips that nobody has tuned for: small enough for all."""


def block_sizes(device_kind: str) -> BlockSizes:
    """Blocks for a chip, as `jax.Device.device_kind` names it."""
    return BY_DEVICE_KIND.get(device_kind, OTHER)

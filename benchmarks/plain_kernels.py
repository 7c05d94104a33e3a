"""The attention kernels that jax brings, as `compile_cases` takes them: what a kernel of ours is compared with.

One kv group in bfloat16, heads of 128, causal. Each kernel of a training step is a program of its own, with operands in
HBM: in a whole step of a small size the compiler keeps some of them on the chip, and its cycle estimate then dies.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.pallas.ops.tpu import flash_attention as flash_kernel
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash_kernel
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
from jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_mask_info import MaskInfo

HEAD_DIM = 128
Blocks = tuple[int, ...]
Program = tuple[Callable[..., Any], tuple[Any, ...]]

_PLAIN: dict[str, Any] = {
    "is_mqa": True,
    "mask_value": splash_kernel.DEFAULT_MASK_VALUE,
    "attn_logits_soft_cap": None,
    "interpret": False,
}
_LAYOUT = splash_kernel.QKVLayout.HEAD_DIM_MINOR


def splash_forward(place: Any, heads: int, length: int, blocks: Blocks, residuals: bool = True) -> Program:
    """The forward kernel of splash attention, queries [heads, length, 128], keys [length, 128].

    Args:
        place: makes an abstract array.
        heads: of the queries.
        length: of queries and keys.
        blocks: of queries, of keys, of keys computed at once.
        residuals: give log-sum-exp too, as training needs it.
    """
    _skip_by_place(*blocks[:2])
    sizes = splash_kernel.BlockSizes(block_q=blocks[0], block_kv=blocks[1], block_kv_compute=blocks[2])

    def run(q: jax.Array, k: jax.Array, v: jax.Array) -> Any:
        return splash_kernel._splash_attention_forward(
            _causal(length),
            q,
            k,
            v,
            None,
            None,
            block_sizes=sizes,
            residual_checkpoint_name=None,
            save_residuals=residuals,
            mask_function=_sees,
            **_PLAIN,
        )

    q, kv, _ = _operands(place, heads, length)
    return run, (q, kv, kv)


def splash_dq(place: Any, heads: int, length: int, blocks: Blocks) -> Program:
    """The kernel of the queries' gradient. `blocks`: of queries, of keys."""
    return _splash_backward(place, heads, length, blocks, splash_kernel._splash_attention_bwd_dq, {})


def splash_dkv(place: Any, heads: int, length: int, blocks: Blocks, fused: bool = False) -> Program:
    """The kernel of the keys' and values' gradients. `blocks`: of queries, of keys, of keys computed at once.

    Args:
        place: makes an abstract array.
        heads: of the queries.
        length: of queries and keys.
        blocks: see above.
        fused: give the queries' gradient too, by a sum over blocks of keys that XLA adds up.
    """
    settings = {"bkv_compute": blocks[2], "use_fused_bwd_kernel": fused}
    return _splash_backward(place, heads, length, blocks[:2], splash_kernel._splash_attention_bwd_dkv, settings)


def splash_step(
    place: Any, heads: int, length: int, forward: Blocks, dq: Blocks, dkv: Blocks, heads_last: bool = False
) -> Program:
    """Forward and backward pass as a user has them, tables and all: for its memory, not for its cycles.

    Args:
        place: makes an abstract array.
        heads: of the queries.
        length: of queries and keys.
        forward: blocks of queries, of keys, of keys computed at once.
        dq: blocks of queries, of keys.
        dkv: as forward.
        heads_last: queries and output are [length, heads, 128], as a model's products give and take them.
    """
    sizes = splash_kernel.BlockSizes(
        block_q=forward[0],
        block_kv=forward[1],
        block_kv_compute=forward[2],
        block_q_dq=dq[0],
        block_kv_dq=dq[1],
        block_q_dkv=dkv[0],
        block_kv_dkv=dkv[1],
        block_kv_dkv_compute=dkv[2],
    )
    mask = masks.MultiHeadMask([masks.CausalMask((length, length))] * heads)
    attend = splash_kernel.make_splash_mqa_single_device(mask, block_sizes=sizes)
    q, kv, _ = _operands(place, heads, length)
    if not heads_last:
        return _step(attend), (q, kv, kv, q)

    def turned(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return jnp.swapaxes(attend(jnp.swapaxes(q, 0, 1), k, v), 0, 1)

    q = place((length, heads, HEAD_DIM), jnp.bfloat16)
    return _step(turned), (q, kv, kv, q)


def flash_step(place: Any, heads: int, length: int, forward: Blocks, dq: Blocks, dkv: Blocks) -> Program:
    """Forward and backward pass of flash attention. It has no shared keys, so each head has its own.

    Args:
        place: makes an abstract array.
        heads: of queries, keys and values.
        length: of queries and keys.
        forward: blocks of queries, of keys; the kernel's smaller steps within a block are as large as the block.
        dq: the same.
        dkv: the same.
    """
    sizes = flash_kernel.BlockSizes(
        block_b=1,
        block_q=forward[0],
        block_k_major=forward[1],
        block_k=forward[1],
        block_q_dq=dq[0],
        block_k_major_dq=dq[1],
        block_k_dq=dq[1],
        block_q_major_dkv=dkv[0],
        block_q_dkv=dkv[0],
        block_k_major_dkv=dkv[1],
        block_k_dkv=dkv[1],
    )

    def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return flash_kernel.flash_attention(q, k, v, causal=True, sm_scale=HEAD_DIM**-0.5, block_sizes=sizes)

    x = place((1, heads, length, HEAD_DIM), jnp.bfloat16)
    return _step(attend), (x, x, x, x)


def _step(attend: Callable[..., jax.Array]) -> Callable[..., Any]:
    def run(q: jax.Array, k: jax.Array, v: jax.Array, grad: jax.Array) -> Any:
        out, back = jax.vjp(attend, q, k, v)
        return out, back(grad)

    return run


def _operands(place: Any, heads: int, length: int) -> tuple[Any, Any, Any]:
    q, kv = place((heads, length, HEAD_DIM), jnp.bfloat16), place((length, HEAD_DIM), jnp.bfloat16)
    return q, kv, place((heads, length), jnp.float32)


def _splash_backward(
    place: Any, heads: int, length: int, blocks: Blocks, kernel: Callable[..., Any], settings: dict[str, Any]
) -> Program:
    _skip_by_place(*blocks)
    settings = settings | {"bq": blocks[0], "bkv": blocks[1], "mask_function": _sees, **_PLAIN}
    settings |= dict.fromkeys(("q_layout", "k_layout", "v_layout"), _LAYOUT)

    def run(q: jax.Array, k: jax.Array, v: jax.Array, lse: jax.Array, grad: jax.Array, delta: jax.Array) -> Any:
        return kernel(q, k, v, None, None, lse, grad, delta, mask_info=_causal(length), **settings)

    q, kv, row = _operands(place, heads, length)
    return run, (q, kv, kv, row, q, row)


def _sees(query: Any, key: Any) -> Any:
    return query >= key


def _causal(length: int) -> MaskInfo:
    """No tables: `_skip_by_place` says what they would."""
    return MaskInfo(
        data_next=None,
        mask_next=None,
        block_mask=None,
        partial_mask_blocks=None,
        q_sequence=np.arange(length, dtype=np.int32),
    )


def _skip_by_place(size_q: int, size_k: int) -> None:
    """Tell splash attention which tiles to skip by their place in the grid, not by prefetched tables.

    The tiles are those that its tables for a causal mask skip, and a skipped tile names the block needed next, as
    there. But the compiler's estimate takes a branch on a table as never taken: it would count an empty grid. This
    holds for the process, which compiles one case after the other and nothing else.
    """

    def look(h: Any, i: Any, j: Any, *tables: Any, next_i: bool = False) -> Any:
        run = j * size_k < (i + 1) * size_q
        after = jnp.maximum(i, lax.div(j * size_k, size_q)) if next_i else jnp.where(run, j, 0)
        return after, None, run, False

    splash_kernel.__dict__["_next_nonzero"] = look

"""The toy's tower."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from rave_jax.models.layers import Linear
from rave_jax.models.stack import LayerRun


class Block(nnx.Module):
    def __init__(self, width, dtype, key):
        self.linear = Linear((width,), (width,), ("mlp", "embed"), bias=False, dtype=dtype, key=key)


class Tower(nnx.Module):
    def __init__(self, config, options, *, key):
        keys, D, dtype = jax.random.split(key, 3), config.hidden_size, options.params
        self.into = Linear((D,), (config.patch_width,), ("embed", "patch"), bias=False, dtype=dtype, key=keys[0])
        blocks = jax.random.split(keys[1], config.depth)
        self.layer_runs = nnx.List([LayerRun(0, config.depth, lambda k: Block(D, dtype, k), blocks)])
        self.out = Linear((config.out_size,), (D,), ("embed", "mlp"), bias=False, dtype=dtype, key=keys[2])

    def __call__(self, patches):
        x = self.into(patches.pixels.astype(jnp.float32) / 255)

        def body(block, x, _, __):
            return x + jax.nn.gelu(block.linear(x)), None

        x, _ = self.layer_runs[0].scan(body, x, None, None, "none")
        return self.out(x)

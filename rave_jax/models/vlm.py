"""The whole model: embedding, tower, decoder, head."""

from __future__ import annotations

from typing import overload

import jax
import jax.numpy as jnp
from flax import nnx

from rave_jax.attention import CacheType, KvCache, RegionMemory
from rave_jax.batch import Batch, Kind, TokenInfo
from rave_jax.config import require
from rave_jax.families import family_named
from rave_jax.families.config import VlmConfig
from rave_jax.models import lora
from rave_jax.models.config import ModelOptions
from rave_jax.models.decoder import Decoder
from rave_jax.models.layers import ContextEmbedding, Embedding, Linear, product
from rave_jax.models.tower import Tower
from rave_jax.parallel.sharding import shard
from rave_jax.typing import Array, Bool, Float, Int

CONTEXT_KEY = 4
"""What the model's key is folded with for the context tokens."""


class Vlm(nnx.Module):
    """A vision-language model, or a language model when `config.vision` is None.

    Attributes:
        embed: token embedding.
        context: embedding of context tokens, or None.
        vision: tower and merger, or None.
        decoder: text decoder.
        lm_head: output head, or None when it is the embedding table.

    Raises:
        ConfigError: a mechanism or adapter names something the model does not have, two mechanisms own one thing, or
            there are context tokens without a tower.
    """

    def __init__(self, config: VlmConfig, options: ModelOptions, *, key: jax.Array):
        text, dtype = config.text, options.params
        keys = jax.random.split(key, 4)
        self.config = config
        self.options = options
        self.embed = Embedding(text.vocab_size, text.hidden_size, dtype=dtype, key=keys[0])
        self.context: ContextEmbedding | None = nnx.data(_context_embedding(config, options, key))
        self.vision: Tower | None = nnx.data(_tower(config, options, keys[1]))
        self.decoder = Decoder(text, options, key=keys[2])
        head = (text.vocab_size,), (text.hidden_size,)
        self.lm_head: Linear | None = nnx.data(
            None if text.tie_embeddings else Linear(*head, ("vocab", "embed"), bias=False, dtype=dtype, key=keys[3])
        )
        lora.check_targets(options.lora, self._linears())

    def _linears(self) -> list[str]:
        stacks = {"decoder.": self.decoder, "vision.": self.vision}
        return [
            path
            for prefix, stack in stacks.items()
            if stack is not None
            for path in lora.linears(stack.layer_runs[0].layers, prefix)
        ]

    @overload
    def hidden(self, batch: Batch, rows: None = None) -> Float[Array, "B T D"]: ...

    @overload
    def hidden(
        self, batch: Batch, rows: Int[Array, "B N"]
    ) -> tuple[Float[Array, "B T D"], Float[Array, "L B N H S"]]: ...

    def hidden(self, batch: Batch, rows: Int[Array, "B N"] | None = None):
        """Hidden states after the final norm.

        Args:
            batch: rows of packed documents.
            rows: queries, by index, whose attention rows are wanted.

        Returns:
            [B,T,D]; with `rows` also the float32 attention of those queries over all keys in every layer
            [L,B,N,H,S].
        """
        out = self.decoder(self.embedded(batch), batch.info, batch.positions, rows)
        return out.hidden if rows is None else (out.hidden, out.rows)

    def chosen_regions(self, batch: Batch, rows: Int[Array, "B N"]) -> Bool[Array, "L B N H R"]:
        """Which regions of a row the queries `rows`, by index, chose in each layer that routes.

        Raises:
            ValueError: no layer routes.
        """
        out = self.decoder(self.embedded(batch), batch.info, batch.positions, rows)
        if out.chosen is None:
            raise ValueError("no mechanism of the model routes")
        return out.chosen

    def hidden_and_losses(
        self, batch: Batch, progress: Float[Array, ""] | None = None
    ) -> tuple[Float[Array, "B T D"], dict[str, Float[Array, ""]]]:
        """Hidden states after the final norm, and what the mechanisms add to the training loss: sums over these rows by
        name, to be divided by `loss_weights` of all rows that are averaged over.

        Args:
            batch: rows of packed documents.
            progress: of the training run, 0 to 1, for what mechanisms schedule; None is its end.
        """
        out = self.decoder(self.embedded(batch), batch.info, batch.positions, losses=True, progress=progress)
        return out.hidden, out.losses

    def loss_weights(self, info: TokenInfo) -> dict[str, Float[Array, ""]]:
        """The weights of the mechanisms' losses in rows with these token codes, by name; empty where none has any."""
        return self.decoder.loss_weights(info)

    def embedded(self, batch: Batch) -> Float[Array, "B T D"]:
        """Token embeddings with visual and context tokens in their places.

        Raises:
            ValueError: there are patches but no tower.
        """
        x = self.with_context(self.embed(batch.tokens, self.options.compute), batch.info)
        if batch.patches.length > 0:
            if self.vision is None:
                raise ValueError(f"the batch has patches, but a {self.config.family} text model has no vision tower")
            seen = self.vision(batch.patches)
            x = with_pictures(x, seen, batch.info, batch.visual_index)
        return shard(x, "batch", "length", None)

    def with_context(self, x: Float[Array, "B T D"], info: TokenInfo) -> Float[Array, "B T D"]:
        """Embedded tokens with the context tokens in their places, where the model has them."""
        return x if self.context is None else self.context(x, info)

    def head_weight(self) -> Float[Array, "V D"]:
        """The output head's weight: the embedding table when they are tied."""
        return self.embed.weight[...] if self.lm_head is None else self.lm_head.weight[...]

    def logits(self, hidden: Float[Array, "*rows D"]) -> Float[Array, "*rows V"]:
        """Float32 scores of every token."""
        return product(hidden, self.head_weight().astype(hidden.dtype), jnp.dtype(jnp.float32))

    def empty_cache(
        self, rows: int, size: int, kind: CacheType = "compute", regions_in: RegionMemory = "device"
    ) -> KvCache:
        """A cache for `rows` documents of at most `size` tokens, k and v in the number type `kind`, those of regions
        in the memory `regions_in`.

        Raises:
            ConfigError: no mechanism keeps regions that could lie in host memory, or the mesh has several devices.
        """
        return self.decoder.empty_cache(rows, size, kind, self.options.compute, regions_in)

    def decode(
        self, tokens: Int[Array, "B T"], info: TokenInfo, positions: Int[Array, "3 B T"], cache: KvCache
    ) -> tuple[Float[Array, "B T D"], KvCache]:
        """Text tokens that follow what the cache holds. A token with document 0 leaves its row's cache as it was.

        Returns:
            hidden states after the final norm, and the cache.
        """
        x = shard(self.embed(tokens, self.options.compute), "batch", "length", None)
        return self.decoder.cached(x, info, positions, cache)


def _tower(config: VlmConfig, options: ModelOptions, key: jax.Array) -> Tower | None:
    return None if config.vision is None else family_named(config.family).load_tower()(config.vision, options, key=key)


def _context_embedding(config: VlmConfig, options: ModelOptions, key: jax.Array) -> ContextEmbedding | None:
    if options.context is None:
        return None
    require(config.vision is not None, "context", options.context, f"None: a {config.family} text model has no tower")
    # A key of its own, so that a model with and one without start with equal weights.
    key = jax.random.fold_in(key, CONTEXT_KEY)
    return ContextEmbedding(options.context.count, config.text.hidden_size, dtype=options.params, key=key)


def with_pictures(
    x: Float[Array, "B T D"], seen: Float[Array, "B U D"], info: TokenInfo, visual_index: Int[Array, "B T"]
) -> Float[Array, "B T D"]:
    """Embedded tokens with the visual ones replaced by what the tower made of their merge unit (of U in the row)."""
    placed = jnp.take_along_axis(seen, visual_index[..., None], axis=1, mode="clip")
    return jnp.where((info.kind == Kind.VISUAL)[..., None], placed, x)

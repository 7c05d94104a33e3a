"""The whole model: embedding, tower, decoder, head."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from rave_jax.attention import Cache, CacheType, RegionMemory
from rave_jax.batch import Batch, Kind, Patches, TokenInfo
from rave_jax.config import ConfigError, require
from rave_jax.families import family_named
from rave_jax.families.config import VlmConfig
from rave_jax.models import lora
from rave_jax.models.config import ModelOptions
from rave_jax.models.decoder import Decoder
from rave_jax.models.embedding import Embedding
from rave_jax.models.forward import HIDDEN, Chunk, Embedded, ImageFeatures, Output, Want
from rave_jax.models.layers import ContextEmbedding, Linear, LowRank, TiedHead, product
from rave_jax.models.tower import Tower
from rave_jax.parallel.sharding import shard
from rave_jax.typing import Array, Float, Int

CONTEXT_KEY = 4
"""What the model's key is folded with for the context tokens."""
PROJECTOR_KEY = 5
"""What the tower's key is folded with for adapters of what stands behind its layers."""
AROUND_KEY = 6
"""What the model's key is folded with for adapters of the embedding and of the head."""
EMBEDDING, HEAD = "embed", "lm_head"
"""What LoRA's targets call these two."""


class Vlm(nnx.Module):
    """A vision-language model, or a language model when `config.vision` is None.

    Attributes:
        embed: token embedding.
        context: embedding of context tokens, or None.
        vision: tower and merger, or None.
        decoder: text decoder.
        lm_head: output head, or None when it is the embedding table.
        tied_head: what the output head then has of its own, an adapter.

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
        self.decoder = Decoder(text, options, config.deep_layers, key=keys[2])
        sizes = (text.vocab_size,), (text.hidden_size,)
        self.lm_head: Linear | None = nnx.data(
            None if text.tie_embeddings else Linear(*sizes, ("vocab", "embed"), bias=False, dtype=dtype, key=keys[3])
        )
        tied = TiedHead(text.vocab_size, text.hidden_size) if text.tie_embeddings else None
        self.tied_head: TiedHead | None = nnx.data(tied)
        runs = [(run.layers, "decoder.") for run in self.decoder.layer_runs]
        runs += [] if self.vision is None else [(run.layers, "vision.") for run in self.vision.layer_runs]
        linears = [path for layers, prefix in runs for path in lora.linears(layers, prefix)]
        if isinstance(self.vision, nnx.Module):
            behind = lora.projectors(self.vision)
            lora.adapt(behind, options.lora, dtype, jax.random.fold_in(keys[1], PROJECTOR_KEY))
            linears += behind
        head = self.tied_head if self.lm_head is None else self.lm_head
        assert head is not None
        around = {EMBEDDING: self.embed, HEAD: head}
        lora.adapt(around, options.lora, dtype, jax.random.fold_in(key, AROUND_KEY))
        lora.check_targets(options.lora, (*linears, *around))

    def embed_images(self, patches: Patches) -> ImageFeatures:
        """What the tower makes of rows of patches [B,P, ...].

        Raises:
            ValueError: the model has no tower, or the patches are not of the size that it reads.
        """
        if self.vision is None:
            raise ValueError(f"the batch has patches, but a {self.config.family} text model has no vision tower")
        features = self.vision(patches)
        return features if isinstance(features, ImageFeatures) else ImageFeatures(features)

    def empty_features(self, rows: int, units: int) -> ImageFeatures:
        """Zeros in the shape of the features of this many rows and merge units, in the compute type."""
        zeros = jnp.zeros((rows, units, self.config.text.hidden_size), self.options.compute)
        looks = jnp.zeros((rows, units, 2)) if self.options.reads_class_token else None
        return ImageFeatures(zeros, (zeros,) * self.config.deep_layers, looks)

    def embed_tokens(
        self,
        tokens: Int[Array, "B T"],
        info: TokenInfo,
        features: ImageFeatures | None = None,
        visual_index: Int[Array, "B T"] | None = None,
    ) -> Embedded:
        """Token embeddings with visual and context tokens in their places, and what the decoder adds to them.

        Args:
            tokens, info: of the tokens.
            features: of the rows' pictures; None where no token is visual.
            visual_index: which merge unit of `features` a visual token is; None where every token is text.

        Raises:
            ValueError: there are features and no `visual_index`, or the features have additions to more or fewer layers
                than the decoder makes.
        """
        if features is not None and visual_index is None:
            raise ValueError("features of pictures were given without visual_index, which says whose they are")
        x = self.embed(tokens, self.options.compute)
        if visual_index is not None and self.context is not None:
            x = self.context(x, info)
        if visual_index is None or features is None:
            return Embedded(shard(x, "batch", "length", None))
        wanted = self.config.deep_layers
        if len(features.deep) != wanted:
            raise ValueError(f"the features have additions to {len(features.deep)} layers, expected {wanted}")
        visual = info.kind == Kind.VISUAL
        placed = jnp.take_along_axis(features.tokens, visual_index[..., None], axis=1, mode="clip")
        x = shard(jnp.where(visual[..., None], placed, x), "batch", "length", None)
        unit = jnp.where(visual, visual_index, features.tokens.shape[1])
        return Embedded(x, features.deep, unit) if wanted else Embedded(x)

    def embedded(self, batch: Batch) -> Embedded:
        """Token embeddings of a batch with its visual and context tokens in their places, as the decoder takes them.

        Raises:
            ValueError: there are patches but no tower.
        """
        features = self.embed_images(batch.patches) if batch.patches.length > 0 else None
        return self.embed_tokens(batch.tokens, batch.info, features, batch.visual_index)

    def forward(self, batch: Batch, want: Want = HIDDEN) -> Output:
        """Whole rows of packed documents at once.

        Args:
            batch: the rows.
            want: what is asked for beside hidden states.

        Raises:
            ValueError: there are patches but no tower.
        """
        return self.decoder(self.embedded(batch), batch.info, batch.positions, want)

    def prefill[C: Cache](
        self,
        batch: Batch,
        cache: C,
        region_offset: Int[Array, "B T"] | None = None,
        wanted: Int[Array, "B N"] | None = None,
        want: Want = HIDDEN,
    ) -> tuple[Output, C]:
        """Prompts with their pictures, one document per row, into a cache that holds nothing of these rows.

        Args:
            batch: the prompts.
            cache: for them.
            region_offset: as in `Chunk`.
            wanted: tokens, by index, whose hidden states are wanted; None: all.
            want: what is asked for beside hidden states; as in `Decoder.extend`.

        Returns:
            what was asked for, with hidden states of the wanted tokens after the final norm, and the cache.

        Raises:
            ValueError: there are patches but no tower, or losses are asked for.
        """
        x = self.embedded(batch)
        return self.decoder.extend(x, batch.info, batch.positions, cache, region_offset, wanted, want)

    def extend[C: Cache](
        self,
        chunk: Chunk,
        cache: C,
        features: ImageFeatures | None = None,
        wanted: Int[Array, "B N"] | None = None,
        want: Want = HIDDEN,
        lengths: tuple[tuple[int, ...], ...] | None = None,
    ) -> tuple[Output, C]:
        """Tokens that follow what the cache holds. A token with document 0 leaves its row's cache as it was.

        Args:
            chunk: the tokens.
            cache: what came before.
            features: of the rows' pictures; None where no token is visual.
            wanted: tokens, by index, whose hidden states are wanted; None: all.
            want, lengths: as in `Decoder.extend`.

        Returns:
            what was asked for, with hidden states of the wanted tokens after the final norm, and the cache.
        """
        x = self.embed_tokens(chunk.tokens, chunk.info, features, chunk.visual_index)
        return self.decoder.extend(x, chunk.info, chunk.positions, cache, chunk.region_offset, wanted, want, lengths)

    def loss_weights(self, info: TokenInfo) -> dict[str, Float[Array, ""]]:
        """The weights of the mechanisms' losses in rows with these token codes, by name; empty where none has any."""
        return self.decoder.loss_weights(info)

    def head_weight(self) -> Float[Array, "V D"]:
        """The output head's weight: the embedding table when they are tied."""
        return self.embed.weight[...] if self.lm_head is None else self.lm_head.weight[...]

    def head_adapter(self) -> LowRank | None:
        """What LoRA adds to the output head's weight; None without it."""
        head = self.tied_head if self.lm_head is None else self.lm_head
        return None if head is None or head.adapter is None else head.adapter.low_rank()

    def logits(self, hidden: Float[Array, "*rows D"]) -> Float[Array, "*rows V"]:
        """Float32 scores of every token."""
        wide, adapter = jnp.dtype(jnp.float32), self.head_adapter()
        scores = product(hidden, self.head_weight().astype(hidden.dtype), wide)
        if adapter is None:
            return scores
        low = product(hidden, adapter.down.astype(hidden.dtype), hidden.dtype)
        return scores + product(low, adapter.up.astype(hidden.dtype), wide)

    def empty_cache(
        self,
        rows: int,
        size: int,
        kind: CacheType = "compute",
        regions_in: RegionMemory = "device",
        max_kept: int | None = None,
    ) -> Cache:
        """A cache for `rows` documents of at most `size` tokens, k and v in the number type `kind`, those of regions
        in the memory `regions_in`. Behind a layer after which tokens leave it has room for `max_kept` (None: all).

        Raises:
            ConfigError: no mechanism keeps regions that could lie in host memory, or the mesh has several devices.
        """
        return self.decoder.empty_cache(rows, size, kind, self.options.compute, regions_in, max_kept)


def _tower(config: VlmConfig, options: ModelOptions, key: jax.Array) -> Tower | None:
    reading = next((mechanism.called for mechanism in options.mechanisms if mechanism.reads_class_token), None)
    if reading is not None and (config.vision is None or not config.vision.class_looks):
        raise ConfigError(
            f"mechanisms: {reading} reads what the class token of the vision tower looks at, and that of this "
            f"{config.family} model has none, or does not say; remove {reading}, or take a model that says it "
            "(docs/attention.md, the mechanisms)"
        )
    return None if config.vision is None else family_named(config.family).load_tower()(config.vision, options, key=key)


def _context_embedding(config: VlmConfig, options: ModelOptions, key: jax.Array) -> ContextEmbedding | None:
    if options.context is None:
        return None
    require(config.vision is not None, "context", options.context, f"None: a {config.family} text model has no tower")
    # A key of its own, so that a model with and one without start with equal weights.
    key = jax.random.fold_in(key, CONTEXT_KEY)
    return ContextEmbedding(options.context.count, config.text.hidden_size, dtype=options.params, key=key)

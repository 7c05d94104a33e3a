"""The programs of generation, each pure: pictures are seen, prompts are read, answers are written; and before a prompt
is read, what mechanisms ask of it is found.

All take the state of the slots and give it back changed; the host calls them with donated state. Their shapes are the
buckets', so what is compiled does not depend on what is asked.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from rave_jax.attention import Cache, CacheType, RegionMemory, RegionReach
from rave_jax.batch import Kind, Patches, Role, TokenInfo
from rave_jax.inference.prompted import PromptNumbers, empty_numbers, found_numbers, with_numbers
from rave_jax.inference.sampling import RowSampling, choose
from rave_jax.models.forward import Chunk, ImageFeatures
from rave_jax.models.vlm import Vlm
from rave_jax.parallel.sharding import shard
from rave_jax.typing import Array, Bool, Float, Int

NOTHING = -1
"""Stands where no token was given out."""
BROKEN = -2
"""Stands where no token could be chosen: a logit was NaN or infinite."""


class SlotState(NamedTuple):
    """What the device knows of every slot. Letters as everywhere; N prompts are read together, at most E ids stop one.

    Fields:
        cache: keys of prompts and answers.
        pictures: features of the prompts that are being read (N of them), in the order of `visual_index`.
        seen: ids that stand in the slot's prompt or answer.
        token: the last token chosen, not yet in the cache.
        position: its rotary position, equal in all three axes.
        turn: its turn in the conversation.
        count: tokens of the answer so far.
        limit: most tokens of the answer.
        active: is the answer unfinished?
        stops: ids that end the answer; -1 fills up.
        sampling: how tokens are chosen.
        numbers: what mechanisms asked of the slot's prompt.
    """

    cache: Cache
    pictures: ImageFeatures
    seen: Bool[Array, "B V"]
    token: Int[Array, "B"]
    position: Int[Array, "B"]
    turn: Int[Array, "B"]
    count: Int[Array, "B"]
    limit: Int[Array, "B"]
    active: Bool[Array, "B"]
    stops: Int[Array, "B E"]
    sampling: RowSampling
    numbers: PromptNumbers = ()


class Pictures(NamedTuple):
    """Some whole frames of N prompts. `offset` is the first visual token they become, in each row."""

    patches: Patches
    offset: Int[Array, "N"]


class Admission(NamedTuple):
    """Which prompts are read and how they are to be answered.

    Fields:
        slot: where each goes; rows that hold no prompt stand last and have the number of slots.
        begins: is this the prompt's first chunk?
        last: where in the chunk the prompt's last token stands; -1 if not in this chunk.
        position, turn, limit, stops, sampling: as in `SlotState`, for the answer's first token.
    """

    slot: Int[Array, "N"]
    begins: Bool[Array, "N"]
    last: Int[Array, "N"]
    position: Int[Array, "N"]
    turn: Int[Array, "N"]
    limit: Int[Array, "N"]
    stops: Int[Array, "N E"]
    sampling: RowSampling


def empty_state(
    model: Vlm,
    slots: int,
    size: int,
    prompts: int,
    visual: int,
    stops: int,
    cache: CacheType,
    regions_in: RegionMemory = "device",
    max_kept: int | None = None,
) -> SlotState:
    """Slots with nothing in them.

    Args:
        model: the model; only its shapes are read.
        slots, size: rows of the cache and tokens each holds.
        prompts: how many are read together.
        visual: most visual tokens of a prompt.
        stops: most ids that end one answer.
        cache: number type of the cache.
        regions_in: memory of its regions' keys and values.
        max_kept: entries of a row behind layers after which tokens leave; None: `size`.

    Raises:
        ConfigError: as `Vlm.empty_cache`.
    """
    zeros = jnp.zeros(slots, jnp.int32)
    ones = jnp.ones(slots, jnp.float32)
    state = SlotState(
        cache=model.empty_cache(slots, size, cache, regions_in, max_kept),
        pictures=model.empty_features(prompts, visual),
        seen=jnp.zeros((slots, model.config.text.vocab_size), bool),
        token=zeros,
        position=zeros,
        turn=zeros,
        count=zeros,
        limit=zeros,
        active=jnp.zeros(slots, bool),
        stops=jnp.full((slots, stops), NOTHING, jnp.int32),
        sampling=RowSampling(
            temperature=0 * ones,
            top_k=zeros,
            top_p=ones,
            min_p=0 * ones,
            repetition_penalty=ones,
            seed=jnp.zeros(slots, jnp.uint32),
        ),
        numbers=empty_numbers(model, slots, size),
    )
    return settled(state)


def settled(state: SlotState) -> SlotState:
    """The state where the sharding rules want it, after every program alike: else each would be compiled twice."""
    ruled: dict[str, Any] = {
        "cache": state.cache.placed(),
        "pictures": jax.tree.map(lambda x: shard(x, "batch", None, None), state.pictures),
        "seen": shard(state.seen, "batch", "vocab"),
    }
    rest = {name: x for name, x in state._asdict().items() if name not in ruled}
    return SlotState(**ruled, **jax.tree.map(lambda x: shard(x, *[None] * x.ndim), rest))


def encode_images(model: Vlm, state: SlotState, pictures: Pictures) -> tuple[SlotState]:
    """Put frames through the tower and keep their visual tokens for the chunks that hold them."""
    features = model.embed_images(pictures.patches)
    N, U, _ = features.tokens.shape
    patches = pictures.patches
    mixed = patches.weight.shape[-1] > 0
    real = jnp.any(patches.weight != 0, axis=-1) if mixed else patches.frame[:, :: patches.length // U] > 0
    size = state.pictures.tokens.shape[1]
    where = jnp.where(real, pictures.offset[:, None] + jnp.arange(U, dtype=jnp.int32), size)

    def keep(old: Array, new: Array) -> Array:
        return old.at[jnp.arange(N)[:, None], where].set(new.astype(old.dtype), mode="drop")

    kept = jax.tree.map(keep, state.pictures, features)
    return (settled(state._replace(pictures=kept)),)


def study(
    model: Vlm,
    state: SlotState,
    seen: Chunk,
    blind: Chunk | None,
    content: Bool[Array, "N T"] | None,
    slot: Int[Array, "N"],
    *,
    most: int,
) -> tuple[SlotState]:
    """Find what mechanisms ask of N prompts whose pictures are seen.

    Args:
        model: the model.
        state: of the slots.
        seen: the prompts, whole.
        blind: the same without their pictures; None where nothing asks for them.
        content: which tokens belong to content words; None where nothing asks for it.
        slot: where each will go; rows that hold no prompt have the number of slots.
        most: tokens that a slot holds.
    """
    features = state.pictures if state.pictures.tokens.shape[1] else None
    found = found_numbers(model, seen, blind, features, most, content)
    kept = jax.tree.map(lambda old, new: old.at[slot].set(new, mode="drop"), state.numbers, found)
    return (settled(state._replace(numbers=kept)),)


def prefill(
    model: Vlm,
    state: SlotState,
    chunk: Chunk,
    admission: Admission,
    *,
    reach: int,
    regions: RegionReach | None = None,
    lengths: tuple[tuple[int, ...], ...] | None = None,
) -> tuple[SlotState, Int[Array, "N"]]:
    """Read the next chunk of N prompts. Where a prompt ends, its answer's first token is chosen.

    Args:
        model: the model.
        state: of the slots.
        chunk: the tokens; the slots they go to have room for T more within `reach`.
        admission: whose tokens they are.
        reach: entries of each row of the cache that the chunk may see.
        regions: regions of the cache that it may see; None of a cache without.
        lengths: as in `Decoder.extend`; None where no tokens leave.

    Returns:
        the state, and the answers' first tokens; -1 where the prompt goes on, or the answer is empty; -2 where a logit
        is not finite.
    """
    B = state.seen.shape[0]
    begins = admission.begins
    part = state.cache.take(admission.slot, reach, regions, model.decoder.reaches(reach, lengths))
    # From entry 0 on: what is left there of the answer before counts as not written.
    part = part.emptied(begins)

    features = state.pictures if state.pictures.tokens.shape[1] else None
    mine = jax.tree.map(lambda x: jnp.take(x, admission.slot, axis=0, mode="clip"), state.numbers)
    numbered = with_numbers(model, mine)
    last, part = numbered.extend(chunk, part, features, admission.last[:, None], lengths=lengths)
    cache = state.cache.put(part, admission.slot)

    rows = jnp.arange(len(begins))
    ids = jnp.where(chunk.info.document > 0, chunk.tokens, state.seen.shape[1])
    seen = jnp.where(begins[:, None], False, jnp.take(state.seen, admission.slot, axis=0, mode="clip"))
    seen = seen.at[rows[:, None], ids].set(True, mode="drop")
    count = jnp.zeros_like(admission.limit)
    logits = model.logits(last.hidden[:, 0])
    first, sound = choose(logits, admission.sampling, seen, count), finite(logits)
    stopped = jnp.any(first[:, None] == admission.stops, axis=1) | ~sound
    ends = admission.last >= 0
    seen = seen.at[rows, first].max(ends)

    def enter(old: Array, new: Array) -> Array:
        return old.at[jnp.where(ends, admission.slot, B)].set(new.astype(old.dtype), mode="drop")

    state = state._replace(
        cache=cache,
        seen=state.seen.at[admission.slot].set(seen, mode="drop"),
        token=enter(state.token, first),
        position=enter(state.position, admission.position),
        turn=enter(state.turn, admission.turn),
        count=enter(state.count, count + 1),
        limit=enter(state.limit, admission.limit),
        active=enter(state.active, ~stopped & (admission.limit > 1)),
        stops=enter(state.stops, admission.stops),
        sampling=jax.tree.map(enter, state.sampling, admission.sampling),
    )
    return settled(state), shard(jnp.where(ends & ~stopped, first, jnp.where(ends & ~sound, BROKEN, NOTHING)), None)


def decode(
    model: Vlm,
    state: SlotState,
    alive: Bool[Array, "B"],
    steps: Int[Array, ""],
    eager: Bool[Array, ""],
    *,
    reach: int,
    width: int,
    lengths: tuple[tuple[int, ...], ...] | None = None,
) -> tuple[SlotState, Int[Array, "B W"], Int[Array, ""]]:
    """Let every active answer grow by up to `steps` tokens, each the choice after a pass over the one before.

    Args:
        model: the model.
        state: of the slots.
        alive: slots whose answer nobody has ended from outside.
        steps: at most `width`.
        eager: end as soon as one answer does, so that its slot can be used.
        reach: entries of each row of the cache that may be read and written; the answers stay within it.
        width: W, columns of the result.
        lengths: as in `Decoder.extend`, of entries; None where no tokens leave.

    Returns:
        the state, the tokens in order with -1 where none came and -2 where a logit was not finite, which ends the
        answer, and how many steps were run.
    """
    begun, whole = state.active & alive, state.cache
    numbered = with_numbers(model, state.numbers)
    state = state._replace(active=begun, cache=whole.take(None, reach, reaches=model.decoder.reaches(reach, lengths)))
    out = jnp.full((len(begun), width), NOTHING, jnp.int32)

    def unfinished(carry: tuple[Array, Array, SlotState]) -> Bool[Array, ""]:
        step, _, now = carry
        return (step < steps) & jnp.any(now.active) & ~(eager & jnp.any(begun & ~now.active))

    def advance(carry: tuple[Array, Array, SlotState]) -> tuple[Array, Array, SlotState]:
        step, out, now = carry
        info = _answer_info(now)
        positions = jnp.broadcast_to(now.position[None, :, None], (3, len(begun), 1))
        last, cache = numbered.extend(Chunk(now.token[:, None], info, positions), now.cache, lengths=lengths)
        logits = model.logits(last.hidden[:, 0])
        chosen, sound = choose(logits, now.sampling, now.seen, now.count), finite(logits)
        given = now.active & sound & ~jnp.any(chosen[:, None] == now.stops, axis=1)
        column = jnp.where(given, chosen, jnp.where(now.active & ~sound, BROKEN, NOTHING))
        count = now.count + given
        now = now._replace(
            cache=cache,
            seen=now.seen.at[jnp.arange(len(begun)), chosen].max(given),
            token=jnp.where(given, chosen, now.token),
            position=now.position + now.active,
            count=count,
            active=given & (count < now.limit),
        )
        return step + 1, out.at[:, step].set(column), now

    ran, out, state = jax.lax.while_loop(unfinished, advance, (jnp.int32(0), out, state))
    return settled(state._replace(cache=whole.put(state.cache, None))), shard(out, None, None), ran


def clear(model: Vlm, state: SlotState, slot: Int[Array, "1"]) -> tuple[SlotState]:
    """Zeros in everything that is kept for a slot. Leftovers of an answer that was not finite would reach the next one
    through attention: 0 times NaN is NaN."""
    part = state.cache.take(slot, state.cache.size)
    cache = state.cache.put(jax.tree.map(jnp.zeros_like, part), slot)
    return (settled(state._replace(cache=cache, pictures=jax.tree.map(jnp.zeros_like, state.pictures))),)


def finite(logits: Float[Array, "B V"]) -> Bool[Array, "B"]:
    """Rows in which every logit, as the model gives it, is a finite number."""
    return jnp.all(jnp.isfinite(logits), axis=-1)


def _answer_info(now: SlotState) -> TokenInfo:
    """Codes [B,1] of the tokens to read next: text of the response. Finished and empty slots are padding."""
    zeros = jnp.zeros_like(now.token)
    codes = TokenInfo(*[zeros] * len(TokenInfo._fields))._replace(
        document=now.active.astype(jnp.int32),
        offset=now.cache.length,
        kind=jnp.where(now.active, Kind.TEXT, Kind.PAD),
        role=jnp.where(now.active, Role.RESPONSE, Role.NONE),
        turn=now.turn,
    )
    return jax.tree.map(lambda code: code[:, None].astype(jnp.int32), codes)

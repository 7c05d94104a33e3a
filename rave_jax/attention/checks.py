"""Which mechanisms cannot share a layer, and which kernels cannot serve them: refusals in the words of configs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import get_args

from rave_jax.attention.base import AttentionDims, Mechanism, Owned, overrides
from rave_jax.attention.functions import against_tpu, reads_score, terms_of
from rave_jax.config import ConfigError
from rave_jax.kernels import support
from rave_jax.kernels.attention import Implementation, Term

DOES: dict[Owned, str] = {
    "positions": "sets the rotary positions of tokens",
    "query": "lets other queries meet some of the keys",
    "order": "counts tokens in another order",
    "hi": "lets tokens see later ones",
    "opening": "shows keys to queries beyond the causal mask",
    "factor": "changes the weight of a key after the softmax",
    "route": "chooses the regions that a query reads",
    "tokens": "lets tokens leave after the layer",
}
"""What a mechanism does that owns this."""


USES = {
    "key_groups": "weighs or measures groups of keys from their log-sum-exps",
    "factor": DOES["factor"],
}
"""What a mechanism does that overrides this hook; of other hooks the name says it."""


def name_of(mechanism: Mechanism) -> str:
    """What errors call a mechanism: the class in the config that it was built from."""
    return type(mechanism).__name__ if mechanism.declared is None else mechanism.declared.called


def check_owners(mechanisms: Sequence[Mechanism], terms: Sequence[tuple[Term, ...]]) -> None:
    """Refuse two mechanisms of a layer that own one thing, and one that changes what another needs unchanged.

    Args:
        mechanisms: of the layer.
        terms: what each adds to the scores (`terms_of`).

    Raises:
        ConfigError: names the configs, says why, and what to do.
    """
    for thing in get_args(Owned):
        owners = [mechanism for mechanism in mechanisms if thing in mechanism.OWNS]
        _check_alone(owners, DOES[thing])
        needing = [mechanism for mechanism in mechanisms if thing in mechanism.NEEDS]
        if owners and needing:
            pair = (needing[0], owners[0])
            first, second = map(name_of, pair)
            raise ConfigError(f"{first} cannot share a layer with {second}, which {DOES[thing]}; {_remedy(pair)}")
    reading = [mechanism for mechanism, own in zip(mechanisms, terms, strict=True) if reads_score(own)]
    _check_alone(reading, "adds a function of the score <q, k> itself")
    wanting = [mechanism for mechanism in mechanisms if "terms" in mechanism.WANTS]
    if wanting and not any(terms):
        raise ConfigError(
            f"{name_of(wanting[0])}, with the fields that it has, needs in each of its layers another mechanism "
            "that adds score terms, and a layer has none; add one to these layers (docs/attention.md lists what each "
            "mechanism does)"
        )


def _check_alone(owners: Sequence[Mechanism], does: str) -> None:
    """Refuse more than one mechanism that does this."""
    if len(owners) <= 1:
        return
    names = [name_of(mechanism) for mechanism in owners]
    share = f"{' and '.join(names)} cannot share a layer"
    if len(set(names)) == 1:
        share = f"{names[0]} cannot stand {'twice' if len(names) == 2 else f'{len(names)} times'} in a layer"
    raise ConfigError(f"{share}: each {does}, and only one mechanism of a layer may; {_remedy(owners)}")


def check_hooks(mechanisms: Sequence[Mechanism]) -> None:
    """Refuse two mechanisms that override `reweigh`, and one that overrides a hook which another of the layer shuts.

    Raises:
        ConfigError: names the configs, says why, and what to do.
    """
    _check_alone([mechanism for mechanism in mechanisms if overrides(mechanism, "reweigh")], "changes rows of weights")
    for mechanism in mechanisms:
        for other in mechanisms:
            hook = next((hook for hook in mechanism.SHUTS if other is not mechanism and overrides(other, hook)), None)
            if hook is not None:
                does = USES.get(hook, f"overrides the hook {hook!r}")
                raise ConfigError(
                    f"{name_of(mechanism)} cannot share a layer with {name_of(other)}, which {does}; "
                    f"{_remedy((mechanism, other))}"
                )


def _remedy(mechanisms: Sequence[Mechanism]) -> str:
    """What a user can do where these are in one layer."""
    own = [m.declared.apart for m in mechanisms if m.declared is not None and m.declared.apart is not None]
    return f"remove one of them, or {own[0] if own else 'give them different layers (their field `layers`)'}"


def check_kernels(mechanisms: Sequence[Mechanism], implementation: Implementation, dims: AttentionDims) -> None:
    """Refuse what the fused kernels do not serve, where these are asked for or, on a TPU, taken by themselves: a score
    function that they cannot run; and in a layer that routes, where these alone are asked for, key groups.

    Args:
        mechanisms: of the layer.
        implementation: of all attention.
        dims: sizes of the layer.

    Raises:
        ConfigError: names the configs.
    """
    if implementation == "pallas_tpu" or (implementation == "auto" and support.target().platform == "tpu"):
        for mechanism in mechanisms:
            against = against_tpu(terms_of(mechanism, dims))
            if against is not None:
                raise ConfigError(
                    f"attention is {implementation!r}, whose kernels on TPUs cannot serve {name_of(mechanism)}: "
                    f"{against}; write the function with other operations, or set attention to 'xla', which computes "
                    "every pair of a row"
                )
    routing = [mechanism for mechanism in mechanisms if overrides(mechanism, "route")]
    if implementation != "pallas_tpu" or not routing:
        return
    for mechanism in mechanisms:
        if overrides(mechanism, "key_groups"):
            raise ConfigError(
                f"attention is 'pallas_tpu', which cannot serve {name_of(mechanism)} in a layer with "
                f"{name_of(routing[0])}: its kernels for chosen regions know no key groups; "
                "set attention to 'auto' or 'xla', or give them different layers"
            )

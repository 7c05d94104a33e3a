"""Parameters by name: paths, logical axes, shardings, sizes, and where a layer's tensor stands in its stack.

Paths (axis letters of `rave_jax.typing`; `{s}` numbers the layer runs of a stack, whose parameters have a layer axis in
front of the shape given here; biases exist where the family has them):

    embed.weight [V,D]
    context.weight [count,D]                                                    with context tokens
    decoder.layer_runs.{s}.layers.attention.query.weight [H,h,D]   .bias [H,h]
    decoder.layer_runs.{s}.layers.attention.{key,value}.weight [K,h,D]   .bias [K,h]
    decoder.layer_runs.{s}.layers.attention.output.weight [D,H,h]
    decoder.layer_runs.{s}.layers.attention.{query_norm,key_norm}.weight [h]      with q/k norm
    decoder.layer_runs.{s}.layers.mlp.{gate,up}.weight [F,D]   mlp.down.weight [D,F]
    decoder.layer_runs.{s}.layers.mlp.router.weight [E,D]                         with experts, and then
    decoder.layer_runs.{s}.layers.mlp.{gate,up}.weight [E,F,D]   mlp.down.weight [E,D,F]
    decoder.layer_runs.{s}.layers.{attention_norm,mlp_norm}.weight [D]
    decoder.layer_runs.{s}.layers.attention.query.weight [H,2,h,D]                with an output gate
    decoder.layer_runs.{s}.layers.delta.qkv.weight [C,D]   delta.conv [C,taps]    with the gated delta rule; C channels
    decoder.layer_runs.{s}.layers.delta.{gate [H,v,D], strength [H,D], decay [H,D], output [D,H,v]}.weight
    decoder.layer_runs.{s}.layers.delta.{decay_log [H], decay_bias [H], norm.weight [v]}   delta_norm.weight [D]
    decoder.layer_runs.{s}.layers.mechanisms.{i}.<parameter of the mechanism>
    decoder.layer_runs.{s}.layers.extra_mlp.{down [W,D], up [D,W]}                with an extra mlp
    decoder.norm.weight [D]
    lm_head.weight [V,D]                                                        unless tied
    vision.patch.weight [D,C]
    vision.layer_runs.{s}.layers.attention.qkv.weight [3,H,h,D]   .bias [3,H,h]
    vision.layer_runs.{s}.layers.attention.output.weight [D,H,h]   .bias [D]
    vision.layer_runs.{s}.layers.mlp.{gate,up}.{weight [F,D], bias [F]}   mlp.down.{weight [D,F], bias [D]}
    vision.layer_runs.{s}.layers.{attention_norm,mlp_norm}.weight [D]
    vision.merger.norm.weight [D]   vision.merger.{first,second}.{weight,bias}
    vision.table.weight [side * side,D]                                         with a table of positions
    vision.deep_mergers.{n}.norm.{weight,bias}   .{first,second}.{weight,bias}    with DeepStack
    <any linear of a layer>.adapter.{down [r,*in], up [*out,r]}                 with LoRA
    <gate, up or down of experts>.adapter.{down [E,r,in], up [E,out,r]}
    {embed,lm_head}.adapter.{down [r,D], up [V,r]}                              of a tied head: tied_head.adapter
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from rave_jax.families.base import TensorRule
from rave_jax.models.vlm import Vlm
from rave_jax.parallel.sharding import Axes, named_sharding


class Location(NamedTuple):
    """Where a checkpoint's tensor stands: a parameter, and for a stacked one the layer's index in it."""

    path: str
    index: int | None


def _is_variable(x: Any) -> bool:
    return isinstance(x, nnx.Variable)


def _dotted(keys: tuple[Any, ...]) -> str:
    return ".".join(str(getattr(k, "name", getattr(k, "idx", getattr(k, "key", k)))) for k in keys)


def named_parameters(module: nnx.Module) -> dict[str, nnx.Param]:
    """Every parameter by its dotted path, in a fixed order. Works on abstract modules of `jax.eval_shape` too."""
    leaves = jax.tree_util.tree_flatten_with_path(module, is_leaf=_is_variable)[0]
    return {_dotted(keys): leaf for keys, leaf in leaves if isinstance(leaf, nnx.Param)}


def with_values[M: nnx.Module](module: M, values: Mapping[str, Any]) -> M:
    """`module` with the parameters at these paths replaced; the others are kept.

    Raises:
        KeyError: a path the module does not have.
        ValueError: a value of another shape.
    """
    known = named_parameters(module)
    unknown = sorted(set(values) - set(known))
    if unknown:
        raise KeyError(f"no such parameters: {', '.join(unknown)}")
    wrong = [
        f"{p} is {values[p].shape}, expected {known[p].shape}" for p in values if values[p].shape != known[p].shape
    ]
    if wrong:
        raise ValueError("; ".join(wrong))

    def swap(keys: tuple[Any, ...], leaf: Any) -> Any:
        path = _dotted(keys)
        return leaf.replace(values[path]) if path in values else leaf

    return jax.tree_util.tree_map_with_path(swap, module, is_leaf=_is_variable)


def param_axes(param: nnx.Param) -> Axes:
    """Logical axes of a parameter, "layers" first when it is stacked."""
    axes: Axes = param.get_metadata()["axes"]
    return ("layers", *axes) if len(param.shape) == len(axes) + 1 else axes


def shardings[M: nnx.Module](module: M, mesh: Mesh) -> M:
    """The module's pytree with a NamedSharding in the place of every parameter's array."""

    def place(leaf: Any) -> Any:
        if not isinstance(leaf, nnx.Param):
            return NamedSharding(mesh, jax.sharding.PartitionSpec())
        return leaf.replace(named_sharding(param_axes(leaf), leaf.shape, mesh))

    return jax.tree.map(place, module, is_leaf=_is_variable)


def mark_unused(module: nnx.Module) -> None:
    """Mark every parameter of a module as one that nothing is computed with. Checkpoints have them, so they are kept as
    they are: no training changes them, weight decay included."""
    for param in named_parameters(module).values():
        param.set_metadata(unused=True)


def is_unused(param: nnx.Param) -> bool:
    """Was the parameter marked by `mark_unused`, or made as one that no gradient reaches (`Dyvte`)?"""
    return bool(param.get_metadata().get("unused"))


def count(module: nnx.Module) -> int:
    """Numbers in all parameters."""
    return sum(math.prod(p.shape) for p in named_parameters(module).values())


def num_bytes(module: nnx.Module) -> int:
    """Bytes of all parameters."""
    return sum(math.prod(p.shape) * p.dtype.itemsize for p in named_parameters(module).values())


def locate(model: Vlm, rule: TensorRule) -> Location:
    """The parameter that holds this tensor of a checkpoint.

    Raises:
        KeyError: the model has no such layer.
    """
    if rule.stack is None:
        return Location(rule.path, None)
    stack = model.decoder if rule.stack == "decoder" else model.vision
    assert stack is not None and rule.layer is not None
    for number, run in enumerate(stack.layer_runs):
        if run.start <= rule.layer < run.stop:
            return Location(f"{rule.stack}.layer_runs.{number}.layers.{rule.path}", rule.layer - run.start)
    raise KeyError(f"{rule.hf_key}: the model's {rule.stack} has no layer {rule.layer}")

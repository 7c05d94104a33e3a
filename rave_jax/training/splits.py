"""What a mesh may split of a model and of rows, known before anything is compiled."""

from __future__ import annotations

from jax.sharding import AbstractMesh, Mesh

from rave_jax.config import require
from rave_jax.models.decoder_layer import DeltaLayer
from rave_jax.models.vlm import Vlm
from rave_jax.parallel import context, residual
from rave_jax.training.config import TrainConfig


def check_splits(config: TrainConfig, model: Vlm, mesh: Mesh | AbstractMesh) -> None:
    """Refuse mesh axes that the model or its rows cannot be split over.

    Args:
        config: of the run.
        model: with numbers or without.
        mesh: of the run.

    Raises:
        ConfigError: names the axis, or the field of the rows.
    """
    _check_tokens(config, mesh)
    _check_context(config, model, mesh.shape["context"])
    _check_experts(model, mesh.shape["expert"])


def _check_tokens(config: TrainConfig, mesh: Mesh | AbstractMesh) -> None:
    stages = {f"data.stages.{number}.tokens": stage.tokens for number, stage in enumerate(config.data.stages)}
    rows = {"data.tokens": config.data.tokens} | {field: n for field, n in stages.items() if n is not None}
    for field, tokens in rows.items():
        context.check_tokens(tokens, mesh.shape["context"], field)
        if config.model.sequence_parallel:
            residual.check_tokens(tokens, mesh.shape["context"], mesh.shape["tensor"], field)


def _check_context(config: TrainConfig, model: Vlm, parts: int) -> None:
    if parts == 1:
        return
    if any(isinstance(run.layers, DeltaLayer) for run in model.decoder.layer_runs):
        expected = "1: the model's layers with the gated delta rule read a row from its first token to its last"
        require(False, "mesh.context", parts, expected)
    for one in config.model.mechanisms:
        expected = f"1: {one.called} lets tokens leave, which is decided over whole rows"
        require(not one.drops, "mesh.context", parts, expected)


def _check_experts(model: Vlm, parts: int) -> None:
    if parts == 1:
        return
    experts = model.decoder.experts
    count = 0 if experts is None else experts.count
    require(
        count > 0, "mesh.expert", parts, "1: the model has no experts, and mesh.fsdp splits rows and parameters too"
    )
    require(count % parts == 0, "mesh.expert", parts, f"a divisor of the model's {count} experts")

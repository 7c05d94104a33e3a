"""The quickstart with context tokens: four learnable tokens behind every picture, which see it alone."""

import dataclasses

import quickstart

from rave_jax.evaluation.config import Eval
from rave_jax.layout import ContextTokens
from rave_jax.training.config import TrainConfig


def get_config() -> TrainConfig:
    """Budgets of tokens hold four more; all else is the quickstart's."""
    base = quickstart.get_config()
    context = ContextTokens(count=4)
    final = tuple(
        dataclasses.replace(step, tokens=step.tokens + context.count) if isinstance(step, Eval) else step
        for step in base.final
    )
    return dataclasses.replace(
        base,
        output_dir="runs/quickstart_context",
        model=dataclasses.replace(base.model, context=context),
        data=dataclasses.replace(base.data, tokens=base.data.tokens + context.count),
        final=final,
    )

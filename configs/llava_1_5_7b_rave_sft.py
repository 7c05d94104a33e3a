"""Fine-tune LLaVA-1.5-7B with RAVE on your own data, on a TPU slice.

Point `init.path` at the HuggingFace directory (llava-1.5-7b-hf) and `data.sources` at your conversations. A picture
takes 576 visual tokens and 577 patches, whatever its size. The tower is frozen, as it was when LLaVA was trained; the
projector and the decoder learn. The gate starts at zero, so the first step computes exactly the released model.
"""

from rave_jax.attention import Rave
from rave_jax.data.config import DataConfig
from rave_jax.data.sources import LlavaJson
from rave_jax.models.config import ModelOptions
from rave_jax.parallel.mesh import MeshConfig
from rave_jax.training.config import TrainConfig
from rave_jax.training.init import FromHF
from rave_jax.training.optimizers import OptimizerConfig, ParameterGroup


def get_config() -> TrainConfig:
    """One row is one conversation of at most 2,048 tokens with one or two pictures."""
    return TrainConfig(
        output_dir="runs/llava_1_5_7b_rave_sft",
        init=FromHF("checkpoints/llava-1.5-7b-hf"),
        model=ModelOptions(mechanisms=(Rave(rank=16),), remat="full", param_dtype="float32", compute_dtype="bfloat16"),
        data=DataConfig(
            sources=(LlavaJson(path="data/conversations.json", image_dir="data/images"),),
            rows=128,
            tokens=2048,
            patches=1280,
            workers=8,
            prefetch=4,
        ),
        optimizer=OptimizerConfig(
            learning_rate=2e-5,
            warmup=100,
            groups=(
                ParameterGroup(name="tower", pattern=r"^vision\.(?!projector)", frozen=True),
                ParameterGroup(name="gate", pattern=r"\.mechanisms\.", learning_rate=5.0),
            ),
        ),
        mesh=MeshConfig(fsdp=-1, tensor=4),
        steps=5000,
        loss_chunk=512,
        log_every=10,
        save_every=500,
    )

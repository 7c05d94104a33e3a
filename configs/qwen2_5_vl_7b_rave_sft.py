"""Fine-tune Qwen2.5-VL-7B-Instruct with RAVE on your own data, on a TPU slice.

Point `init.path` at the HuggingFace directory and `data.sources` at your conversations: a LLaVA-style file with an
image folder as below, or `HfParquet(path="...")` for parquet with embedded images. The tower is frozen; the gate starts
at zero, so the first step computes exactly the released model, and learns at five times the backbone's rate.
"""

from rave_jax.attention import Rave
from rave_jax.data.config import DataConfig
from rave_jax.data.packing.config import Packing
from rave_jax.data.sources import LlavaJson
from rave_jax.models.config import ModelOptions
from rave_jax.parallel.mesh import MeshConfig
from rave_jax.training.algorithms import AdamW
from rave_jax.training.config import TrainConfig
from rave_jax.training.init import FromHF
from rave_jax.training.optimizers import OptimizerConfig, ParameterGroup


def get_config() -> TrainConfig:
    """A row is packed with conversations, at most 4,096 tokens with pictures of at most 1,024 visual tokens each."""
    return TrainConfig(
        output_dir="runs/qwen2_5_vl_7b_rave_sft",
        init=FromHF("checkpoints/Qwen2.5-VL-7B-Instruct"),
        # dots_and_attention computes nothing again: v5e:16x16 has room for it, v6e:8x8 hardly (BENCHMARKS.md).
        model=ModelOptions(
            mechanisms=(Rave(rank=16),), remat="attention", param_dtype="float32", compute_dtype="bfloat16"
        ),
        data=DataConfig(
            sources=(LlavaJson(path="data/conversations.json", image_dir="data/images"),),
            rows=128,
            tokens=4096,
            patches=8192,
            packing=Packing(long="cut"),
            max_pixels=1024 * 28 * 28,
            workers=8,
            prefetch=4,
        ),
        optimizer=OptimizerConfig(
            learning_rate=1e-5,
            warmup=100,
            algorithm=AdamW(beta2=0.95),
            weight_decay=0.01,
            groups=(
                ParameterGroup(name="tower", pattern=r"^vision\.", frozen=True),
                ParameterGroup(name="gate", pattern=r"\.mechanisms\.", learning_rate=5.0, weight_decay=0.0),
            ),
        ),
        # Sums over two devices send a third of those over four (BENCHMARKS.md).
        mesh=MeshConfig(fsdp=-1, tensor=2),
        steps=5000,
        loss_chunk=512,
        log_every=10,
        save_every=500,
    )

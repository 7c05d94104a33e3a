"""rave_jax: multimodal decoders with pluggable attention, trained with shardings on TPU."""

__version__ = "0.1.0"

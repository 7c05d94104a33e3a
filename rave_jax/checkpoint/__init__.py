"""Checkpoints: HuggingFace directories in and out, native ones, and the store of a run."""

"""The `rave-jax` command."""

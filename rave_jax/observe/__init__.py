"""What a run shows and writes down. Receives plain numbers and imports nothing else of rave_jax."""

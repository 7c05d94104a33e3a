"""Model code: leaf modules, rotary positions, decoder, towers, families of checkpoints."""

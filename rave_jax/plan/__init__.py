"""What a config needs and moves on TPUs, from the program that the TPU's own compiler makes of it."""

"""The training engine: optimizer, the one call of deepspeed.initialize, and the training step."""

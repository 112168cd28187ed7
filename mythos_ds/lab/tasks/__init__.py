"""Tasks whose samples are made, not read."""

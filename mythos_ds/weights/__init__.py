"""Tensors on disk: safetensors, model folders, pickled files read without executing them, checksums."""

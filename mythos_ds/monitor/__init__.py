"""Metrics: the record on disk, TensorBoard as a view of it, the progress line, memory."""

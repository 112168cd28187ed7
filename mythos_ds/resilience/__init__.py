"""Signals and failures: how a run stops cleanly, and how all its processes end together."""

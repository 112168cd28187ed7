"""Acceptance of a GPU machine: the checks of `python -m tools.gpu_acceptance`, and tests of what runs them."""

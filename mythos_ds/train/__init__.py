"""The training loop and what surrounds it: schedule, run directory, evaluation, statistics."""

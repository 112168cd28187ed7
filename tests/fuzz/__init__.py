"""Damaged, hostile and senseless input for all that reads: `make fuzz`, `make fuzz SEED=3 COUNT=500 ONLY=config`.

A case is (seed, target, number) and the same wherever it runs. `targets.py` says what is tried and what counts as
handled, `mutators.py` how input is damaged, `worker.py` runs cases in long-lived processes.
"""

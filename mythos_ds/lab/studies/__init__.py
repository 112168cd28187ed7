"""The studies that tools/lab.py runs: which arms are trained, and what is made of their results."""

"""The studies that `mythos-ds lab` runs: which arms are trained, and what is made of their results."""

"""What a run costs, computed from its configuration alone: parameters, FLOPs, cache. Imports no torch."""

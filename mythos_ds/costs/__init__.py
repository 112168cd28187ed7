"""What a run costs, computed from its configuration alone: parameters, FLOPs, cache, pipeline. Imports no torch."""

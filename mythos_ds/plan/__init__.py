"""What a run needs on a cluster: memory, traffic, time, cost and layouts."""

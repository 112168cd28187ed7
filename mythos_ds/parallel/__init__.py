"""Process groups, expert parallelism and the exchange of routing counts. Built on DeepSpeed and torch.distributed."""

"""The hosts of a run: the hostfile, and the checks before a run starts."""

"""The checks of hosts, devices and links before a run starts."""

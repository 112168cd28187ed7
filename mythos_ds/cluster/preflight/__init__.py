"""What launch/preflight.py looks at before a run starts."""

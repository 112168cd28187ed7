"""What `mythos-ds preflight` looks at before a run starts."""

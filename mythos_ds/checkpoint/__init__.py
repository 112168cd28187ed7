"""Saving and loading of training state: DeepSpeed's sharded files inside an atomically published directory."""

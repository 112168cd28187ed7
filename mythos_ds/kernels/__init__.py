"""Fast functions on tensors that know neither the configuration nor the model."""

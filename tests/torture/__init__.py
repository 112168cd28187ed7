"""Jobs in pairs into one output, and jobs that are killed: what survives is what an undisturbed job writes."""

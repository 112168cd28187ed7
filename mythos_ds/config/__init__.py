"""Configuration: one strict JSON file per run, checked whole before anything starts. Imports no torch."""

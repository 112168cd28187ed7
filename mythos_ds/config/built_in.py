"""The name of what travels with the package. It imports nothing, as the start of every command reads it."""

BUILT_IN = "tiny"
"""The trained model that is installed with the package."""

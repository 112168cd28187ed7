"""Text from a trained model: generation, and the rules by which a token leaves the loop early."""

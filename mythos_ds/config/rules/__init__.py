"""Rules between settings: each says what is wrong with one key, or None."""

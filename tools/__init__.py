"""Mains: each parses arguments, calls the package and prints."""

"""Mains and job files that start training on a machine or a cluster."""

"""Measurements on real engines, against which the planner's predictions are held."""

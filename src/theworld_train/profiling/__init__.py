"""Profiling: where the time and the memory of a run's own training steps go, measured."""

"""Sweeps: trials of a stage or pipeline at many points, chosen by Optuna, each a launch of its own."""

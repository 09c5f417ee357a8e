"""Measuring a checkpoint on held-out samples, whole and with parts of it taken away."""

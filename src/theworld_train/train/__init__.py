"""Training: freezing, the step, the loop, and what is written to disk."""

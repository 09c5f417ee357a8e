"""What a run's data hold, counted and shown before anything trains on them."""

"""Whether a machine is ready to train: what is installed, what it has, what is known to go wrong, and what to do."""

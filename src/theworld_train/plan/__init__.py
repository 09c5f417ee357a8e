"""Planning: what a run will take of a GPU, worked out by running the trainer's own step over fake tensors."""

"""A project of the user's own: commented configs for all stages, a pipeline and data to begin with."""

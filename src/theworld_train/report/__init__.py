"""Reports: one page of what a run, a pipeline or a sweep has come to, from its files alone."""

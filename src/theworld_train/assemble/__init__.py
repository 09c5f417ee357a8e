"""Composition: from a run config to the objects of a run; the only package that knows them all."""

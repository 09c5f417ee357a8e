"""Stages one after the other, each a process of its own."""

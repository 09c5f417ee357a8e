"""Arithmetic: parameter counts, sizes and token counts as pure functions, without a framework."""

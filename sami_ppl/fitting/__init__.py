"""Fits: stages, plans of stages, where they start, their checkpoints."""

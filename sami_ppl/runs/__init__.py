"""Runs: what the commands do, their folders and their reports."""

"""Distributions that NumPyro has not, and what is known of supports."""

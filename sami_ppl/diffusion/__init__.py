"""Noise levels, denoisers, samplers: diffusion without a code."""

"""Programs: prior, denoiser and encoder as one NumPyro model with its guide."""

from sami_ppl.program.program import Program as Program

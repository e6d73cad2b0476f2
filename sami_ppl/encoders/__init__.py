"""Encoders: noisy posteriors q(z | x_λ, λ), and the families of which they are."""

from sami_ppl.encoders import families as families

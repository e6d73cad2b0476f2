"""Noise levels, denoisers, samplers, inversion: diffusion that knows of no code."""

from sami_ppl._util.tensors import TensorFileError as TensorFileError
from sami_ppl._util.tensors import read_tensors as read_tensors
from sami_ppl.diffusion.denoiser import AbstractDenoiser as AbstractDenoiser
from sami_ppl.diffusion.diffusers import from_diffusers as from_diffusers
from sami_ppl.diffusion.latents import autoencoder_from_diffusers as autoencoder_from_diffusers
from sami_ppl.diffusion.latents import has_autoencoder as has_autoencoder
from sami_ppl.diffusion.latents import to_images as to_images
from sami_ppl.diffusion.latents import to_latents as to_latents

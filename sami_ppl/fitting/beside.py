"""Codes that a variational autoencoder has found, for a guided decoder.

A Gaussian decoder N(m(z), s² I) must tell at once, from the code alone, what an image is; so its code holds what of the
image can be foretold, and on clothes it tells more of classes than one that guidance alone has shaped (docs/panel.md).
The encoder is fitted beside a Gaussian decoder under the same prior, which is then given up. Its guide is kept
(`OwnGuideEncoder`), and the noisy posteriors that guide the denoiser are fitted to it (`warm_start(source="guide")`).
"""

from collections.abc import Callable
from typing import Literal

import jax
from jaxtyping import Array, Key

from sami_ppl._util.history import History
from sami_ppl.decoders.conditional import IsotropicDenoiser
from sami_ppl.nn import AscendingDiT, AscendingUNet, DiT, ResidualMLP, UNet
from sami_ppl.nn.masked import unmasked
from sami_ppl.program.build import unet_size
from sami_ppl.program.program import Program
from sami_ppl.program.transformers import transformer_size

Start = Literal["components", "gaussian"]


def check_start(program: Program, start: Start, *, clusters: bool, steps: int) -> None:
    """Raise ValueError for another word, and for "gaussian" with a program or a warm start that it is not for."""
    if start not in ("components", "gaussian"):
        raise ValueError(f"start must be 'components' or 'gaussian', got {start!r}")
    if start == "gaussian" and (program.of_sequences or clusters or not steps):
        what = "a program of sequences" if program.of_sequences else "warm_clusters" if clusters else "warm_steps=0"
        raise ValueError(f"start='gaussian' does not go with {what}: write start='components', or change that")


def beside_gaussian(
    program: Program, stage: Callable[..., tuple[Program, History]], *, key: Key[Array, ""]
) -> tuple[Program, History]:
    """The program with the encoder, and the parameters of the prior, that a stage fits beside a Gaussian decoder.

    `stage`: a function of a program, with the arguments `name` and `key`.
    """
    decoder_key, stage_key = jax.random.split(key)
    peer = program.replace(denoiser=gaussian_decoder(program, key=decoder_key))
    fitted, history = stage(peer, name="gaussian", key=stage_key)
    return program.replace(encoder=fitted.encoder, prior_params=fitted.prior_params), history


def gaussian_decoder(program: Program, *, key: Key[Array, ""]) -> IsotropicDenoiser:
    """A fresh Gaussian decoder for the codes and observations of a program, of the kind of its denoiser's network."""
    shape, size = program.event_shape, program.latents.size
    mean, std = program.denoiser.statistics or (0.0, 1.0)
    theirs = unmasked(getattr(program.denoiser, "network", None))
    if isinstance(theirs, UNet):
        network = AscendingUNet(size, shape, **unet_size(shape), key=key)
    elif isinstance(theirs, DiT):
        network = AscendingDiT(size, shape, **transformer_size(shape), key=key)
    else:
        network = ResidualMLP((size,), shape, width=512, depth=3, noise=False, key=key)
    return IsotropicDenoiser(
        network, program.denoiser.schedule, shape, size, mean=mean, std=std, seen=program.denoiser.seen
    )

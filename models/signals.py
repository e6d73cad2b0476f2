"""Signals: windows of an electrocardiogram, by networks that convolve along time; `--data` takes others.

The recording, of 1,024 numbers, is that of the package PyWavelets, `pywt.data.ecg()`. Windows of it start anywhere, the
last quarter is for testing. Others' signals: a Dataset with x on (obs, channel, length), or vectors, which
`network="unet"` takes for signals of one channel.
"""

from dataclasses import dataclass
from typing import Literal

import jax
import numpy as np
from numpyro import distributions as dist
from scipy.signal import find_peaks
import xarray as xr

import sami_ppl as sp


@dataclass(frozen=True)
class Config:
    """Settings; `length` of a window in samples of the recording."""

    length: int = 128
    latents: int = 4
    decoder: Literal["guided", "conditioned", "gaussian"] = "guided"
    network: Literal["mlp", "unet", "hybrid"] = "unet"
    widths: tuple[int, ...] | None = None


def load(config: Config, *, key: jax.Array) -> xr.Dataset:
    """All windows of the recording, in units of its spread; none for training overlaps with one for testing.

    `phase` is the share of a heartbeat that has passed at the middle of a window (period 1), between its peaks.
    """
    try:
        from pywt import data  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ValueError(
            "the signals of this program come with PyWavelets: pip install PyWavelets, or give your own by --data"
        ) from error
    recording = np.asarray(data.ecg(), np.float32)
    if not 8 <= config.length <= len(recording) // 8:
        raise ValueError(f"length must be from 8 to {len(recording) // 8} samples, got {config.length}")
    recording = (recording - recording.mean()) / recording.std()
    windows = np.lib.stride_tricks.sliding_window_view(recording, config.length)
    cut, start = len(recording) * 3 // 4, np.arange(len(windows))
    kept = (start + config.length <= cut) | (start >= cut)
    peaks, _ = find_peaks(recording, height=recording.max() / 2, distance=40)
    before, after = (
        2 * peaks[0] - peaks[1],
        2 * peaks[-1] - peaks[-2],
    )  # beats beyond the recording, as long as the next
    phase = np.interp(start + config.length / 2, [before, *peaks, after], range(-1, len(peaks) + 1)) % 1
    data = xr.Dataset(
        {
            "x": (("obs", "channel", "sample"), windows[kept, None].copy()),
            "phase": ("obs", phase[kept].astype(np.float32), {"period": 1.0}),
        },
        coords={"split": ("obs", np.where(start[kept] < cut, "train", "test"))},
    )
    return data.isel(obs=np.asarray(jax.random.permutation(key, data.sizes["obs"])))  # figures are of the first of them


def build(config: Config, data: xr.Dataset, *, key: jax.Array) -> sp.Program:
    """The program: independent standard normal factors, and networks along the signal."""
    prior = sp.factors(z=dist.Normal(0, 1).expand([config.latents]), dims={"z": "factor"})
    size = {} if config.widths is None else {"widths": config.widths}
    return sp.autoencoder(
        prior, data, decoder=config.decoder, network=config.network, size=size, progress=False, key=key
    )

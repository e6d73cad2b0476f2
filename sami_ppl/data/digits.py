"""Handwritten digits of 8×8 pixels: 1,797 images that come with scikit-learn, so that nothing is downloaded.

Source: test part of *Optical Recognition of Handwritten Digits* (Alpaydin & Kaynak 1998, UCI repository), as
`sklearn.datasets.load_digits`.
"""

import numpy as np
import xarray as xr


def digits() -> xr.Dataset:
    """The images x (obs 1797, channel 1, row 8, column 8), float32 in [−1, 1], and the label `digit` (obs), int."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    x = (images / 8.0 - 1.0).astype(np.float32).reshape(-1, 1, 8, 8)
    return xr.Dataset({"x": (("obs", "channel", "row", "column"), x), "digit": ("obs", labels.astype(np.int64))})

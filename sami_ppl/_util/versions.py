"""Versions of this library and of those whose change may change a result."""

from importlib import metadata
import platform

LIBRARIES = ("sami_ppl", "jax", "jaxlib", "numpyro", "equinox", "optax", "numpy", "xarray", "arviz")


def versions() -> dict[str, str]:
    """Name → version, Python included."""
    return {"python": platform.python_version(), **{name: metadata.version(name) for name in LIBRARIES}}

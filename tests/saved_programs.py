"""A program of a file, and tools of the tests that save and load programs."""

import json

import equinox as eqx
import jax
import numpy as np
import xarray as xr

DATA = xr.Dataset({"x": (("obs", "feature"), np.eye(4, dtype=np.float32))})
PROGRAM_FILE = '''
"""Vectors: a small program with a bounded factor."""

from dataclasses import dataclass

import jax
import numpyro
from numpyro import distributions as dist

from sami_ppl import DiagonalEncoder, PreconditionedDenoiser, Program, VariancePreserving
from sami_ppl.nn import ResidualMLP


@dataclass(frozen=True)
class Inner:
    depth: int = 1


@dataclass(frozen=True)
class Config:
    latents: int = 2
    inner: Inner = Inner()


def make_prior(latents):
    def prior():
        numpyro.sample("z", dist.Normal(0, 1).expand([latents]).to_event(1))
        PRIOR

    return prior


def build(config, data, *, key):
    keys = jax.random.split(key, 3)
    schedule, shape = VariancePreserving(-4.0, 4.0), data["x"].shape[1:]
    size = {"width": 4, "depth": config.inner.depth}
    denoiser = PreconditionedDenoiser(ResidualMLP(shape, shape, **size, key=keys[0]), schedule, shape)
    network = ResidualMLP(shape, (3,), **size, key=keys[1])
    encoder = DiagonalEncoder(network, schedule, shape, config.latents + EXTRA, key=keys[2])
    return Program(make_prior(config.latents), denoiser, encoder)
'''


def leaves(tree):
    return [np.asarray(leaf) for leaf in jax.tree.leaves(eqx.filter(tree, eqx.is_array))]


def same(a, b):
    pairs = list(zip(leaves(a), leaves(b), strict=True))
    return bool(pairs) and all(np.array_equal(u, v) and u.dtype == v.dtype for u, v in pairs)


def shifted(program):
    """The same structure with other arrays."""
    return jax.tree.map(lambda a: a + 1 if eqx.is_inexact_array(a) else a, program)


def edit(folder, **changes):
    file = folder / "program.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))

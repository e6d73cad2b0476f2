"""Programs that were never fitted are told of; fitted ones, exact ones and those of other networks are not."""

from dataclasses import replace
import warnings

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
from numpyro import distributions as dist
import pytest
import xarray as xr

import sami_ppl as sp
from sami_ppl.calibration import simulation_based_calibration
from sami_ppl.decoders.exact import LinearGaussian
from sami_ppl.diagnostics.fitted import NotFittedWarning, not_fitted
from sami_ppl.nn import DiT, HalfUNet, ResidualMLP, UNet, ViT

KEY = jax.random.key(0)
SCHEDULE = sp.VariancePreserving()
STEPS = sp.Stage(steps=2, batch=8)  # the first one has the rate 0, from which it rises


def normal():
    numpyro.sample("z", dist.Normal(0, 1).expand([2]).to_event(1))


def made(networks):
    shape = (1, 8, 8)
    if networks == "mlp":
        trunk, network = (ResidualMLP(shape, out, width=8, depth=2, key=KEY) for out in ((6,), shape))
    elif networks == "dit":
        trunk, network = ViT(shape, (6,), width=8, depth=1, key=KEY), DiT(shape, width=8, depth=1, key=KEY)
    else:
        trunk, network = HalfUNet(shape, (6,), widths=(8,), key=KEY), UNet(shape, widths=(8,), key=KEY)
    return sp.Program(
        normal,
        sp.PreconditionedDenoiser(network, SCHEDULE, shape),
        sp.DiagonalEncoder(trunk, SCHEDULE, shape, 2, key=KEY),
        sampler=sp.DDIM(2),
    )


@pytest.fixture(params=["mlp", "unet", "dit"])
def program(request):
    return made(request.param)


@pytest.fixture
def x():
    return np.random.default_rng(0).normal(size=(20, 1, 8, 8)).astype(np.float32)


def as_dataset(x):
    return xr.Dataset({"x": (("obs", "channel", "row", "column"), x)})


USES = {
    "posterior": lambda program, x, folder: sp.posterior(program, x, key=KEY, draws=2, predictive=0, levels=0),
    "encode": lambda program, x, folder: sp.encode(program, as_dataset(x), folder / "codes.zarr", progress=False),
    "decode": lambda program, x, folder: sp.decode(program, np.zeros((2, 2)), jax.random.split(KEY, 2)),
    "generate": lambda program, x, folder: sp.generate(program, key=KEY, size=2, guided=False),
    "calibration": lambda program, x, folder: simulation_based_calibration(program, key=KEY, simulations=2, draws=2),
}


@pytest.mark.slow
@pytest.mark.parametrize("use", USES)
def test_what_was_never_fitted_is_told_of(use, x, tmp_path):
    with pytest.warns(NotFittedWarning, match=r"denoiser and the encoder .* never been fitted.* sp\.fit\(") as found:
        USES[use](made("mlp"), x, tmp_path)
    (warning,) = [w for w in found if w.category is NotFittedWarning]
    assert warning.filename == __file__, "it points at the call"


@pytest.mark.slow
@pytest.mark.parametrize("train", [("denoiser",), ("encoder",), ("denoiser", "encoder")])
@pytest.mark.filterwarnings("ignore::sami_ppl.diagnostics.CollapseWarning")
def test_a_step_is_a_fit(program, x, train):
    """Of the part that was trained."""
    assert not_fitted(program) == ["denoiser", "encoder"]
    fitted, _ = sp.fit(program, x, replace(STEPS, train=train), key=KEY, progress=False)
    assert not_fitted(fitted) == [part for part in ("denoiser", "encoder") if part not in train]


@pytest.mark.slow
def test_a_warm_start_is_a_fit(program, x):
    started = sp.warm_start(program, x, key=KEY, steps=2, batch=8, progress=False)
    assert not_fitted(started) == ["denoiser"]


@pytest.mark.slow
def test_encoders_around_encoders_are_seen_through(program, x):
    turning = program.replace(encoder=sp.TurningEncoder(program.encoder))
    assert not_fitted(turning) == ["denoiser", "encoder"]


@pytest.mark.slow
def test_programs_without_our_networks_are_left_alone():
    model = LinearGaussian(jnp.eye(3)[:, :2], 0.5, SCHEDULE)
    exact = sp.Program(normal, model.denoiser, model.mean_field_encoder, sampler=sp.DDIM(2))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sp.generate(exact, key=KEY, size=2)
    assert not_fitted(exact) == []


@pytest.mark.slow
def test_a_program_with_one_trained_block_is_fitted(program):
    """The control: it is no matter of one block."""
    blocks = program.denoiser.network
    last = {
        ResidualMLP: lambda n: n.blocks[-1].outer.bias,
        UNet: lambda n: n.middle.conv2.weight,
        DiT: lambda n: n.blocks[-1].modulate.bias,
    }
    touched = eqx.tree_at(last[type(blocks)], blocks, replace_fn=lambda leaf: jax.tree.map(lambda a: a + 1e-6, leaf))
    assert not_fitted(program.replace(denoiser=eqx.tree_at(lambda d: d.network, program.denoiser, touched))) == [
        "encoder"
    ]

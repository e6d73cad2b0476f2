"""Loss and gradients against PyTorch's double backward, in float64, on networks with the same weights.

`tests/data/pytorch_parity.npz` holds weights (integers in units of 1/64), inputs, and what PyTorch found:
evenly spaced entries of every array of gradients, in float32. It is made by `benchmarks/pytorch_reference.py`.
"""

import functools
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sami_ppl.decoders import guidance as guidance_module
from sami_ppl.decoders.bound import noise_error
from sami_ppl.decoders.guidance import guidance
from sami_ppl.diffusion.denoiser import PreconditionedDenoiser
from sami_ppl.diffusion.schedule import VariancePreserving
from sami_ppl.encoders.encoder import DiagonalEncoder
from sami_ppl.nn import HalfUNet, ResidualMLP, UNet

pytestmark = pytest.mark.slow

GOLDEN = dict(np.load(Path(__file__).parent / "data" / "pytorch_parity.npz"))
SHAPE, SCHEDULE, STATISTICS = (2, 8, 8), VariancePreserving(-4.0, 4.0), {"mean": 0.2, "std": 0.7}
KEY = jax.random.key(0)
TRUNKS = {
    "half": lambda: HalfUNet(SHAPE, (5,), widths=(10, 12), key=KEY),
    "mlp": lambda: ResidualMLP(SHAPE, (5,), width=6, depth=1, key=KEY),
}


def name_of(path):
    return jax.tree_util.keystr(path, simple=True, separator=".")


def with_weights(module, prefix):
    """The module with every array leaf as the file has it, in float64."""

    def weight(path, leaf):
        return jnp.asarray(GOLDEN[f"{prefix}.{name_of(path)}"] / 64) if eqx.is_inexact_array(leaf) else leaf

    return jax.tree_util.tree_map_with_path(weight, module)


def value_and_gradients(pair):
    """Summed noise error of three observations, z being the encoder's own draw, and its gradients by name.

    The first pair trains both networks, the second its encoder alone.
    """
    kind = "guided" if pair == "half" else "none"
    with jax.enable_x64(True):
        encoder = DiagonalEncoder(TRUNKS[pair](), SCHEDULE, SHAPE, 2, **STATISTICS, key=KEY)
        denoiser = PreconditionedDenoiser(UNet(SHAPE, widths=(10, 12), key=KEY), SCHEDULE, SHAPE, **STATISTICS)
        networks = {
            "denoiser": with_weights(denoiser, "denoiser"),
            "encoder": with_weights(encoder, f"{pair}/encoder"),
        }
        params, static = eqx.partition(networks, eqx.is_inexact_array)
        trained = params if kind == "guided" else {"encoder": params["encoder"]}
        x, eps, noise, log_snr = (jnp.asarray(GOLDEN[k], float) for k in ("x", "eps", "noise", "log_snr"))

        def loss(trained):
            networks = eqx.combine(jax.lax.stop_gradient(params) | trained, static)

            def one(x, eps, noise, log_snr):
                loc, scale = networks["encoder"].posterior(x)
                z = loc + scale * noise
                return noise_error(networks["denoiser"], networks["encoder"], x, z, log_snr, eps)

            return jax.vmap(one)(x, eps, noise, log_snr).sum()

        value, gradient = jax.jit(jax.value_and_grad(loss))(trained)
        leaves = jax.tree_util.tree_leaves_with_path(gradient)
        return float(value), {name_of(path): np.asarray(leaf) for path, leaf in leaves}


@functools.cache
def ours(pair):
    return value_and_gradients(pair)


def disagreements(pair, gradients):
    """Per array, the largest difference to PyTorch's gradient over its largest entry.

    The encoder's location moves with z itself, so that its bias has gradient zero up to rounding: entries below 1e-6
    of the largest of all arrays count as that large.
    """
    prefix = f"{pair}/gradient/"
    expected = {name.removeprefix(prefix): array for name, array in GOLDEN.items() if name.startswith(prefix)}
    assert expected.keys() == gradients.keys()
    floor = 1e-6 * max(np.abs(array).max() for array in expected.values())
    found = {}
    for name, want in expected.items():
        got = gradients[name].ravel()[:: max(1, gradients[name].size // 128)]
        assert got.shape == want.shape, name
        found[name] = np.abs(got - want).max() / max(np.abs(want).max(), floor)
    return found


@pytest.mark.parametrize("pair", TRUNKS)
def test_loss_and_gradients_are_pytorchs(pair):
    """The loss to 1e-10, every gradient to 1e-6: the file's single precision."""
    value, gradients = ours(pair)
    assert value == pytest.approx(float(GOLDEN[f"{pair}/loss"]), rel=1e-10)
    found = disagreements(pair, gradients)
    assert max(found.values()) < 1e-6, max(found, key=found.get)


@pytest.mark.parametrize("breakage", ["wrong sign", "detached z"])
def test_wrong_rules_are_caught(breakage, monkeypatch):
    """Negative controls: guidance of the wrong sign, and a guidance that z does not train, miss by more than 1 %."""
    pair = "mlp"
    if breakage == "wrong sign":
        monkeypatch.setattr(guidance_module, "guidance", lambda *arguments: -guidance(*arguments))
    else:
        original = DiagonalEncoder.posterior
        detached = lambda self, x: jax.lax.stop_gradient(original(self, x))  # noqa: E731
        monkeypatch.setattr(DiagonalEncoder, "posterior", detached)
    value, gradients = value_and_gradients(pair)
    found = disagreements(pair, gradients)
    encoder = [error for name, error in found.items() if name.startswith("encoder")]
    assert np.median(encoder) > 1e-2
    if breakage == "wrong sign":
        assert value != pytest.approx(float(GOLDEN[f"{pair}/loss"]), rel=1e-4)

"""Frames of sequences: gaps in the bound, noisy posteriors, and the potentials of families."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats
from sequence_priors import FEATURES, KEY, D, T, frames, normal, smooth

import sami_ppl as sp
from sami_ppl import families
from sami_ppl.decoders.bound import bound, prior_loss
from sami_ppl.decoders.exact import LinearGaussian
from sami_ppl.diagnostics.gain import noise_errors
from sami_ppl.encoders.frames import FramewiseDenoiser, FramewiseEncoder
from sami_ppl.encoders.law import DiagonalLaw, GaussianLaw
from sami_ppl.fitting.objective import ScoreELBO

pytestmark = pytest.mark.slow


def test_a_missing_frame_is_left_out_of_the_bound():
    """The bound of a sequence with a gap is that of the frames left, on the same noise; gradients are finite."""
    model, rng = frames(), np.random.default_rng(0)
    x, z, eps = (jnp.asarray(rng.normal(size=(3, size)), jnp.float32) for size in (FEATURES, D, FEATURES))
    level = (jnp.asarray(0.5), jnp.asarray(25.0))

    def value(x, z, eps):
        networks = FramewiseDenoiser(model.denoiser, len(x)), FramewiseEncoder(model.encoder, len(x))
        return bound(*networks, x, z.reshape(-1), *level, eps)

    keep = jnp.array([0, 2])
    gap, left = value(x.at[1].set(jnp.nan), z, eps), value(x[keep], z[keep], eps[keep])
    for one, other in zip(gap, left, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6)
    slope = jax.grad(lambda z: value(x.at[1].set(jnp.nan), z, eps).total)(z)
    assert np.isfinite(slope).all()
    np.testing.assert_array_equal(slope[1], 0)


def test_a_missing_frame_counts_nothing_at_the_noisy_end():
    """The KL there is that of the frames left, also where the range ends early and a frame of 0 would count."""
    schedule, x = sp.VariancePreserving(-1.0, 4.0), jnp.arange(3.0 * FEATURES).reshape(3, FEATURES)
    gap, left = prior_loss(schedule, x.at[1].set(jnp.nan)), prior_loss(schedule, x[jnp.array([0, 2])])
    np.testing.assert_allclose(gap, left, rtol=1e-6)
    assert prior_loss(schedule, 0 * x[1]) > 0.05


def test_the_noisy_posterior_of_frames_is_the_gaussian_of_all_of_them(mlp):
    """Location and scale, or root, are those of its log density: diagonal frames, and full ones behind a rotation."""
    schedule = sp.VariancePreserving(-4.0, 4.0)
    diagonal = sp.DiagonalEncoder(mlp(4, 6, key=KEY), schedule, (4,), D, key=KEY)
    turned = sp.AffineEncoder(diagonal, jnp.array([[0.6, -0.8], [0.8, 0.6]]))
    x, z, level = (
        0.5 * jax.random.normal(k, s) for k, s in zip(jax.random.split(KEY, 3), ((3, 4), (3 * D,), ()), strict=True)
    )
    for frame in (diagonal, turned):
        encoder = FramewiseEncoder(frame, 3)
        q = encoder.distribution(encoder.parameters(x, level))
        loc, root = np.asarray(q.mean), np.asarray(q.root)
        density = stats.multivariate_normal(loc, root @ root.T).logpdf(z)
        np.testing.assert_allclose(encoder.log_prob(z, x, level), density, rtol=1e-4)


def test_gradients_are_finite_with_gaps(tiny_program):
    """In all networks, where some sequences have gaps; errors of single bands of noise too."""
    program = sp.over_time(tiny_program(), smooth)
    x = np.random.default_rng(0).normal(size=(4, T, 4)).astype(np.float32)
    x[1, 2:4] = np.nan
    loss = lambda params: ScoreELBO().loss(KEY, params, program.model, program.guide, x)  # noqa: E731
    slopes = jax.jit(jax.grad(loss))(program.params())
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(slopes))
    assert all(np.isfinite(part).all() for part in jax.jit(lambda key: noise_errors(program, x, key))(KEY))


def test_a_frame_is_no_less_certain_than_the_prior():
    """Posteriors wider than the prior, of a diagonal and of a full encoder: capped, and the mean stays."""
    frame = LinearGaussian(jnp.eye(2), 1.0, sp.VariancePreserving(-6.0, 6.0)).encoder

    class Wide(type(frame)):
        def parameters(self, x_noisy, log_snr):
            return x_noisy, jnp.array([1.5, 0.5]) if self.diagonal else jnp.array([[1.5, 0.0], [0.4, 0.5]])

        def distribution(self, parameters):
            return (DiagonalLaw if self.diagonal else GaussianLaw)(*parameters)

    for Wide.diagonal in (True, False):
        encoder = FramewiseEncoder(Wide(frame.model), 1)
        centre, precision = encoder.potentials(jnp.array([[0.3, -0.2]]))
        values = np.linalg.eigvalsh(precision[0])
        np.testing.assert_allclose(values[0], 1e-2, rtol=1e-3)
        assert values[1] > 1
        mean = np.linalg.solve(np.eye(2) + precision[0], precision[0] @ centre[0])
        np.testing.assert_allclose(mean, encoder.frame.posterior(jnp.array([0.3, -0.2]))[0], rtol=1e-4)


def test_families_of_gaussians_give_the_potentials_of_their_covariance(mlp):
    """Diagonal, low-rank and full: precision and mean by the covariance of the family's own distribution."""
    schedule = sp.VariancePreserving(-4.0, 4.0)
    for family in (families.Diagonal, families.LowRank, families.Full):
        settings = {"families": {"z": family}, "key": KEY}
        frame = sp.FamilyEncoder(mlp(4, 6, key=KEY), schedule, (4,), sp.read_prior(normal), **settings)
        x = jnp.array([0.3, -0.2, 1.0, 0.1])
        q = frame.families[0].distribution(frame.parameters(*frame.clean(x))["z"])
        cov = q.covariance_matrix if hasattr(q, "covariance_matrix") else jnp.diag(q.variance)
        centre, precision = FramewiseEncoder(frame, 1).potentials(x[None])
        capped = np.linalg.eigvalsh(np.linalg.inv(cov) - np.eye(2)).min() < 1e-2
        if not capped:
            np.testing.assert_allclose(precision[0], np.linalg.inv(cov) - np.eye(2), rtol=2e-3, atol=1e-3)
        mean = np.linalg.solve(np.eye(2) + precision[0], precision[0] @ centre[0])
        np.testing.assert_allclose(mean, q.mean, rtol=1e-3, atol=1e-4)

"""Laws of the code: draws, densities, moments and the laws of single sites say the same."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
from numpyro import distributions as dist
import pytest
from scipy import stats

from sami_ppl.distributions.gaussian import Affine, gaussian_root
from sami_ppl.distributions.relaxed import LogRatios
from sami_ppl.encoders.law import AffineLaw, DiagonalLaw, FramesLaw, GaussianLaw, WholeLaw

KEY = jax.random.key(0)
LOC = jnp.asarray([0.3, -1.0, 2.0])
ROOT = jnp.asarray([[0.5, 0.3, 0.0], [-0.4, 0.8, 0.2], [0.1, 0.0, 1.1]])
TURN = jnp.asarray(np.linalg.qr(np.random.default_rng(0).normal(size=(3, 3)))[0], jnp.float32)
SITES = [SimpleNamespace(name=n, start=a, size=b - a, code=slice(a, b)) for n, a, b in (("a", 0, 1), ("b", 1, 3))]
LAWS = {
    "diagonal": DiagonalLaw(LOC, jnp.asarray([0.5, 0.8, 0.3])),
    "full": GaussianLaw(LOC, ROOT),
    "rotated": AffineLaw(DiagonalLaw(LOC, jnp.asarray([0.5, 0.8, 0.3])), TURN, jnp.zeros(3)),
    "affine": AffineLaw(DiagonalLaw(LOC, jnp.asarray([0.5, 0.8, 0.3])), ROOT + TURN, LOC / 2),
    "affine, of a full one": AffineLaw(GaussianLaw(LOC, ROOT), ROOT + TURN, LOC / 2),
    "frames": FramesLaw(DiagonalLaw(LOC[:, None], jnp.asarray([[0.5], [0.8], [0.3]]))),
    "frames, full": FramesLaw(GaussianLaw(LOC[None], ROOT[None])),
}


@pytest.mark.parametrize("name", LAWS)
def test_a_gaussian_law_is_the_one_of_its_mean_and_root(name):
    """Density by SciPy, variances, and 40,000 draws within 5 standard errors (6e-7 per moment)."""
    law, n = LAWS[name], 40_000
    mean, cov = np.asarray(law.mean, float), np.asarray(law.root @ law.root.T, float)
    z = np.asarray(law.sample(KEY, (n,)), float)
    np.testing.assert_allclose(law.log_prob(z[:5]), stats.multivariate_normal(mean, cov).logpdf(z[:5]), rtol=1e-4)
    np.testing.assert_allclose(law.variance, np.diag(cov), rtol=1e-5)
    unit = np.linalg.solve(np.linalg.cholesky(cov), (z - mean).T).T
    np.testing.assert_allclose(unit.mean(0), 0, atol=5 / np.sqrt(n))
    np.testing.assert_allclose(np.cov(unit.T), np.eye(3), atol=5 * np.sqrt(2 / n))
    assert not np.allclose(np.cov((unit + [[0.0, 0.1, 0.0]] * unit[:, :1]).T), np.eye(3), atol=5 * np.sqrt(2 / n))


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in LAWS if "frames" not in name])
def test_laws_of_sites_multiply_to_the_law(name):
    """log q(z) = log q(a) + log q(b | a), and in batches too; of a prior with one site the law is its own."""
    law = LAWS[name]
    z = law.sample(KEY, (4,))
    codes = {site.name: z[:, site.code] for site in SITES}
    parts = [law.of_site(site, codes).log_prob(codes[site.name]) for site in SITES]
    np.testing.assert_allclose(sum(parts), law.log_prob(z), rtol=1e-4)
    batch = jax.vmap(lambda z: law.log_prob(z))(z)
    np.testing.assert_allclose(batch, law.log_prob(z), rtol=1e-4)
    whole = SimpleNamespace(name="z", start=0, size=3, code=slice(0, 3))
    np.testing.assert_allclose(law.of_site(whole, {}).log_prob(z), law.log_prob(z), rtol=1e-4)


def test_any_law_of_one_site_is_taken_whole_and_of_two_refused():
    parts = dist.MultivariateNormal(jnp.stack([LOC, -LOC]), scale_tril=jnp.eye(3))
    law = WholeLaw(dist.MixtureSameFamily(dist.Categorical(probs=jnp.asarray([0.3, 0.7])), parts))
    np.testing.assert_allclose(law.mean, -0.4 * LOC, rtol=1e-5)
    assert law.root is None
    assert law.of_site(SimpleNamespace(name="z", size=3), {}) is law.base
    with pytest.raises(TypeError, match="MixtureSameFamily, does not say what that of the single site 'a' is"):
        law.of_site(SITES[0], {})


def test_moved_and_spread_laws_have_the_moments_of_their_draws():
    """Log ratios of a relaxed categorical, 200,000 draws, 5 standard errors; the density by NumPyro's transform."""
    base, loc, scale = LogRatios(0.7, jnp.asarray([0.2, -1.0, 0.5])), jnp.asarray([1.0, -2.0]), jnp.asarray([2.0, 0.7])
    law = Affine(base, loc, scale)
    z = np.asarray(law.sample(KEY, (200_000,)), float)
    np.testing.assert_allclose((z.mean(0) - law.mean) / z.std(0), 0, atol=5 / np.sqrt(len(z)))
    np.testing.assert_allclose(z.var(0), law.variance, rtol=0.03)
    steps = dist.transforms.IndependentTransform(dist.transforms.AffineTransform(loc, scale), 1)
    np.testing.assert_allclose(
        law.log_prob(z[:5]), dist.TransformedDistribution(base, steps).log_prob(z[:5]), rtol=1e-4
    )


def test_roots_of_gaussians():
    low_rank = dist.LowRankMultivariateNormal(LOC, cov_factor=ROOT[:, :1], cov_diag=jnp.ones(3))
    for q, cov in (
        (dist.Normal(LOC, 2.0).to_event(1), 4 * np.eye(3)),
        (dist.MultivariateNormal(LOC, scale_tril=jnp.tril(ROOT)), np.tril(ROOT) @ np.tril(ROOT).T),
        (low_rank, np.eye(3) + np.outer(ROOT[:, 0], ROOT[:, 0])),
    ):
        root = gaussian_root(q)
        np.testing.assert_allclose(root @ root.T, cov, rtol=1e-5)
    assert gaussian_root(dist.Laplace(LOC, 1.0).to_event(1)) is None

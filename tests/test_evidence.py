"""Certificate: estimates of the evidence against exact values, on programs whose networks are exact or broken."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
from numpyro import distributions as dist
import pytest
from scipy import stats

from sami_ppl.decoders.exact import LinearGaussian, LinearMixture
from sami_ppl.decoders.guidance import GuidedDenoiser
from sami_ppl.diffusion.schedule import NoiseProposal, VarianceExploding, VariancePreserving
from sami_ppl.evidence import (
    evidence_bound,
    flow_log_prob,
    importance_proposal,
    importance_weighted_bound,
    summarise,
)
from sami_ppl.evidence.iwae import nested_log_mean
from sami_ppl.program.program import Program

pytestmark = pytest.mark.slow

KINDS = {"vp": VariancePreserving, "ve": VarianceExploding}
FALSE_ALARM = 1e-4


def standard_prior(size):
    def prior():
        numpyro.sample("z", dist.Normal(0.0, 1.0).expand([size]).to_event(1))

    return prior


PRIORS = {size: standard_prior(size) for size in (1, 2, 3)}


def oracle(d, size=2, *, low=-16.0, high=12.0, kind="vp", noise=0.6, dtype=None):
    rng = np.random.default_rng(d)
    weights, mean = rng.normal(size=(d, size)) / np.sqrt(d / 4), rng.normal(size=d)
    dtype = jnp.result_type(float) if dtype is None else dtype
    return LinearGaussian(jnp.asarray(weights, dtype), noise, KINDS[kind](low, high), mean=jnp.asarray(mean, dtype))


def program(model, encoder=None):
    return Program(PRIORS[model.shape[1]], model.denoiser, model.encoder if encoder is None else encoder)


def z_score(estimates, exact):
    """Mean difference over its standard error; both per observation, so that their common spread cancels."""
    difference = np.asarray(estimates, float) - np.asarray(exact, float)
    return difference.mean() / (difference.std(ddof=1) / np.sqrt(len(difference)))


def p_value(score):
    return 2 * stats.norm.sf(abs(score))


# --- the bound --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("d", [6, *(pytest.param(d, marks=pytest.mark.slow) for d in (1, 64, 1024))])
def test_bound_equals_the_evidence_in_every_dimension(d, kind):
    """Exact networks, float32: E bound − (−log p(x)) within Monte-Carlo error plus the known end-point excess.

    256 observations, 128 levels, a z-test with false-alarm rate 1e-4. It resolves ½√d nats: so much more is rejected.
    """
    model = oracle(d, size=min(d, 2), kind=kind)
    x, _ = model.sample(jax.random.key(1), 256)
    found = evidence_bound(program(model), x, key=jax.random.key(2), levels=128)
    expected = -np.asarray(jax.vmap(model.log_prob)(x)) + expected_excess(model, x)
    score = z_score(found["bound"], expected)
    assert p_value(score) > FALSE_ALARM
    assert p_value(z_score(found["bound"] + 0.5 * np.sqrt(d), expected)) < FALSE_ALARM


def expected_excess(model, x):
    """Closed-form bound − (−log p(x)), in double precision, of the guide that a program uses: its clean encoder."""
    with jax.enable_x64(True):
        double = jax.tree.map(lambda a: jnp.asarray(np.asarray(a), float) if eqx.is_inexact_array(a) else a, model)

        def one(x):
            high = jnp.asarray(double.schedule.log_snr_max)
            parts, kl = double.bound(x, *double.posterior(double.schedule.alpha(high) * x, high))
            return parts.total + kl + double.log_prob(x)

        return np.asarray(jax.vmap(one)(jnp.asarray(np.asarray(x), float)))


def test_parts_are_those_of_the_closed_form():
    """Prior, diffusion, reconstruction and KL each equal their own closed form; they sum to the bound."""
    model = oracle(6)
    x, _ = model.sample(jax.random.key(1), 128)
    found = evidence_bound(program(model), x, key=jax.random.key(2), levels=64)

    def exact(x):
        return model.bound(x, *model.posterior(x, jnp.asarray(12.0)))  # α = 1 − 3e-6 there

    parts, kl = jax.vmap(exact)(x)
    np.testing.assert_allclose(found["prior"], parts.prior, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found["reconstruction"], parts.reconstruction, rtol=1e-6)
    np.testing.assert_allclose(found["kl"][:, 0], kl, rtol=1e-4, atol=1e-4)
    assert p_value(z_score(found["diffusion"], parts.diffusion)) > FALSE_ALARM
    total = found["prior"] + found["diffusion"] + found["reconstruction"] + found["kl"].sum("site")
    np.testing.assert_allclose(found["bound"], total, rtol=1e-5, atol=1e-4)
    np.testing.assert_allclose(found["kl_axis"].sum("axis"), found["kl"].sum("site"), rtol=1e-5)


@pytest.mark.parametrize("d", [6, *(pytest.param(d, marks=pytest.mark.slow) for d in (1, 64, 1024))])
def test_float_error_is_stated(d):
    """The same noise in float32 and float64: the bound of an observation differs by at most 3e-6·d + 3e-5 nats.

    The range ends at λ = 12, where the error is largest: ε is recovered from x_λ there with e^(λ/2) = 400-fold loss.
    """
    model = oracle(d, size=min(d, 2))
    x, _ = model.sample(jax.random.key(1), 4)
    single = error_integral(model, x)
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda a: jnp.asarray(np.asarray(a), float) if eqx.is_inexact_array(a) else a, model)
        double = error_integral(wide, jnp.asarray(np.asarray(x), float))
    assert np.abs(single - double).max() < 3e-6 * d + 3e-5


def error_integral(model, x):
    """½ ∫ ‖ε − ε̂‖² dλ on fixed levels, z and noise, the same in every precision."""
    rng = np.random.default_rng(0)
    levels = np.linspace(-15.9, 11.9, 64)
    z, eps = rng.normal(size=(len(x), model.shape[1])), rng.normal(size=(64, *x.shape))

    def one(x, z, level, eps):
        return model_error(model, x, z, level, eps)

    over = jax.vmap(jax.vmap(one, in_axes=(0, 0, None, 0)), in_axes=(None, None, 0, 0))
    with jax.default_matmul_precision("highest"):  # as in the estimates of the evidence
        errors = over(x, jnp.asarray(z, x.dtype), jnp.asarray(levels, x.dtype), jnp.asarray(eps, x.dtype))
    return np.asarray(errors, float).mean(0) * 14.0


def model_error(model, x, z, level, eps):
    from sami_ppl.decoders.bound import noise_error

    return noise_error(model.denoiser, model.encoder, x, z, level, eps)


class Blurred(LinearGaussian):
    """A model whose noisy posterior is of another noise level: networks that are wrong but smooth."""

    def log_posterior(self, z, x_noisy, log_snr):
        return super().log_posterior(z, x_noisy, log_snr - 1.0)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_bound_never_falls_below_with_wrong_networks(seed, tiny_program, fill):
    """With random networks, as with an untrained or badly trained program, the mean bound stays above the entropy.

    One-sided z-test, 128 observations, false-alarm rate 1e-4; with the diffusion term halved (doubled likelihood
    weight seen from the other side) it falls below, which shows that the test could fail.
    """
    small = tiny_program()
    schedule = small.denoiser.schedule
    rng = np.random.default_rng(seed)
    model = LinearGaussian(jnp.asarray(rng.normal(size=(4, 2)), jnp.float32), 0.4, schedule)
    x, _ = model.sample(jax.random.key(seed), 128)
    wrong = small.replace(denoiser=fill(small.denoiser), encoder=fill(small.encoder))
    found = evidence_bound(wrong, x, key=jax.random.key(1), levels=32)
    truth = -np.asarray(jax.vmap(model.log_prob)(x))
    assert z_score(found["bound"], truth) > stats.norm.ppf(FALSE_ALARM)
    exact = evidence_bound(program(model), x, key=jax.random.key(1), levels=32)
    assert z_score(exact["bound"] - 0.5 * exact["diffusion"], truth) < stats.norm.ppf(FALSE_ALARM)


@pytest.mark.slow
def test_wrong_posteriors_cost_nats():
    """A noisy posterior of the wrong noise level, and a diagonal one where WᵀW is not, cost more than .02 nats."""
    model = oracle(6)
    x, _ = model.sample(jax.random.key(1), 512)
    blurred = Blurred(model.weights, model.noise_std, model.schedule, mean=model.mean)
    bounds = {
        name: evidence_bound(program(model, encoder), x, key=jax.random.key(2), levels=64)["bound"].values
        for name, encoder in
        (("exact", model.encoder), ("blurred", blurred.encoder), ("mean field", model.mean_field_encoder))
    }  # fmt: skip
    for name in ("blurred", "mean field"):
        difference = bounds[name] - bounds["exact"]
        assert difference.mean() - 3 * difference.std() / np.sqrt(512) > 0.02, name


# --- noise levels -----------------------------------------------------------------------------------------------------


def proposals(schedule):
    rng = np.random.default_rng(0)
    return {
        "uniform": NoiseProposal(schedule),
        "random": NoiseProposal(schedule, jnp.asarray(rng.uniform(0.2, 1.0, size=7))),
        "steep": NoiseProposal(schedule, jnp.asarray(np.geomspace(1, 50, 12))),
    }


@pytest.mark.parametrize("name", ["uniform", "random", "steep"])
def test_every_proposal_integrates_exactly_what_it_covers(name, x64):
    """Over all quantiles, mean(weight · f(λ)) = ∫ f dλ, for f = 1 and for a smooth f, by fine midpoints."""
    schedule = VariancePreserving(-5.0, 7.0)
    levels = proposals(schedule)[name].at((jnp.arange(400_000) + 0.5) / 400_000)
    assert float(levels.weight.mean()) == pytest.approx(12.0, rel=1e-5)
    smooth = lambda at: jnp.sin(at) + 2.0  # noqa: E731
    assert float((levels.weight * smooth(levels.log_snr)).mean()) == pytest.approx(
        24.0 + np.cos(-5.0) - np.cos(7.0), rel=1e-4
    )
    assert float(levels.log_snr.min()) >= -5.0
    assert float(levels.log_snr.max()) <= 7.0
    assert bool(jnp.all(jnp.diff(levels.log_snr) >= 0))


@pytest.mark.parametrize("name", ["uniform", "random", "steep", "fitted"])
def test_bound_is_unbiased_under_every_proposal(name):
    """The same expected bound, whatever the density of the levels: z-test against the closed form, false alarm 1e-4.

    Control: the steep density with the weights of the uniform one is rejected.
    """
    model = oracle(6)
    x, _ = model.sample(jax.random.key(1), 256)
    fitted = {"fitted": importance_proposal(program(model), x, key=jax.random.key(4))} if name == "fitted" else {}
    proposal = {**proposals(model.schedule), **fitted}[name]
    expected = -np.asarray(jax.vmap(model.log_prob)(x)) + expected_excess(model, x)
    found = evidence_bound(program(model), x, key=jax.random.key(2), levels=24, proposal=proposal)
    assert p_value(z_score(found["bound"], expected)) > FALSE_ALARM
    if name == "steep":
        unweighted = UniformWeights(model.schedule, proposal.probabilities)
        wrong = evidence_bound(program(model), x, key=jax.random.key(2), levels=24, proposal=unweighted)
        assert p_value(z_score(wrong["bound"], expected)) < FALSE_ALARM


@pytest.mark.parametrize("estimate", [evidence_bound, importance_weighted_bound])
def test_a_fitted_proposal_may_be_asked_for_by_its_name(estimate):
    """The same numbers as with the proposal fitted by hand, by the first half of the key."""
    model = oracle(6)
    x, _ = model.sample(jax.random.key(1), 40)
    pilot_key, key = jax.random.split(jax.random.key(2))
    proposal = importance_proposal(program(model), x, key=pilot_key)
    by_hand = estimate(program(model), x, key=key, levels=4, proposal=proposal)["bound"]
    by_name = estimate(program(model), x, key=jax.random.key(2), levels=4, proposal="fitted")["bound"]
    np.testing.assert_array_equal(by_name, by_hand)
    with pytest.raises(ValueError, match="NoiseProposal, 'fitted' or None for a uniform one, got 'best'"):
        estimate(program(model), x, key=key, levels=4, proposal="best")


class UniformWeights(NoiseProposal):
    def at(self, position):
        levels = super().at(position)
        return levels._replace(weight=jnp.full_like(levels.weight, self.schedule.span))


@pytest.mark.slow
def test_fitted_proposal_lowers_the_variance():
    """On the oracle over a wide range, most of which costs nothing, the fitted density needs ≤ half the levels."""
    model = oracle(6, low=-16.0, high=12.0)
    x, _ = model.sample(jax.random.key(1), 256)
    fitted = importance_proposal(program(model), x, key=jax.random.key(4))
    expected = -np.asarray(jax.vmap(model.log_prob)(x)) + expected_excess(model, x)
    variance = {}
    for name, proposal in (("uniform", None), ("fitted", fitted)):
        found = evidence_bound(program(model), x, key=jax.random.key(2), levels=16, proposal=proposal)
        variance[name] = np.var(found["bound"].values - expected)
    assert variance["fitted"] < 0.5 * variance["uniform"]


def test_summary_counts_bits_and_errors():
    """bits/dim = nats/(d ln 2); standard errors over observations."""
    model = oracle(6)
    x, _ = model.sample(jax.random.key(1), 50)
    found = evidence_bound(program(model), x, key=jax.random.key(2), levels=8)
    figures = summarise(found, x)
    bound = found["bound"].values
    assert figures["bound"]["mean"] == pytest.approx(bound.mean())
    assert figures["bound"]["se"] == pytest.approx(bound.std(ddof=1) / np.sqrt(50))
    assert figures["bits_per_dim"]["mean"] == pytest.approx(bound.mean() / (6 * np.log(2)))
    parts = sum(figures[name]["mean"] for name in ("prior", "diffusion", "reconstruction", "kl[z]"))
    assert parts == pytest.approx(figures["bound"]["mean"], rel=1e-5)
    missing = np.where(np.arange(50)[:, None] % 2, np.array([np.nan] * 3 + [0.0] * 3), x)
    fewer = summarise(found, missing)["bits_per_dim"]["mean"]
    assert fewer == pytest.approx(bound.mean() / (4.5 * np.log(2))), "of what was seen: 3 values of every other one"


def test_bad_arguments_are_named():
    """One level, another shape, draws that are no power of two."""
    model = oracle(6)
    x, key = jnp.zeros((4, 6)), jax.random.key(0)
    with pytest.raises(ValueError, match=r"levels must be at least 2.*got 1"):
        evidence_bound(program(model), x, key=key, levels=1)
    with pytest.raises(ValueError, match=r"x must have shape \(obs, 6\), got \(4, 5\)"):
        evidence_bound(program(model), x[:, :5], key=key)
    with pytest.raises(ValueError, match=r"draws must be a power of two, at least 32.*got 12"):
        importance_weighted_bound(program(model), x, key=key, draws=12)
    with pytest.raises(ValueError, match=r"x must have shape \(obs, 6\), got \(4, 5\)"):
        flow_log_prob(model.denoiser, x[:, :5], key=key)


# --- importance weights -----------------------------------------------------------------------------------------------


class Shrunken(LinearGaussian):
    """Its guide, the posterior at the clean end alone, is twice too narrow; guidance below it stays exact."""

    def posterior(self, x_noisy, log_snr):
        mean, cov = super().posterior(x_noisy, log_snr)
        return mean, cov / 4


def test_importance_weights_are_flat_with_the_exact_posterior():
    """log w = log p(x) for every draw: bounds at all K agree with the evidence, k̂ is small, every draw counts."""
    model = oracle(6, low=-12.0, high=10.0)
    x, _ = model.sample(jax.random.key(1), 16)
    found = importance_weighted_bound(program(model), x, key=jax.random.key(3), draws=64, levels=256)
    truth = np.asarray(jax.vmap(model.log_prob)(x))
    for particles in (1, 64):
        assert p_value(z_score(found["bound"].sel(particles=particles), -truth)) > FALSE_ALARM
    assert float(found["ess"].min()) > 20
    assert float(found["weight_noise"].mean()) < 0.3
    assert found["bound"].sel(particles=64).values == pytest.approx(
        found["bound"].sel(particles=1).values - 0.5 * found["log_weight"].values.var(0), abs=0.2
    )


@pytest.mark.slow
def test_importance_weights_mend_a_shrunken_guide():
    """A guide twice too narrow: the bound falls with K towards −log p(x), never below it by more than its noise."""
    model = oracle(6, low=-12.0, high=10.0)
    x, _ = model.sample(jax.random.key(1), 16)
    narrow = Shrunken(model.weights, model.noise_std, model.schedule, mean=model.mean)
    found = importance_weighted_bound(program(model, narrow.encoder), x, key=jax.random.key(3), draws=64, levels=256)
    truth = np.asarray(jax.vmap(model.log_prob)(x))
    gaps = (found["bound"] + truth[:, None]).mean("obs").values
    assert np.all(np.diff(gaps) < 0)
    assert gaps[0] > 0.3
    assert abs(gaps[-1]) < 0.5 * abs(gaps[0])
    exact = importance_weighted_bound(program(model), x, key=jax.random.key(3), draws=64, levels=256)
    assert float(found["pareto_k"].mean()) > float(exact["pareto_k"].mean()) + 0.2


def test_log_means_of_nested_groups_never_fall(x64):
    """Jensen over nested groups: monotone in K for any weights; K = 1 gives the mean, K = all the log mean."""
    log_weight = np.random.default_rng(0).normal(scale=5.0, size=(64, 10))
    bounds = np.stack([nested_log_mean(log_weight, 2**i) for i in range(7)])
    assert np.all(np.diff(bounds, axis=0) >= 0)
    np.testing.assert_allclose(bounds[0], log_weight.mean(0))
    np.testing.assert_allclose(bounds[-1], np.log(np.exp(log_weight).mean(0)))


def test_pareto_k_has_its_sign_right():
    """Weights whose tail has shape k give back k; ArviZ wants minus the log weights, and the other sign does not."""
    from arviz_stats.base import array_stats

    rng = np.random.default_rng(0)
    for k in (0.2, 0.7):
        log_weight = np.log(stats.genpareto.rvs(k, size=(20, 4000), random_state=rng) + 1.0)
        assert array_stats.psislw(-log_weight, axis=-1)[1].mean() == pytest.approx(k, abs=0.12)


# --- probability flow -------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("law", ["gaussian", "mixture", "conditional"])
def test_flow_density_is_exact_on_the_oracle(law, kind, x64):
    """Exact scores: the flow's density is p(x), or p(x | z) under guidance, to 1e-3 nats; a wrong law is not."""
    schedule = KINDS[kind](-26.0, 18.0)
    rng = np.random.default_rng(2)
    weights = jnp.asarray(rng.normal(size=(4, 2)))
    if law == "mixture":
        model = LinearMixture(
            weights, 0.6, schedule,
            probs=jnp.asarray([0.7, 0.3]), locs=jnp.asarray([[0.0, 0.0], [2.0, -1.0]]), scales=jnp.ones((2, 2)),
        )  # fmt: skip
    else:
        model = LinearGaussian(weights, 0.6, schedule)
    x, z = model.sample(jax.random.key(0), 5)
    denoiser, truth = model.denoiser, jax.vmap(model.log_prob)(x)
    if law == "conditional":
        denoiser = GuidedDenoiser(model.denoiser, model.encoder, z[0])
        truth = stats.norm(np.asarray(weights @ z[0])[None], 0.6).logpdf(np.asarray(x)).sum(1)
    found = flow_log_prob(denoiser, x, key=jax.random.key(1), tolerance=1e-7)
    np.testing.assert_allclose(found, truth, atol=1e-3)
    assert np.abs(found - flow_log_prob(denoiser, x + 0.1, key=jax.random.key(1), tolerance=1e-7)).min() > 1e-3


@pytest.mark.slow
def test_random_divergence_is_unbiased(x64):
    """Hutchinson's estimate over 256 keys: a z-test against the exact divergence, false-alarm rate 1e-4."""
    model = oracle(5, low=-8.0, high=8.0)
    x = jnp.broadcast_to(model.sample(jax.random.key(0), 1)[0], (256, 5))
    exact = flow_log_prob(model.denoiser, x[:1], key=jax.random.key(1), exact=True)
    estimates = flow_log_prob(model.denoiser, x, key=jax.random.key(2), exact=False)
    assert estimates.std() > 1e-3
    assert p_value(z_score(estimates, np.full(256, exact[0]))) > FALSE_ALARM

"""The library broken on purpose: every classical mistake is caught by a named test, in a copy of the source.

A row is a mistake, the text of the source that it replaces, and the test that must fail for it. Each runs in a process
of its own; the same tests pass on the copy left whole. The table is told in docs/exactness.md.
"""

from pathlib import Path
import shutil
import subprocess
import sys

import pytest

ROOT = Path(__file__).resolve().parents[1]

# mistake: (file, right, wrong, test that catches it)
MISTAKES = {
    "the prior left out of a tempered posterior": (
        "encoders/tails.py", "precision[..., None, :, :] + (1 - worth) * eye)", "precision[..., None, :, :])",
        "test_tails.py::test_density_is_that_of_tempered_posteriors[full]",
    ),
    "alpha missing in the noisy observation": (
        "diffusion/schedule.py", "return self.alpha(log_snr) * x + self.sigma(log_snr) * eps",
        "return x + self.sigma(log_snr) * eps",
        "test_bound.py::test_guided_bound_is_the_conditional_likelihood[vp]",
    ),
    "alpha missing in the denoised mean": (
        "diffusion/denoiser.py", "return (x_noisy - sigma * self(x_noisy, log_snr)) / alpha",
        "return x_noisy - sigma * self(x_noisy, log_snr)",
        "test_sampler.py::test_order_of_convergence[ddim-vp]",
    ),
    "standard deviation for variance": (
        "encoders/law.py", "jnp.sum(0.5 * standard**2 + jnp.log(self.scale)",
        "jnp.sum(0.5 * standard**2 * self.scale + jnp.log(self.scale)",
        "test_bound.py::test_guided_bound_is_the_conditional_likelihood[vp]",
    ),
    "axes of the code not undone in its density": (
        "encoders/law.py", "(jnp.linalg.inv(self.linear) @ value", "(self.linear @ value",
        "test_law.py::test_a_gaussian_law_is_the_one_of_its_mean_and_root[affine]",
    ),
    "sites of a correlated code conditioned the wrong way": (
        "encoders/law.py", "mean = mean + (lower[..., span, :before]", "mean = mean - (lower[..., span, :before]",
        "test_law.py::test_laws_of_sites_multiply_to_the_law[full]",
    ),
    "KL taken at a noisy observation": (
        "encoders/encoder.py", "log_snr = jnp.asarray(self.schedule.log_snr_max, dtype=jnp.result_type(float, x))",
        "log_snr = jnp.asarray(0.0, dtype=jnp.result_type(float, x))",
        "test_evidence.py::test_bound_equals_the_evidence_in_every_dimension[6-vp]",
    ),
    "guidance of the wrong sign": (
        "decoders/guidance.py", "return jax.grad(encoder.log_prob, argnums=1)(z, x_noisy, log_snr)",
        "return -jax.grad(encoder.log_prob, argnums=1)(z, x_noisy, log_snr)",
        "test_exact.py::test_guided_denoiser_is_that_of_the_conditional[vp-0.4]",
    ),
    "sigma missing in the guided noise prediction": (
        "decoders/guidance.py", "return eps - self.schedule.sigma(log_snr) * guidance(", "return eps - guidance(",
        "test_exact.py::test_guided_denoiser_is_that_of_the_conditional[vp-0.4]",
    ),
    "mean over pixels instead of the sum": (
        "decoders/bound.py", "return jnp.sum(seen * residual**2)", "return jnp.mean(seen * residual**2)",
        "test_bound.py::test_guided_bound_is_the_conditional_likelihood[vp]",
    ),
    "detached z": (
        "decoders/bound.py", "return given(denoiser, encoder, z)",
        "return given(denoiser, encoder, __import__('jax').lax.stop_gradient(z))",
        "test_bound.py::test_gradient_is_that_of_the_formula[reverse-guided]",
    ),
    "code kept from a conditioned denoiser": (
        "decoders/conditional.py", "return self.network(x, log_snr, self.z)", "return self.network(x, log_snr)",
        "test_decoders.py::test_both_decoders_have_one_bound",
    ),
    "standard deviation for variance in the denoiser of a Gaussian decoder": (
        "decoders/conditional.py", "sigma / (alpha**2 * self.std**2 + sigma**2)",
        "sigma / (alpha**2 * self.std + sigma**2)", "test_decoders.py::test_the_closed_form_is_what_diffusion_bounds",
    ),
    "last denoising step dropped": (
        "diffusion/sampler.py", "return denoiser.x_hat(self.carry(denoiser, start, low, high, noise_key), high)",
        "return self.carry(denoiser, start, low, high, noise_key)",
        "test_sampler.py::test_deterministic_samplers_ignore_their_key_and_end_with_the_denoised_mean",
    ),
    "variance for standard deviation in the noise of a step": (
        "diffusion/sampler.py", "return mean, jnp.sqrt(gain) * schedule.sigma", "return mean, gain * schedule.sigma",
        "test_sampler.py::test_stochastic_step_draws_from_the_posterior_of_the_forward_process[sde]",
    ),
    "guidance left in the weights of particles": (
        "decoders/twisted.py", "log_weights = log_weights - jnp.sum(off * (noise + 0.5 * off), axes)",
        "log_weights = log_weights + 0 * jnp.sum(off * noise, axes)",
        "test_twisted.py::test_with_exact_posteriors_all_particles_weigh_the_same",
    ),
    "clipped denoised mean": (
        "diffusion/denoiser.py", "return (x_noisy - sigma * self(x_noisy, log_snr)) / alpha",
        "return jnp.clip((x_noisy - sigma * self(x_noisy, log_snr)) / alpha, -1, 1)",
        "test_sampler.py::test_order_of_convergence[ddim-vp]",
    ),
    "doubled likelihood weight": (
        "decoders/bound.py", "return Bound(start, 0.5 * weight * error, end)",
        "return Bound(start, weight * error, end)",
        "test_evidence.py::test_bound_equals_the_evidence_in_every_dimension[6-vp]",
    ),
    "beta in the model only": (
        "program/program.py", 'subsample_size=size), scale_sites(beta):', 'subsample_size=size):',
        "test_objective.py::test_beta_scales_the_divergence_and_nothing_else[mean field-gaussian]",
    ),
    "prior of a frame counted twice": (
        "encoders/frames.py", "jnp.linalg.inv(root @ root.T) - jnp.eye(len(loc), dtype=loc.dtype)",
        "jnp.linalg.inv(root @ root.T)",
        "test_frames.py::test_a_frame_is_no_less_certain_than_the_prior",
    ),
    "noise of the correction left out of draws over time": (
        "distributions/matern.py", "self._mean(self.centre - prior - noise)", "self._mean(self.centre - prior)",
        "test_processes.py::test_draws_of_the_posterior_have_its_moments[0.5]",
    ),
    "missing frame counted in the bound": (
        "encoders/frames.py", "return jnp.where(missing, 0, x), (~missing).astype(x.dtype)",
        "return jnp.where(missing, 0, x), jnp.ones_like(x)",
        "test_frames.py::test_a_missing_frame_is_left_out_of_the_bound",
    ),
    "intervention that descendants do not feel": (
        "program/program.py", "handlers.do(handlers.replay(self.sample_prior, global_values), data=held)",
        "handlers.replay(self.sample_prior, global_values)",
        "test_causal.py::test_an_intervention_moves_descendants_only",
    ),
    "counterfactual with noises drawn anew": (
        "posteriors/causal.py", 'return kept[name] if name in kept else _value(site["fn"], noise[name])',
        "return kept.get(name)",
        "test_causal.py::test_a_counterfactual_is_the_exact_one",
    ),
    "kinds weighed by the prior": (
        "fitting/objective.py", "prob, label = jnp.exp(log_q), known[name]",
        "prob, label = jnp.exp(log_p), known[name]",
        "test_discrete_programs.py::test_a_label_counts_once_beside_another_discrete_site",
    ),
    "label without weight": (
        "fitting/objective.py", "prob = jnp.where(label >= 0, value == label, prob)",
        "prob = jnp.where(label >= 0, prob, prob)",
        "test_discrete_programs.py::test_a_label_counts_once_beside_another_discrete_site",
    ),
    "KL of global sites counted per batch": (
        "fitting/objective.py", "_weight_per_observation(scored.trace[name], scored.trace)[0] * kl",
        "kl / len(next(iter(scored.local.values())))",
        "test_hierarchy.py::test_the_objective_is_numpyros_divided_by_the_observations[1000]",
    ),
    "determinant of a flow of the wrong sign": (
        "distributions/flows/bijections.py", "jnp.exp(self.log_scale()) + self.loc, self.log_scale()",
        "jnp.exp(self.log_scale()) + self.loc, -self.log_scale()",
        "test_flows.py::test_density_integrates_to_one",
    ),
    "volume of the simplex of the wrong sign": (
        "distributions/relaxed.py", "log_prob(u) - jnp.sum(jnp.log(jnp.maximum(value, TINY)), -1)",
        "log_prob(u) + jnp.sum(jnp.log(jnp.maximum(value, TINY)), -1)",
        "test_relaxed.py::test_density_on_the_simplex_is_the_papers[0.3]",
    ),
    "cross term of the tabulated bound counted once": (
        "program/tabulated.py", "terms.own + 2 * slope @ terms.cross", "terms.own + slope @ terms.cross",
        "test_tabulated.py::test_likelihood_is_that_of_numpyro[diagonal]",
    ),
    "samples of a code each where one draw is shared": (
        "calibration/predictive.py", "own_code = lambda rows, _: np.repeat(z[rows], samples, axis=0)",
        "own_code = lambda rows, k: draw_codes(program, np.repeat(x[rows], samples, axis=0), k)",
        "test_predictive.py::test_of_an_exact_program_p_values_are_uniform",
    ),
    "volume of the lengths of directions left out": (
        "refinement/target.py", "(site.dimension - 1) * jnp.log(length)", "0 * jnp.log(length)",
        "test_refinement.py::test_lengths_of_directions_integrate_out[2]",
    ),
    "kinds averaged for kinds summed over": (
        "refinement/target.py", "jax.nn.logsumexp(each) + _log_lengths", "jnp.mean(each) + _log_lengths",
        "test_refinement.py::test_discrete_sites_are_summed_over",
    ),
    "refinement under another observation's variables": (
        "refinement/target.py", "jnp.asarray(v[i])", "jnp.asarray(v[0])",
        "test_refinement.py::test_every_observation_has_its_own_variables",
    ),
    "log densities averaged for densities over global sites": (
        "refinement/target.py",
        "jax.nn.logsumexp(jax.vmap(density)(global_values)) - jnp.log(len(jax.tree.leaves(global_values)[0]))",
        "jnp.mean(jax.vmap(density)(global_values))",
        "test_refinement.py::test_the_prior_is_averaged_over_global_sites",
    ),
    "angles between points for angles between steps": (
        "analyses/trajectories.py", "steps = np.diff(trajectory, axis=0)", "steps = trajectory",
        "test_analyses_trajectories.py::test_curvature_by_geometry",
    ),
    "clips drawn anew and their videos not": (
        "analyses/trajectories.py", "chosen = rng.integers(len(groups), size=len(groups))",
        "chosen = range(len(groups))",
        "test_analyses_trajectories.py::test_intervals_over_videos_and_clips",
    ),
    "noise left out of what a bottom map is of": (
        "analyses/bottleneck.py",
        "denoiser.schedule.add_noise(x, log_snr, jax.random.normal(key, x.shape, x.dtype))",
        "denoiser.schedule.alpha(log_snr) * x",
        "test_analyses_bottleneck.py::test_components_are_those_of_maps_computed_one_by_one",
    ),
}  # fmt: skip


def run(folder, test):
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-p", "no:xdist", f"tests/{test}"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=500)


@pytest.fixture
def copy(tmp_path):
    """A copy of the library and its tests, to be broken."""
    for name in ("sami_ppl", "tests", "models", "inference"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


@pytest.mark.slow
@pytest.mark.release
@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistake_is_caught(mistake, copy):
    """The named test fails on the broken copy, as a failed assertion, not for want of something to run."""
    file, right, wrong, test = MISTAKES[mistake]
    source = copy / "sami_ppl" / file
    text = source.read_text()
    assert text.count(right) == 1, "the table no longer fits the source"
    source.write_text(text.replace(right, wrong))
    result = run(copy, test)
    assert result.returncode == 1, result.stdout + result.stderr
    assert "AssertionError" in result.stdout or "Failed" in result.stdout, result.stdout


@pytest.mark.slow
@pytest.mark.release
def test_named_tests_pass_on_the_whole_copy(copy):
    """Control of the control: nothing but the mistake makes them fail."""
    tests = sorted({test for *_, test in MISTAKES.values()})
    result = run(copy, tests[0]) if len(tests) == 1 else subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist",
         *(f"tests/{test}" for test in tests)],
        cwd=copy, capture_output=True, text=True, timeout=500,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr


def test_table_is_told_in_the_documentation():
    """docs/exactness.md has a row for every mistake, with the test that catches it."""
    text = (ROOT / "docs" / "exactness.md").read_text()
    for mistake, (*_, test) in MISTAKES.items():
        assert f"| {mistake} | `{test}` |" in text

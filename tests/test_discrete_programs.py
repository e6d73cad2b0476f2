"""Programs with discrete sites: labels of some observations, and what programs answer."""

from discrete_priors import KEY, LABEL, LOCS, X, dataset, joint, labelled, two
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
from numpyro import distributions as dist
from numpyro import handlers
import pytest

from sami_ppl.calibration import simulation_based_calibration
from sami_ppl.diagnostics import clusters, draw_code, information_spectrum
from sami_ppl.diffusion.sampler import Heun
from sami_ppl.evidence import evidence_bound
from sami_ppl.fitting.objective import ScoreELBO, scores
from sami_ppl.posteriors.causal import counterfactual, intervene
from sami_ppl.program.kl import traces
from sami_ppl.saving.save import load, save

# --- labels -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_known_values_have_all_the_weight(build):
    """Observations with a label: terms at it alone, −log p(label) for the KL; the others as without labels."""
    program = build(labelled, {"label": np.array([-1])})
    arguments = (KEY, program.params(), program.model, program.guide, X)
    told = scores(*arguments, given={"label": jnp.asarray(LABEL)})
    free = scores(*arguments, given={"label": jnp.full(5, -1)})
    for name in ("kind", "z", "x"):
        np.testing.assert_allclose(told.local[name][LABEL < 0], free.local[name][LABEL < 0], rtol=1e-5)
    log_p = jax.nn.log_softmax(program.prior_params["weights"])
    np.testing.assert_allclose(told.local["kind"][LABEL >= 0, 0], -log_p[LABEL[LABEL >= 0]], rtol=1e-5)
    log_q = jax.vmap(lambda x: program.encoder.parameters(*program.encoder.clean(x))["kind"])(jnp.asarray(X))
    surprise = np.where(LABEL >= 0, -log_q[np.arange(5), LABEL], 0)
    np.testing.assert_allclose(told.surprise["kind"], surprise, rtol=1e-4)
    terms = ScoreELBO(label_weight=3.0).terms(*arguments, given={"label": jnp.asarray(LABEL)})
    assert float(terms["kind label"]) == pytest.approx(3 * surprise.mean(), rel=1e-4)
    held = handlers.substitute(program.guide, data={"kind": jnp.asarray(np.maximum(LABEL, 0))})
    _, trace = traces(KEY, program.params(), program.model, held, X, given={"label": jnp.asarray(LABEL)})
    kl = dist.kl_divergence(trace["z"]["fn"].base_dist, dist.Normal(LOCS[np.maximum(LABEL, 0)], 0.5))
    np.testing.assert_allclose(told.local["z"][LABEL >= 0], kl[LABEL >= 0], rtol=1e-4)


@pytest.mark.slow
def test_a_label_counts_once_beside_another_discrete_site(build):
    """Summed over the values of the other, whose own terms stay; control: not twice, for its two values."""

    def beside(label):
        labelled(label)
        numpyro.sample("flip", dist.Bernoulli(0.3))

    program = build(beside, {"label": np.array([-1])})
    arguments = (KEY, program.params(), handlers.block(program.model, hide=["x"]), program.guide, X)
    told = jax.jit(lambda label: scores(*arguments, given={"label": label})[:3])
    (local, _, surprise), (free, *_) = told(jnp.asarray(LABEL)), told(jnp.full(5, -1))
    log_q = jax.vmap(lambda x: program.encoder.parameters(*program.encoder.clean(x))["kind"])(jnp.asarray(X))
    expected = np.where(LABEL >= 0, -log_q[np.arange(5), LABEL], 0)
    np.testing.assert_allclose(surprise["kind"], expected, rtol=1e-4)
    log_p = jax.nn.log_softmax(program.prior_params["weights"])
    np.testing.assert_allclose(local["kind"][LABEL >= 0, 0], -log_p[LABEL[LABEL >= 0]], rtol=1e-5)
    kl = (np.exp(log_q) * (log_q - log_p)).sum(1)
    np.testing.assert_allclose(local["kind"][LABEL < 0, 0], kl[LABEL < 0], rtol=1e-3)
    np.testing.assert_allclose(local["flip"], free["flip"], rtol=1e-4)
    assert expected.max() > 0.1


def test_plain_numpyro_sees_the_label():
    """Outside a program the prior is NumPyro's own: the site is observed where it is known."""
    run = handlers.seed(labelled, KEY)
    with numpyro.plate("obs", 5):
        trace = handlers.trace(run).get_trace(jnp.asarray(LABEL))
    np.testing.assert_array_equal(trace["kind"]["value"][LABEL >= 0], LABEL[LABEL >= 0])


# --- what programs do -------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_answers_of_a_program_with_kinds(build, tmp_path):
    """Posterior, evidence, codes, clusters, saving: kinds are integers on their own dims; labels change no answer."""
    program = build(labelled, {"label": np.array([-1])})
    data = dataset()
    tree = program.posterior(data, key=KEY, draws=8, predictive=2, levels=2)
    kinds = tree["posterior"]["kind"]
    assert kinds.dims == ("chain", "draw", "obs")
    assert set(np.unique(kinds)) <= {0, 1, 2}
    assert tree["prior"]["z"].shape == (1, 8, 5, 2)
    probs = program.encode(X)[0][:, :3]
    np.testing.assert_allclose(probs.sum(1), 1, rtol=1e-5)
    np.testing.assert_array_equal(clusters(program, data)["kind"], probs.argmax(1))
    codes = program.prior_codes(KEY, 3000)
    np.testing.assert_allclose(codes[:, :3].mean(0), jax.nn.softmax(program.prior_params["weights"]), atol=0.04)
    spectrum = information_spectrum(program, X, key=KEY, levels=2)
    assert np.isfinite(spectrum["axis_energy"]).all()
    ranks = simulation_based_calibration(program, key=KEY, simulations=4, draws=4)["prior_sbc"]["code"]
    assert ((ranks > 0) & (ranks < 1)).all()
    bound = evidence_bound(program, data, key=KEY, levels=4)
    unlabelled = evidence_bound(program, dataset(label=np.full(5, -1)), key=KEY, levels=4)
    np.testing.assert_allclose(bound["bound"], unlabelled["bound"])
    other = load(save(program, tmp_path / "saved"), build(labelled, {"label": np.array([-1])}))
    np.testing.assert_array_equal(other.encode(X)[0], program.encode(X)[0])
    assert "kind" in program.latents.describe()


@pytest.mark.slow
def test_setting_a_kind_that_some_labels_tell_moves_what_depends_on_it(build):
    """z has the mean of the kind set: 200 draws, 5 standard errors (6e-7 each). Control: without do it has another."""
    program = build(labelled, {"label": np.array([-1, 2])})
    codes = jax.jit(lambda do: program.prior_codes(KEY, 200, do))
    for do, near in (({"kind": jnp.asarray(1)}, True), ({}, False)):
        values = program.latents.from_code(codes(do))
        assert np.all(values["kind"] == 1) == near
        close = np.abs(values["z"].mean(0) - LOCS[1]) < 5 * 0.5 / 200**0.5
        assert np.all(close) == near
    with pytest.raises(ValueError, match=r"do gives 'kind' a value off its support.*got 1.7"):
        intervene(program, {"kind": 1.7}, key=KEY, size=2)


@pytest.mark.slow
def test_interventions_on_a_kind(build):
    """do(kind) holds it and moves z to its mean; factual kinds stay where another site is set."""
    program = build(joint)
    found = intervene(program, {"kind": 1}, key=KEY, size=400)
    assert (found["kind"] == 1).all()
    np.testing.assert_allclose(found["z"].mean("draw"), LOCS[1], atol=0.1)
    tree = counterfactual(program, X, {"light": 1.0}, key=KEY, draws=2, sampler=Heun(3))
    np.testing.assert_array_equal(tree["counterfactual"]["kind"], tree["factual"]["kind"])


@pytest.mark.slow
def test_moments_of_the_code_are_those_of_draws(build):
    """Probabilities of kinds; mean and spread of z over kinds."""
    program = build(two)
    x = jnp.repeat(jnp.asarray(X[:1]), 20_000, 0)
    z = np.asarray(draw_code(program, x, KEY))
    loc, scale = program.encoder.posterior(x[0])
    np.testing.assert_allclose(z.mean(0), loc, atol=0.03)
    np.testing.assert_allclose(z.std(0), scale, rtol=0.03, atol=0.01)

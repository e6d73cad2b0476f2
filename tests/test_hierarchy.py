"""Hierarchical and learned priors: global sites and their guide, parameters."""

from dataclasses import replace
from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
from numpyro import distributions as dist
from numpyro import handlers
from numpyro.contrib.module import eqx_module
from numpyro.infer import SVI, TraceMeanField_ELBO
import optax
import pytest

from sami_ppl import fit
from sami_ppl.decoders.training import Objective
from sami_ppl.fitting.objective import ScoreELBO
from sami_ppl.fitting.stage import Stage
from sami_ppl.fitting.step import Fit
from sami_ppl.priors.read import read_prior
from sami_ppl.saving.save import load, save

KEY = jax.random.key(0)
N = 6
X = np.linspace(-1.5, 1.5, 4 * N, dtype=np.float32).reshape(N, 4)[:, [2, 0, 3, 1]]


def hierarchical(obs):
    centre = numpyro.sample("centre", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
    spread = numpyro.sample("spread", dist.HalfNormal(1.0))
    with obs:
        numpyro.sample("z", dist.Normal(centre, spread).to_event(1))


def only_centre(obs):
    centre = numpyro.sample("centre", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
    with obs:
        numpyro.sample("z", dist.Normal(centre, 1.0).to_event(1))


def learned():
    numpyro.sample("z", dist.Normal(numpyro.param("centre", jnp.zeros(2)), 1.0).to_event(1))


# --- reading ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_global_sites_are_no_part_of_the_code():
    """The code holds the sites of one observation, scaled by what global sites do to them."""
    latents = read_prior(hierarchical)
    assert [s.name for s in latents.sites] == ["z"]
    assert [s.name for s in latents.global_sites] == ["centre", "spread"]
    assert latents.size == 2
    assert not latents.sites[0].standard, "its scale is not fixed"
    assert "global" in latents.describe()
    draws = np.random.default_rng(0).normal(size=100_000) + np.abs(
        np.random.default_rng(1).normal(size=100_000)
    ) * np.random.default_rng(2).normal(size=100_000)
    low, high = np.quantile(draws, [0.25, 0.75])
    np.testing.assert_allclose(latents.sites[0].scale, (high - low) / 1.349, rtol=0.1)


def test_a_plate_that_is_not_used_makes_no_hierarchy():
    """The same prior with the plate as an argument: the same code."""

    def flat():
        numpyro.sample("z", dist.Normal(1.0, 2.0).expand([2]).to_event(1))

    def plated(obs):
        with obs:
            flat()

    one, other = read_prior(flat), read_prior(plated)
    assert not other.global_sites
    z = jnp.ones((3, 2))
    np.testing.assert_array_equal(one.from_code(z)["z"], other.from_code(z)["z"])


ERRORS = {
    "all global": (lambda obs: numpyro.sample("a", dist.Normal(0, 1)), ValueError, "no latent site in the plate obs"),
    "other argument": (lambda u: None, TypeError, "takes the argument 'u', which is not given"),
    "name of a network": (lambda: numpyro.sample("z", dist.Normal(numpyro.param("encoder", 0.0), 1)), ValueError,
                          "'encoder' takes the name of a network"),
}  # fmt: skip


@pytest.mark.parametrize("name", ERRORS)
def test_what_cannot_be_read_is_refused(name):
    prior, error, message = ERRORS[name]
    with pytest.raises(error, match=f"(?s){message}"):
        read_prior(prior)


def improper():
    numpyro.sample("z", dist.ImproperUniform(dist.constraints.real, (), (2,)))


def global_angle(obs):
    angle = numpyro.sample("angle", dist.VonMises(0.0, 1.0))
    with obs:
        numpyro.sample("z", dist.Normal(jnp.zeros(2) + angle, 1).to_event(1))


def global_class(obs):
    kind = numpyro.sample("kind", dist.Categorical(jnp.ones(3) / 3))
    with obs:
        numpyro.sample("z", dist.Normal(jnp.zeros(2) + kind, 1).to_event(1))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("prior", "message"),
    [
        (improper, "cannot be drawn from.*improper"),
        (global_angle, "global prior site 'angle' lives on a circle, but the guide of global sites is Gaussian"),
        (global_class, "'kind' is discrete"),
    ],
)
def test_what_has_no_guide_or_no_draws_is_refused(prior, message):
    with pytest.raises(ValueError, match=message):
        read_prior(prior)


def test_another_prior_begins_anew(tiny_program):
    """Parameters of the prior replaced are forgotten, also where the new one has some of the same name."""

    def other():
        numpyro.sample("z", dist.Normal(numpyro.param("centre", jnp.ones(())), 1.0).expand([2]).to_event(1))

    moved = tiny_program(prior=learned).replace(prior_params={"centre": jnp.array([2.0, -1.0])})
    np.testing.assert_array_equal(moved.replace(sampler=moved.sampler).prior_params["centre"], [2.0, -1.0])
    assert moved.replace(prior=other).prior_params["centre"].shape == ()
    for wrong in ({"center": jnp.zeros(2)}, {"centre": jnp.zeros(3)}):
        with pytest.raises(ValueError, match="which the prior does not have in this shape; it has centre"):
            moved.replace(prior_params=wrong)


@pytest.mark.slow
def test_global_sites_have_no_floor_and_need_the_number_of_observations(tiny_program):
    """What would be without effect, or weighed by the batch, is refused; a weight of their own is not."""
    program = tiny_program(prior=only_centre)
    for setting in ({"free_bits": {"centre": 0.5}}, {"capacity": {"centre": 1.0}}):
        with pytest.raises(ValueError, match="free_bits or capacity name centre, shared by all observations"):
            Fit(program, Stage(**setting), steps=1, observations=10)
    with pytest.raises(ValueError, match=r"observations must be given with global sites \(centre\)"):
        Fit(program, Stage(), steps=1)
    weighted = Fit(program, Stage(batch=N, site_beta={"centre": 3.0}), steps=1, observations=N)
    beta = weighted.recipe.weights_at(0)
    arguments = (KEY, program.params(), program.model, program.guide, X)
    one, three = (ScoreELBO().terms(*arguments, beta=b, total=N)["centre"] for b in (beta["z"], beta))
    np.testing.assert_allclose(three, 3 * one, rtol=1e-6)


def test_a_second_plate_is_refused():
    def prior(obs):
        with numpyro.plate("pixels", 3), obs:
            numpyro.sample("z", dist.Normal(0.0, 1.0))

    with pytest.raises(ValueError, match=r"'z' has batch shape .*without plates but obs"):
        read_prior(prior)


# --- the objective ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("total", [N, 1000])
def test_the_objective_is_numpyros_divided_by_the_observations(tiny_program, total):
    """At one key, global sites once for all observations, whatever the batch stands for."""
    program = tiny_program(prior=hierarchical)
    for i in range(3):
        arguments = (jax.random.key(i), program.params(), program.model, program.guide, X)
        ours = ScoreELBO().loss(*arguments, total=total)
        np.testing.assert_allclose(total * ours, TraceMeanField_ELBO().loss(*arguments, total=total), rtol=1e-4)
    terms = ScoreELBO().terms(*arguments, total=total)
    assert terms["centre"].shape == terms["spread"].shape == ()
    few = ScoreELBO().terms(*arguments, total=2 * total)
    np.testing.assert_allclose(few["centre"], terms["centre"] / 2, rtol=1e-6)


@pytest.mark.slow
def test_global_sites_find_their_posterior(tiny_program):
    """q(z | x) held, the optimum is conjugate: N(Σ mₙ/(N + 1), 1/(N + 1)) for a centre with a N(0, 1) prior."""
    program = tiny_program(prior=only_centre)
    loc, _ = program.encode(X)
    own = {"centre$loc": "train", "centre$log_scale": "train"}
    optimiser = optax.multi_transform(
        {"train": optax.adam(optax.cosine_decay_schedule(0.05, 800)), "freeze": optax.set_to_zero()},
        lambda params: {name: own.get(name, "freeze") for name in params},
    )
    svi = SVI(partial(program.model, objective=Objective("none")), program.guide, optimiser, ScoreELBO())
    state = svi.init(KEY, X, total=N)
    update = jax.jit(lambda state: svi.update(state, X, total=N)[0])
    for _ in range(800):
        state = update(state)
    fitted = program.with_params(svi.get_params(state))
    site, global_site = fitted.latents.sites[0], fitted.latents.global_sites[0]
    means = site.shift + site.scale * loc
    found = global_site.shift + global_site.scale * np.asarray(fitted.prior_params["centre$loc"])
    spread = global_site.scale * np.exp(np.asarray(fitted.prior_params["centre$log_scale"]))
    np.testing.assert_allclose(found, means.sum(0) / (N + 1), atol=0.03)
    np.testing.assert_allclose(spread, (N + 1) ** -0.5, rtol=0.05)


def two_globals(obs):
    """z₁ ~ N(a + b, 1), z₂ ~ N(a + 2b, 1): what z says of a and b is correlated."""
    a = numpyro.sample("a", dist.Normal(0.0, 1.0))
    b = numpyro.sample("b", dist.Normal(0.0, 1.0))
    with obs:
        numpyro.sample("z", dist.Normal(jnp.stack([a + b, a + 2 * b], -1), 1.0).to_event(1))


def own_guide():
    """The user's own, of the right form."""
    loc = numpyro.param("own_loc", jnp.zeros(2))
    log_scale, slope = numpyro.param("own_log_scale", jnp.full(2, -3.0)), numpyro.param("own_slope", jnp.zeros(()))
    a = numpyro.sample("a", dist.Normal(loc[0], jnp.exp(log_scale[0])))
    numpyro.sample("b", dist.Normal(loc[1] + slope * a, jnp.exp(log_scale[1])))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["full", own_guide, "diagonal"], ids=["full", "own", "diagonal"])
def test_global_sites_find_their_covariance(tiny_program, kind):
    """q(z | x) held, q(a, b) is conjugate: precision I + N AᵀA, A = [[1, 1], [1, 2]]; correlation −.90.

    Covariance to 10 % of its scale, of 4,000 draws. The control is the diagonal Gaussian, at best diag(precision)⁻¹.
    """
    program = tiny_program(prior=two_globals, global_guide=kind)
    names = set(program.prior_params)
    optimiser = optax.multi_transform(
        {"train": optax.adam(optax.cosine_decay_schedule(0.05, 1500)), "freeze": optax.set_to_zero()},
        lambda params: {name: "train" if name in names else "freeze" for name in params},
    )
    # p(x | z) says nothing of a and b beyond z, which is held.
    svi = SVI(handlers.block(program.model, hide=["x"]), program.guide, optimiser, ScoreELBO())
    state = svi.init(KEY, X, total=N)
    state, _ = jax.jit(lambda s: jax.lax.scan(lambda s, _: svi.update(s, X, total=N), s, length=1500))(state)
    fitted = program.with_params(svi.get_params(state))
    draw = lambda key: handlers.trace(handlers.seed(fitted.sample_global_sites, key)).get_trace()  # noqa: E731
    values = jax.vmap(lambda key: jnp.stack([draw(key)[n]["value"] for n in "ab"]))(jax.random.split(KEY, 4000))

    site, design = program.latents.sites[0], np.array([[1, 1], [1, 2]])
    precision = np.eye(2) + N * design.T @ design
    wanted = np.linalg.inv(precision)
    means = site.shift + site.scale * program.encode(X)[0]
    found = np.cov(values.T)
    np.testing.assert_allclose(values.mean(0), wanted @ design.T @ means.sum(0), atol=0.05)
    if kind == "diagonal":
        np.testing.assert_allclose(np.diag(found), 1 / np.diag(precision), rtol=0.15)
        assert np.all(np.diag(wanted) > 4 * np.diag(found)), "far too narrow, as mean field is"
    else:
        np.testing.assert_allclose(found, wanted, atol=0.1 * wanted.max())


def test_a_guide_of_global_sites_is_checked(tiny_program):
    def other():
        numpyro.sample("a", dist.Normal(0.0, 1.0))

    with pytest.raises(ValueError, match="global_guide samples a, but the global sites of the prior are a, b: call"):
        tiny_program(prior=two_globals, global_guide=other)
    with pytest.raises(ValueError, match=r"global_guide must be 'diagonal', 'full' or a function .* got 'low rank'"):
        tiny_program(prior=two_globals, global_guide="low rank")
    program = tiny_program(prior=two_globals)
    assert set(program.replace(global_guide="full").prior_params) == {"globals$loc", "globals$factor"}
    assert set(tiny_program(global_guide="full").prior_params) == set(), "no global sites, nothing to guide"


# --- programs ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_fit_trains_the_prior_with_the_encoder(tiny_program, tmp_path):
    """Global sites and parameters of the prior move with the encoder, stay with the denoiser, and are saved."""
    x = np.random.default_rng(0).normal(1.0, 1.0, size=(64, 4)).astype(np.float32)
    stage = Stage(steps=20, batch=16, warmup=1, learning_rate=0.01, validate_every=20)
    for prior in (hierarchical, learned):
        program = tiny_program(prior=prior)
        fitted, _ = fit(program, x, replace(stage, train=("encoder",)), key=KEY, progress=False)
        for name, start in program.prior_params.items():
            assert not np.allclose(fitted.prior_params[name], start, atol=1e-4), name
        still, _ = fit(program, x, replace(stage, target="marginal", train=("denoiser",)), key=KEY, progress=False)
        jax.tree.map(np.testing.assert_array_equal, still.prior_params, program.prior_params)
        save(fitted, tmp_path / prior.__name__)
        again = load(tmp_path / prior.__name__, program)
        jax.tree.map(np.testing.assert_array_equal, again.prior_params, fitted.prior_params)


@pytest.mark.slow
def test_a_fit_counts_global_sites_once_for_all_observations(tiny_program):
    """The log's KL of a global site is its own divided by the training observations, here 54, not by the batch."""
    x = np.random.default_rng(0).normal(size=(60, 4)).astype(np.float32)
    stage = Stage(steps=4, batch=8, warmup=1, validate_every=4, ema=0.0, train=("encoder",))
    program = tiny_program(prior=only_centre)
    fitted, history = fit(program, x, stage, key=KEY, progress=False)
    loc, scale = fitted.prior_params["centre$loc"], np.exp(fitted.prior_params["centre$log_scale"])
    kl = 0.5 * np.sum(scale**2 + loc**2 - 1 - 2 * np.log(scale))
    np.testing.assert_allclose(history.stage_records()[-1]["kl"]["centre"], kl / 54, rtol=1e-4)


@pytest.mark.slow
def test_more_observations_may_be_held_out_than_are_trained_on(tiny_program):
    """A global site counts once for those trained on; validation looks at no more of them."""
    x = np.random.default_rng(0).normal(size=(40, 4)).astype(np.float32)
    stage = Stage(steps=2, batch=8, warmup=1, validate_every=2)
    _, history = fit(tiny_program(prior=only_centre), x[:16], stage, key=KEY, held_out=x, progress=False)
    assert np.isfinite(history.records[-1]["kl"]["centre"])


@pytest.mark.slow
def test_codes_come_from_the_fitted_prior(tiny_program):
    """Of mean and variance known, 5 standard errors (6e-7 each); the control is the prior as it began."""
    program = tiny_program(prior=learned)
    moved = program.replace(prior_params={"centre": jnp.array([2.0, -1.0])})
    count = 4000
    for one, centre in ((program, [0.0, 0.0]), (moved, [2.0, -1.0])):
        values = one.latents.from_code(one.prior_codes(KEY, count))["z"]
        np.testing.assert_allclose(values.mean(0), centre, atol=5 / count**0.5)
        np.testing.assert_allclose(values.var(0), 1.0, atol=5 * (2 / count) ** 0.5)
    program = tiny_program(prior=only_centre)
    wide = {"centre$loc": jnp.zeros(2), "centre$log_scale": jnp.full(2, jnp.log(3.0))}
    values = program.latents.from_code(program.replace(prior_params=wide).prior_codes(KEY, count))["z"]
    np.testing.assert_allclose(values.var(0), 10.0, atol=50 * (2 / count) ** 0.5)


@pytest.mark.slow
def test_a_flow_is_a_learned_prior(tiny_program):
    """An Equinox module made in the prior by `eqx_module`: its parameters are trained, its density enters the KL."""
    flow = eqx.nn.Linear(2, 2, key=KEY)

    def prior():
        found = eqx_module("flow", flow)
        numpyro.sample("z", dist.Normal(found(jnp.ones(2)), 1.0).to_event(1))

    program = tiny_program(prior=prior)
    assert set(program.prior_params) == {"flow$params"}
    x = np.random.default_rng(0).normal(1.0, 1.0, size=(64, 4)).astype(np.float32)
    stage = Stage(steps=20, batch=16, warmup=1, learning_rate=0.01, validate_every=20)
    fitted, _ = fit(program, x, stage, key=KEY, progress=False)
    assert not np.allclose(fitted.prior_params["flow$params"].weight, flow.weight, atol=1e-4)


@pytest.mark.slow
def test_the_posterior_has_global_sites_once(tiny_program):
    """Draws of global sites are those of all observations, whatever the chunks; each site's own dims."""
    tree = tiny_program(prior=hierarchical).posterior(X, key=KEY, draws=3, predictive=1, levels=1, chunk=4)
    assert tree["posterior"]["centre"].dims == ("chain", "draw", "centre_axis")
    assert tree["posterior"]["spread"].dims == ("chain", "draw")
    assert tree["posterior"]["z"].dims == ("chain", "draw", "obs", "z_axis")
    assert tree["prior"]["spread"].dims == ("chain", "draw")
    assert tree["posterior_predictive"]["x"].shape == (1, 1, N, 4)
    assert tree["log_likelihood"]["x"].shape == (1, 3, N)

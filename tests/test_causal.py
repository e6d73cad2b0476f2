"""Structural causal models: dependent sites, interventions, counterfactuals, against closed forms on Gaussians."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
from numpyro import distributions as dist
from numpyro import handlers
import pytest
import xarray as xr

from sami_ppl.decoders.exact import LinearGaussian
from sami_ppl.decoders.guidance import GuidedDenoiser
from sami_ppl.diffusion.inversion import check_deterministic, from_noise, to_noise
from sami_ppl.diffusion.sampler import DDIM, Ancestral, DPMSolver, FromPureNoise, Heun
from sami_ppl.diffusion.schedule import VarianceExploding, VariancePreserving
from sami_ppl.encoders.encoder import AbstractEncoder
from sami_ppl.encoders.law import DiagonalLaw, GaussianLaw
from sami_ppl.fitting.objective import ScoreELBO
from sami_ppl.posteriors.causal import counterfactual, descendants, intervene
from sami_ppl.priors.read import read_prior
from sami_ppl.program.program import Program

KEY = jax.random.key(0)
# z₁ = 0.5 + u₁, z₂ = 0.8 z₁ + 0.6 u₂, z₃ = −0.5 z₂ + z₁ + 0.7 u₃:  z = SHIFT + MIX u.
MIX = np.array([[1.0, 0.0, 0.0], [0.8, 0.6, 0.0], [0.6, -0.3, 0.7]])
SHIFT = 0.5 * MIX[:, 0]
WEIGHTS = np.random.default_rng(0).normal(size=(5, 3))


def chain():
    a = numpyro.sample("a", dist.Normal(0.5, 1.0))
    weight = numpyro.param("weight", jnp.asarray(0.8))
    b = numpyro.sample("b", dist.Normal(weight * a, 0.6))
    numpyro.sample("c", dist.Normal(a - 0.5 * b, 0.7))


class CodeEncoder(AbstractEncoder):
    """The exact posterior of u as one of the code, an affine function of u."""

    base: AbstractEncoder
    matrix: jax.Array
    offset: jax.Array

    @property
    def schedule(self):
        return self.base.schedule

    @property
    def event_shape(self):
        return self.base.event_shape

    @property
    def latent_size(self):
        return self.base.latent_size

    def parameters(self, x_noisy, log_snr):
        return self.base.parameters(x_noisy, log_snr)

    def distribution(self, parameters):
        q = self.base.distribution(parameters)
        return GaussianLaw(self.offset + (self.matrix @ q.mean[..., None])[..., 0], self.matrix @ q.root)

    def log_prob(self, z, x_noisy, log_snr):
        u = jnp.linalg.solve(self.matrix, z - self.offset)
        return self.base.log_prob(u, x_noisy, log_snr) - jnp.linalg.slogdet(self.matrix)[1]


def exact(schedule=None, noise_std=0.4):
    """x = W z + noise, z of the chain, by its noises u: the model in u, and the program in z with exact networks."""
    schedule = VariancePreserving(-6.0, 6.0) if schedule is None else schedule
    mix, shift, weights = (jnp.asarray(array) for array in (MIX, SHIFT, WEIGHTS))
    model = LinearGaussian(weights @ mix, noise_std, schedule, mean=weights @ shift)
    sites = read_prior(chain).sites
    scale, centre = (jnp.asarray(np.concatenate(p)) for p in zip(*((s.scale, s.shift) for s in sites), strict=True))
    encoder = CodeEncoder(model.encoder, mix / scale[:, None], (shift - centre) / scale)
    return model, Program(chain, model.denoiser, encoder)


# --- reading ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_graph_is_read():
    """Direct parents, by the computation: a coefficient of 0 counts, and a sum of parents that cancel does too."""

    def prior(obs):
        scale = numpyro.sample("scale", dist.HalfNormal(1.0))
        with obs:
            root = numpyro.sample("root", dist.Normal(0, scale).expand([2]).to_event(1))
            child = numpyro.sample("child", dist.Laplace(numpyro.param("slope", jnp.zeros(())) * root[..., 0], 1.0))
            numpyro.sample("grandchild", dist.Normal(child, 1.0))
            numpyro.sample("alone", dist.Uniform(-1.0, 1.0))

    latents = read_prior(prior)
    assert {s.name: s.parents for s in latents.sites} == {
        "root": ("scale",), "child": ("root",), "grandchild": ("child",), "alone": (),
    }  # fmt: skip
    assert descendants(latents, ["root"]) == ("child", "grandchild")
    assert descendants(latents, ["child"]) == ("grandchild",)
    assert descendants(latents, ["grandchild", "alone"]) == ()


@pytest.mark.slow
def test_a_law_that_is_learned_or_has_parents_is_not_standard():
    """Such axes have no rotation symmetry, also where they begin as N(0, 1)."""

    def prior():
        a = numpyro.sample("a", dist.Normal(0.0, 1.0))
        numpyro.sample("b", dist.Normal(numpyro.param("slope", jnp.zeros(())) * a, 1.0))
        numpyro.sample("c", dist.Normal(numpyro.param("mean", jnp.zeros(())), 1.0))

    assert [site.standard for site in read_prior(prior).sites] == [True, False, False]


@pytest.mark.parametrize("bound", ["site", "param", "given"])
def test_a_support_that_moves_is_refused(bound):
    def prior(u):
        a = numpyro.sample("a", dist.Normal(0.0, 1.0))
        moved = {"site": a, "param": numpyro.param("slope", jnp.ones(())), "given": u}[bound]
        numpyro.sample("b", dist.Uniform(moved - 1, moved + 1))

    with pytest.raises(ValueError, match=r"support of prior site 'b' moves with (a|slope|u), but"):
        read_prior(prior, {"u": np.arange(3.0)})


# --- the objective ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_kl_of_dependent_sites_is_unbiased(x64):
    """Its mean over draws is KL(q(z | x) ‖ p(z)), closed form, for a posterior with and without correlations."""
    model, program = exact()
    x, _ = model.sample(jax.random.key(3), 2)
    q = program.code_law(x)
    loc, factor = np.asarray(q.mean), np.asarray(q.root)
    scale, centre = (np.concatenate([getattr(s, n) for s in program.latents.sites]) for n in ("scale", "shift"))
    mean, cov = centre + scale * loc, scale[:, None] * (factor @ np.swapaxes(factor, -1, -2)) * scale
    prior_cov = MIX @ MIX.T

    class Diagonal(CodeEncoder):
        def distribution(self, parameters):
            q = super().distribution(parameters)
            return DiagonalLaw(q.mean, jnp.sqrt(q.variance))

    for kind in (CodeEncoder, Diagonal):
        encoder = kind(program.encoder.base, program.encoder.matrix, program.encoder.offset)
        q_cov = cov if kind is CodeEncoder else cov * np.eye(3)
        away = mean - SHIFT
        square = np.einsum("ni,ij,nj->n", away, np.linalg.inv(prior_cov), away)
        trace = np.trace(np.linalg.solve(prior_cov, np.asarray(q_cov)), axis1=-2, axis2=-1)
        log_det = np.linalg.slogdet(prior_cov)[1] - np.linalg.slogdet(q_cov)[1]
        truth = np.mean(0.5 * (trace + square - 3 + log_det))

        chosen = program.replace(encoder=encoder)

        def kl(key, chosen=chosen):
            terms = ScoreELBO().terms(key, chosen.params(), chosen.model, chosen.guide, x)
            return sum(jnp.sum(terms[name]) for name in "abc")

        draws = np.asarray(jax.jit(jax.vmap(kl))(jax.random.split(KEY, 4000)))
        error = draws.std() / np.sqrt(len(draws))
        # Two tests at 4 standard errors: a false alarm in 8,000.
        assert abs(draws.mean() - truth) < 4 * error
        assert error < 0.02 * truth
        independent = 0.5 * np.mean(
            np.sum((np.diagonal(q_cov, axis1=-2, axis2=-1) + away**2) / np.diag(prior_cov), -1) - 3
            + np.log(np.diag(prior_cov)).sum() - np.linalg.slogdet(q_cov)[1]
        )  # fmt: skip
        assert abs(draws.mean() - independent) > 4 * error, "control: the KL from independent marginals"


# --- noise codes ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("schedule", [VariancePreserving(-6.0, 6.0), VarianceExploding(-6.0, 6.0)], ids=["vp", "ve"])
@pytest.mark.parametrize(("sampler", "order"), [(DDIM, 1), (DPMSolver, 2), (Heun, 2)], ids=["ddim", "dpm", "heun"])
def test_a_noise_code_gives_the_observation_back(sampler, order, schedule, x64):
    """The error of the round trip falls by 2^order with the steps halved."""
    model, program = exact(schedule)
    x, z = (leaf[0] for leaf in model.sample(KEY, 1))
    guided = GuidedDenoiser(program.denoiser, program.encoder, program.encoder.offset + program.encoder.matrix @ z)
    errors = []
    for steps in (40, 80):
        solver = sampler(steps * sampler.evaluations_per_step + 1)
        back = from_noise(solver, guided, to_noise(solver, guided, x))
        errors.append(float(jnp.max(jnp.abs(back - x))))
    assert np.log2(errors[0] / errors[1]) > 0.8 * order
    assert errors[1] < 5e-2


@pytest.mark.slow
def test_a_sampler_in_another_runs_backwards_if_that_one_does(x64):
    """`FromPureNoise` changes where samples start, not the way of an image to its noise code and back."""
    _, program = exact()
    for sampler in (DDIM(11), Heun(11), FromPureNoise(Heun(11))):
        check_deterministic(FromPureNoise(sampler))
        x = jnp.ones(program.event_shape)
        np.testing.assert_array_equal(*(to_noise(s, program.denoiser, x) for s in (sampler, FromPureNoise(sampler))))
    with pytest.raises(ValueError, match="got FromPureNoise"):
        check_deterministic(FromPureNoise(Ancestral(10)))


@pytest.mark.slow
def test_the_noise_code_is_the_exact_one(x64):
    """Given z, x is Gaussian: its noise code is the residual over its standard deviation."""
    model, program = exact()
    x, z = (leaf[0] for leaf in model.sample(KEY, 1))
    guided = GuidedDenoiser(program.denoiser, program.encoder, program.encoder.offset + program.encoder.matrix @ z)
    noise = to_noise(Heun(801), guided, x)
    residual = x - model.mean - model.weights @ z
    np.testing.assert_allclose(noise, residual / jnp.sqrt(model.variance(jnp.asarray(6.0))), atol=2e-3)


# --- interventions ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_an_intervention_moves_descendants_only(x64):
    """Laws of the factors under do, against the closed form; the value set reaches site and image."""
    _, program = exact()
    size = 4000
    found = intervene(program, {"b": 2.0}, key=KEY, size=size, sampler=DDIM(3))
    assert dict(found.sizes) == {"draw": size, "feature": 5}
    np.testing.assert_allclose(found["b"], 2.0, atol=1e-6)
    # a keeps its law; c = a − ½ · 2 + 0.7 u.  5 standard errors each.
    for name, mean, sd in (("a", 0.5, 1.0), ("c", -0.5, np.sqrt(1 + 0.49))):
        assert abs(float(found[name].mean()) - mean) < 5 * sd / np.sqrt(size)
        assert abs(float(found[name].std()) - sd) < 5 * sd / np.sqrt(2 * size)
    seen = intervene(program, {}, key=KEY, size=size, sampler=DDIM(3))
    np.testing.assert_allclose(seen["a"], found["a"], atol=1e-6)
    assert abs(float(seen["b"].mean()) - 0.4) < 5 / np.sqrt(size), "control: without do, b follows a"


@pytest.mark.slow
def test_images_under_an_intervention_are_of_the_value_set():
    """Not of what the site would have been by itself, which a trace under `handlers.do` still holds."""
    _, program = exact(noise_std=0.1)
    found = intervene(program, {"a": -3.0}, key=KEY, size=64)
    factors = np.stack([found[name].values for name in "abc"], -1)
    np.testing.assert_allclose(found["x"], factors @ WEIGHTS.T, atol=0.6)
    assert abs(float(found["b"].mean()) + 2.4) < 5 * 0.6 / 8


# --- counterfactuals --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def world():
    """The exact program, six observations and a counterfactual of them."""
    model, program = exact()
    x, _ = model.sample(jax.random.key(5), 6)
    data = xr.Dataset({"x": (("obs", "feature"), np.asarray(x))}, coords={"obs": list("uvwxyz")})
    return program, data, counterfactual(program, data, {"b": 2.0}, key=KEY, draws=3, sampler=Heun(201), chunk=4)


@pytest.mark.slow
def test_a_counterfactual_is_the_exact_one(world):
    """x + W (z' − z): the image's residual stays; c follows b, with its own noise."""
    _, data, tree = world
    before, after = tree["factual"], tree["counterfactual"]
    assert dict(after.sizes) == {"draw": 3, "obs": 6, "feature": 5}
    assert list(after["obs"].values) == list("uvwxyz")
    np.testing.assert_array_equal(after["a"], before["a"])
    np.testing.assert_allclose(after["b"], 2.0, rtol=1e-6)
    np.testing.assert_allclose(after["c"] - before["c"], -0.5 * (2.0 - before["b"]), atol=1e-5)
    moved = sum(WEIGHTS[:, j] * (after[name] - before[name]).values[..., None] for j, name in enumerate("abc"))
    np.testing.assert_allclose(after["x"].values, data["x"].values + moved, atol=5e-3)
    assert np.abs(moved).max() > 1, "the control: it moves"


@pytest.mark.slow
def test_a_null_intervention_gives_the_observation_back(world):
    """Do(b = its own abducted value), and no intervention at all, up to the solver's error, which falls with steps."""
    program, data, tree = world
    own = {"b": tree["factual"]["b"].values}
    errors = []
    for evaluations in (51, 201):
        same = counterfactual(program, data, own, key=KEY, draws=3, sampler=Heun(evaluations), chunk=4)
        np.testing.assert_allclose(same["counterfactual"]["c"], tree["factual"]["c"], atol=1e-5)
        errors.append(float(np.abs(same["counterfactual"]["x"] - data["x"]).max()))
    assert errors[1] < 5e-3
    assert errors[1] < errors[0] / 4
    none = counterfactual(program, data, {}, key=KEY, draws=3, sampler=Heun(201), chunk=4)
    np.testing.assert_allclose(none["counterfactual"]["x"], same["counterfactual"]["x"], atol=1e-4)


@pytest.mark.slow
def test_a_leaf_leaves_its_parents(world):
    program, data, _ = world
    tree = counterfactual(program, data, {"c": np.arange(6.0)}, key=KEY, draws=2, sampler=DDIM(5), chunk=4)
    for name in "ab":
        np.testing.assert_array_equal(tree["factual"][name], tree["counterfactual"][name])
    np.testing.assert_allclose(tree["counterfactual"]["c"], np.tile(np.arange(6.0), (2, 1)), atol=1e-6)


def sloped(obs):
    slope = numpyro.sample("slope", dist.HalfNormal(1.0))
    with obs:
        parent = numpyro.sample("parent", dist.Normal(0.0, 1.0))
        numpyro.sample("child", dist.Normal(slope * parent, 0.5))


@pytest.mark.slow
def test_chunks_share_global_sites_and_nothing_else(tiny_program):
    """The slope, (child' − child)/(parent' − parent), is one for all observations of a draw; their factors are not."""
    program = tiny_program(sloped)
    wide = program.prior_params | {"slope$log_scale": jnp.zeros(1)}
    x = np.full((4, 4), 0.3, np.float32)
    tree = counterfactual(
        program.replace(prior_params=wide), x, {"parent": 9.0}, key=KEY, draws=2, sampler=DDIM(3), chunk=2
    )
    before, after = (tree[name].to_dataset() for name in ("factual", "counterfactual"))
    slope = ((after["child"] - before["child"]) / (9.0 - before["parent"])).values
    np.testing.assert_allclose(slope, np.repeat(slope[:, :1], 4, 1), rtol=1e-3)
    assert abs(slope[0, 0] - slope[1, 0]) > 0.01, "control: each draw has its own"
    assert len(np.unique(before["parent"])) == 8


LAWS = {
    "laplace": lambda loc: dist.Laplace(loc, 0.5),
    "exponential": lambda loc: dist.Exponential(jnp.exp(-loc)),
    "lognormal": lambda loc: dist.LogNormal(loc, 0.5),
    "vector": lambda loc: dist.Normal(jnp.stack([loc, -loc], -1), 0.5).to_event(1),
    "full": lambda loc: dist.MultivariateNormal(
        jnp.stack([loc, -loc], -1), scale_tril=jnp.array([[1.0, 0.0], [0.5, 0.7]])
    ),
}


@pytest.mark.slow
def test_noise_is_held(tiny_program, x64):
    """Every law: the child has, after, the same noise around the new location."""

    def prior():
        parent = numpyro.sample("parent", dist.Normal(0.0, 1.0))
        for law, make in LAWS.items():
            numpyro.sample(law, make(parent))

    x = 0.1 * np.linspace(-1, 1, 8).reshape(2, 4)
    tree = counterfactual(tiny_program(prior), x, {"parent": 0.5}, key=KEY, draws=2, sampler=DDIM(3))
    moved = 0.5 - tree["factual"]["parent"].values
    for law in LAWS:
        before, after = (tree[name][law].values for name in ("factual", "counterfactual"))
        if law in ("lognormal", "exponential"):
            before, after = np.log(before), np.log(after)
        shift = moved[..., None] * np.array([1, -1]) if law in ("vector", "full") else moved
        np.testing.assert_allclose(after, before + shift, atol=1e-4, err_msg=law)


# --- mistakes ---------------------------------------------------------------------------------------------------------


def mixed(obs):
    scale = numpyro.sample("scale", dist.HalfNormal(1.0))
    with obs:
        root = numpyro.sample("root", dist.Normal(0.0, scale))
        numpyro.sample("share", dist.Uniform(0.0, 1.0))
        pair = dist.Normal(jnp.stack([root, -root], -1), 0.3)
        numpyro.sample("child", dist.MixtureSameFamily(dist.Categorical(jnp.ones(2) / 2), pair))


BAD = {
    "unknown site": ({"rot": 1.0}, r"do names 'rot', but the sites of the prior are root, share, child"),
    "global site": ({"scale": 1.0}, r"'scale', a global site, .*set a site in the plate obs \(root, share, child\)"),
    "shape": ({"root": np.zeros(3)}, r"'root' a value of shape \(3,\): it must have the shape of one value, \(\)"),
    "support": ({"share": 1.5}, r"'share' a value off its support.*got 1.5"),
    "edge": ({"share": 1.0}, r"'share' a value off its support, or on the edge"),
    "nan": ({"root": np.nan}, r"'root' a value off its support"),
}


@pytest.fixture(scope="module")
def mixed_program():
    schedule = VariancePreserving(-4.0, 4.0)
    model = LinearGaussian(jnp.ones((4, 3)), 0.5, schedule)
    return Program(mixed, model.denoiser, model.encoder)


@pytest.mark.slow
@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_set_is_refused(name, mixed_program):
    do, message = BAD[name]
    with pytest.raises(ValueError, match=f"(?s){message}"):
        intervene(mixed_program, do, key=KEY, size=2)
    with pytest.raises(ValueError, match=f"(?s){message}"):
        counterfactual(mixed_program, np.zeros((2, 4), np.float32), do, key=KEY)


@pytest.mark.slow
def test_what_has_no_counterfactual_is_refused(mixed_program):
    x = np.zeros((2, 4), np.float32)
    with pytest.raises(ValueError, match=r"'child' \(MixtureSameFamily\) depends on a site that is set, but has no"):
        counterfactual(mixed_program, x, {"root": 1.0}, key=KEY)
    kept = counterfactual(mixed_program, x, {"share": 0.3}, key=KEY, draws=2, sampler=DDIM(3))
    np.testing.assert_array_equal(kept["factual"]["child"], kept["counterfactual"]["child"])
    for stochastic in (Ancestral(11), FromPureNoise(Ancestral(11))):
        with pytest.raises(ValueError, match=f"deterministic to run backwards, got {type(stochastic).__name__}"):
            counterfactual(mixed_program, x, {}, key=KEY, sampler=stochastic)
    with pytest.raises(ValueError, match="draws and chunk must be at least 1, got draws=0"):
        counterfactual(mixed_program, x, {}, key=KEY, draws=0)


def test_handlers_do_leaves_the_draw_at_the_site():
    """Why values are put in by hand: NumPyro's trace under do holds the site's own draw, not the value set."""
    trace = handlers.trace(handlers.seed(handlers.do(chain, data={"a": 9.0}), 0)).get_trace()
    assert abs(trace["a"]["value"]) < 5
    assert abs(trace["b"]["value"] - 7.2) < 5 * 0.6

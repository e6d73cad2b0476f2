"""Discrete sites: what is read of them, and the objective that sums over their values, against the exact mixture."""

import itertools

from discrete_priors import KEY, LABEL, X, dataset, joint, kinds_program, labelled, two
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
from numpyro import distributions as dist
from numpyro import handlers
import pytest

from sami_ppl import families
from sami_ppl.decoders.guidance import guidance
from sami_ppl.fitting.objective import ScoreELBO, scores
from sami_ppl.priors.read import read_prior
from sami_ppl.priors.sites import Discrete
from sami_ppl.program.kl import traces
from sami_ppl.refinement import nuts

# --- reading ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_discrete_sites_have_one_hot_codes_and_children_know_their_parents():
    latents = read_prior(joint)
    kind, z, light = latents.sites
    assert (kind.categories, kind.size, kind.axes) == (3, 3, ("kind[0]", "kind[1]", "kind[2]"))
    assert [site.kinds for site in latents.sites] == [(), ("kind",), ()]
    assert light.standard
    assert not z.standard
    values = {"kind": jnp.array([2, 0]), "z": jnp.ones((2, 2)), "light": jnp.zeros(2)}
    code = latents.to_code(values)
    np.testing.assert_array_equal(code[:, :3], [[0, 0, 1], [1, 0, 0]])
    np.testing.assert_array_equal(latents.from_code(code)["kind"], [2, 0])
    np.testing.assert_array_equal(latents.onto_support(code + 0.2)[:, :3], code[:, :3])
    found = {site.name: site.kinds for site in read_prior(two).sites}
    assert found["z"] == ("kind", "flip")
    graph = {site.name: site.parents for site in read_prior(labelled, {"label": np.array([-1])}).sites}
    assert graph == {"kind": (), "z": ("kind",)}, "also where kinds are observed in part"


@pytest.mark.slow
def test_families_follow_the_prior(build):
    """A classifier, a family for every kind (and every pair of kinds), a Gaussian where nothing depends on them."""
    assert [type(f).__name__ for f in build(joint).encoder.families] == ["Categorical", "PerCategory", "Diagonal"]
    found = build(two).encoder
    assert [type(f).__name__ for f in found.families] == ["Categorical", "Categorical", "PerCategory"]
    assert found.families[2].heads.loc.weight.shape[0] == 6


@pytest.mark.slow
def test_kinds_count_that_move_nothing_yet():
    """Read from the computation: of means that are learned and start alike, of two kinds that act together only."""

    def prior():
        kind = numpyro.sample("kind", dist.Categorical(jnp.ones(3) / 3))
        flips = [numpyro.sample(name, dist.Bernoulli(0.5)) for name in ("one", "other")]
        numpyro.sample("learned", dist.Normal(numpyro.param("means", jnp.zeros(3))[kind], 1.0))
        both = numpyro.sample("both", dist.Normal(2.0 * flips[0] * flips[1], 1.0))
        numpyro.sample("through", dist.Normal(both, 1.0 + kind))
        numpyro.sample("alone", dist.Normal(0.0, 1.0))

    assert {site.name: site.kinds for site in read_prior(prior).sites if not isinstance(site, Discrete)} == {
        "learned": ("kind",), "both": ("one", "other"), "through": ("kind", "one", "other"), "alone": (),
    }  # fmt: skip


def event():
    numpyro.sample("kind", dist.Categorical(jnp.ones((2, 3)) / 3).to_event(1))


def offset():
    numpyro.sample("kind", dist.DiscreteUniform(1, 6))


def many():
    for name in ("a", "b"):
        numpyro.sample(name, dist.Categorical(jnp.ones(9) / 9))


def continuous(label):
    numpyro.sample("z", dist.Normal(0, 1), obs=label, obs_mask=label >= 0)


def shared(obs):
    kind = numpyro.sample("kind", dist.Bernoulli(0.5))
    with obs:
        numpyro.sample("z", dist.Normal(kind, 1.0))


ERRORS = {
    "several": (event, None, "'kind' .* holds several discrete variables.*dist.Categorical site for each"),
    "offset": (offset, None, "'kind' .DiscreteUniform. has the values 1 … 6: number them from 0"),
    "too many": (many, None, r"a \(9\), b \(9\) have 81 combinations of values, more than the 64.*MixtureSameFamily"),
    "global": (shared, None, "global prior site 'kind' is discrete .Bernoulli."),
    "continuous label": (continuous, {"label": np.array([-1.0])}, "'z' is continuous and observed for some"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", ERRORS)
def test_what_cannot_be_summed_over_is_refused(name):
    prior, given, message = ERRORS[name]
    with pytest.raises(ValueError, match=f"(?s){message}"):
        read_prior(prior, given)


@pytest.mark.slow
def test_programs_and_methods_that_cannot_refuse(build, tiny_program):
    """A Gaussian encoder, a Gaussian family, refinement, labels that are no kinds; each names the site."""
    program = build(joint)
    with pytest.raises(ValueError, match="'kind' is discrete, with 3 values: build the encoder with encoder_for"):
        tiny_program(joint)
    with pytest.raises(ValueError, match="'kind' is discrete, with 3 values: leave it out of families"):
        families.choose_families(program.latents, {"kind": families.Diagonal})
    with pytest.raises(ValueError, match="'light' is continuous: Categorical is for discrete sites"):
        families.Categorical(3, program.latents.sites[2], key=KEY)
    alone = build(lambda: numpyro.sample("kind", dist.Categorical(jnp.ones(3) / 3)))
    with pytest.raises(ValueError, match=r"discrete sites alone \(kind\).*program.posterior\(data"):
        nuts(alone, X[:1], key=KEY, draws=2)
    told = build(labelled, {"label": np.array([-1])})
    for label, wrong in ((LABEL + 1, 3), (LABEL + 0.5, 0.5)):
        with pytest.raises(ValueError, match=f"of prior site 'kind' must be 0 … 2, .* got {wrong}"):
            told.observations(dataset(label=label))


# --- the exact mixture ------------------------------------------------------------------------------------------------


@pytest.fixture
def oracle():
    return kinds_program()


@pytest.mark.slow
def test_guidance_given_the_kind_is_that_of_the_marginal_program(oracle):
    """∇ log q(kind | x_λ) + ∇ log q(z | kind, x_λ) = ∇ log q(z | x_λ), for every kind; either half alone is not."""
    with_kinds, marginal, _ = oracle
    x, level = jnp.array([0.7, -0.2]), jnp.asarray(0.5)
    for kind, value in itertools.product(range(3), (-1.0, 0.4)):
        values = {"kind": jnp.asarray(kind), "z": jnp.array([value])}
        own = guidance(with_kinds.encoder, with_kinds.latents.to_code(values), x, level)
        other = guidance(marginal.encoder, marginal.latents.to_code({"z": values["z"]}), x, level)
        np.testing.assert_allclose(own, other, rtol=1e-3, atol=1e-4)
        parameters = lambda x: with_kinds.encoder.parameters(x, level)["kind"][kind]  # noqa: E731, B023
        assert np.abs(np.asarray(jax.grad(parameters)(x))).max() > 0.02, "the classifier has its share"


@pytest.mark.slow
def test_kl_summed_over_kinds_is_that_of_the_marginal_program(oracle):
    """KL(q(kind, z) ‖ p(kind, z)), exact by enumeration, = KL(q(z) ‖ p(z)), by quadrature: the exact q(kind | z)."""
    with_kinds, _, model = oracle
    x = jnp.array([[0.7, -0.2], [-1.0, 0.1], [0.4, 0.4]])
    found = scores(KEY, with_kinds.params(), with_kinds.model, with_kinds.guide, x).local
    kl = np.asarray(found["kind"] + found["z"])[:, 0]
    schedule, z = model.schedule, np.linspace(-5, 5, 4001, dtype=np.float32)
    level = jnp.asarray(schedule.log_snr_max)
    own = jax.vmap(lambda x: jax.vmap(lambda z: model.log_posterior(z[None], schedule.alpha(level) * x, level))(z))(x)
    parts = dist.Normal(jnp.array([-1.0, 0.2, 1.5]), 0.4)
    prior = dist.MixtureSameFamily(dist.Categorical(jnp.array([0.5, 0.3, 0.2])), parts).log_prob(z)
    expected = (jnp.exp(own) * (own - prior)).sum(1) * (z[1] - z[0])
    np.testing.assert_allclose(kl, expected, rtol=2e-3)


# --- the objective ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("prior", [pytest.param(joint, marks=pytest.mark.slow), two])
def test_loss_is_the_weighted_sum_of_the_losses_at_each_value(prior, build):
    """By brute force: NumPyro traces at every combination of values, observation by observation, at the same key."""
    program = build(prior)
    found = ScoreELBO().terms(KEY, program.params(), program.model, program.guide, X)
    names = [site.name for site in program.latents.discrete]
    expected = {name: np.zeros(jnp.shape(value)) for name, value in found.items()}
    for values in itertools.product(*(range(site.categories) for site in program.latents.discrete)):
        held = {name: jnp.full(5, value) for name, value in zip(names, values, strict=True)}
        guide = handlers.substitute(program.guide, data=held)
        p, q = traces(KEY, program.params(), program.model, guide, X)
        logs = {name: (q[name]["fn"].log_prob(held[name]), p[name]["fn"].log_prob(held[name])) for name in names}
        weight = np.exp(sum(np.asarray(log_q) for log_q, _ in logs.values()))
        expected["x"] -= np.mean(weight * p["x"]["fn"].log_prob(X))
        for name, (log_q, log_p) in logs.items():
            expected[name] += np.mean(weight * (log_q - log_p))
        for name in set(found) - {"x", *names}:
            kl = dist.kl_divergence(q[name]["fn"].base_dist, p[name]["fn"].base_dist) if name == "z" else (
                dist.kl_divergence(q[name]["fn"], p[name]["fn"])[:, None])  # fmt: skip
            expected[name] += np.mean(weight[:, None] * kl, axis=0)
    for name, value in found.items():
        np.testing.assert_allclose(value, expected[name], rtol=1e-4, atol=1e-5, err_msg=name)


@pytest.mark.slow
def test_gradient_is_exact(x64, build):
    """Of the classifier and of all else: a random direction against central differences in double precision."""
    program = build(joint)
    double = lambda tree: jax.tree.map(lambda a: jnp.asarray(a, jnp.float64), tree)  # noqa: E731
    params = double(program.params())
    loss = jax.jit(lambda p: ScoreELBO().loss(KEY, p, program.model, program.guide, jnp.asarray(X, jnp.float64)))
    gradient = jax.grad(loss)(params)
    rng = np.random.default_rng(0)
    way = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape)), params)
    step = 1e-5
    ends = [loss(jax.tree.map(lambda p, w, s=s: p + s * step * w, params, way)) for s in (1, -1)]
    slope = sum(jnp.sum(g * w) for g, w in zip(jax.tree.leaves(gradient), jax.tree.leaves(way), strict=True))
    np.testing.assert_allclose(slope, (ends[0] - ends[1]) / (2 * step), rtol=1e-5)
    classifier = gradient["encoder$params"].families[0].logits.weight
    assert np.abs(classifier).max() > 1e-4


@pytest.mark.slow
def test_denoiser_is_not_evaluated_for_every_value(build):
    """Mapped over values, the denoiser sees no value: its work in the compiled loss is that of a single one."""
    program = build(joint)
    jaxpr = jax.make_jaxpr(lambda p: ScoreELBO().loss(KEY, p, program.model, program.guide, X))(program.params())
    products = [
        tuple(v.aval.shape for v in e.invars) for e in _equations(jaxpr.jaxpr) if str(e.primitive) == "dot_general"
    ]
    sizes = {}
    for name, network in (("denoiser", program.denoiser.network), ("encoder", program.encoder.network)):
        found = [shapes for shapes in products if network.outer.shape in shapes]
        sizes[name] = {int(np.prod(shape)) for shapes in found for shape in shapes if shape != network.outer.shape}
    assert sizes["denoiser"] == {5 * 6}, "five observations, six features"
    assert max(sizes["encoder"]) == 3 * 5 * 6, "the control: slopes of log q are mapped over three values"


def _equations(jaxpr):
    for equation in jaxpr.eqns:
        yield equation
        for value in equation.params.values():
            for inner in value if isinstance(value, tuple | list) else (value,):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    yield from _equations(inner)

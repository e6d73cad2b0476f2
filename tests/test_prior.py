"""Reading a prior: sites, supports, the code z, and what is refused."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
from numpyro import distributions as dist
from numpyro import handlers
from numpyro.distributions import constraints
from numpyro.distributions.transforms import biject_to
import pytest

from sami_ppl.priors.read import read_prior

# name: (distribution, constrained shape, number of unconstrained coordinates, standard Gaussian site)
SITES = {
    "normal": (lambda: dist.Normal(1.0, 3.0), (), 1, True),
    "normal vector": (lambda: dist.Normal(jnp.arange(3.0), 2.0).to_event(1), (3,), 3, True),
    "normal matrix": (lambda: dist.Normal(0, 1).expand([2, 3]).to_event(2), (2, 3), 6, True),
    "uniform": (lambda: dist.Uniform(-2.0, 5.0), (), 1, False),
    "uniform box": (lambda: dist.Uniform(-1, 1).expand([3]).to_event(1), (3,), 3, False),
    "beta": (lambda: dist.Beta(2.0, 3.0), (), 1, False),
    "gamma": (lambda: dist.Gamma(2.0, 0.5), (), 1, False),
    "half normal": (lambda: dist.HalfNormal(2.0), (), 1, False),
    "laplace": (lambda: dist.Laplace(0, 1).expand([2]).to_event(1), (2,), 2, False),
    "student t": (lambda: dist.StudentT(2.0, 0.0, 1.0), (), 1, False),
    "dirichlet": (lambda: dist.Dirichlet(jnp.ones(4)), (4,), 3, False),
    "lkj": (lambda: dist.LKJCholesky(3, 1.0), (3, 3), 3, False),
    "full normal": (lambda: dist.MultivariateNormal(jnp.zeros(2), jnp.eye(2)), (2,), 2, False),
}


def several():
    for name, (fn, *_) in SITES.items():
        numpyro.sample(name.replace(" ", "_"), fn())


@functools.cache
def read(name):
    """The reading of a prior with this one site "f", and 4,000 draws of it."""
    fn = SITES[name][0]()
    return read_prior(lambda: numpyro.sample("f", fn)), fn, fn.sample(jax.random.key(5), (4000,))


@functools.cache
def read_several():
    return read_prior(several)


@pytest.mark.slow
@pytest.mark.parametrize("name", SITES)
def test_each_site_is_read(name):
    """Shapes, unconstrained size and the exact-Gaussian flag of one site; default dims are derived from its name."""
    _, shape, size, standard = SITES[name]
    latents = read(name)[0]
    (site,) = latents.sites
    assert (site.name, site.event_shape, site.size, site.standard) == ("f", shape, size, standard)
    assert latents.size == len(latents.axes) == size
    assert site.code == slice(0, size)
    assert site.dims == {0: (), 1: ("f_axis",), 2: ("f_axis0", "f_axis1")}[len(shape)]
    assert len(set(latents.axes)) == size


@pytest.mark.slow
@pytest.mark.parametrize("name", SITES)
def test_code_is_the_unconstrained_value_standardised(name):
    """z = (biject_to(support)⁻¹(value) − shift)/scale; Gaussian sites exactly, others to a robust centre and scale."""
    _, _, size, standard = SITES[name]
    latents, fn, values = read(name)
    z = np.asarray(latents.to_code({"f": values}))
    unconstrained = np.asarray(biject_to(fn.support).inv(values)).reshape(4000, size)
    (site,) = latents.sites
    np.testing.assert_allclose(z * site.scale + site.shift, unconstrained, atol=2e-4)
    low, median, high = np.quantile(z, [0.25, 0.5, 0.75], axis=0)
    # sd of these quantiles over 4,000 draws is at most .022: 7 sd
    np.testing.assert_allclose(median, 0, atol=0.15)
    np.testing.assert_allclose((high - low) / 1.349, 1, atol=0.15)
    if standard:
        np.testing.assert_allclose(site.shift, np.broadcast_to(fn.mean, fn.event_shape).ravel(), rtol=1e-6)
        np.testing.assert_allclose(site.scale**2, np.broadcast_to(fn.variance, fn.event_shape).ravel(), rtol=1e-6)


@pytest.mark.slow
def test_several_sites_share_one_code():
    """All sites together: consecutive, disjoint coordinates in program order, and a round trip in both directions."""
    latents, n = read_several(), 50
    assert [s.name for s in latents.sites] == [name.replace(" ", "_") for name in SITES]
    assert [s.start for s in latents.sites] == list(np.cumsum([0, *(s.size for s in latents.sites)])[:-1])
    assert latents.size == len(latents.axes) == len(set(latents.axes)) == sum(row[2] for row in SITES.values())

    values = {name.replace(" ", "_"): read(name)[2][:n] for name in SITES}
    z = latents.to_code(values)
    assert z.shape == (n, latents.size)
    back = latents.from_code(z)
    for name, value in values.items():
        np.testing.assert_allclose(back[name], value, rtol=2e-3, atol=2e-5, err_msg=name)
    np.testing.assert_allclose(latents.to_code(back), z, rtol=5e-3, atol=2e-3)


@pytest.mark.slow
def test_every_code_is_a_value_in_the_support():
    """z ∈ ℝᴰ is free: any code maps into the support of every site, with any leading dims."""
    latents = read_several()
    values = latents.from_code(2 * jax.random.normal(jax.random.key(6), (5, 7, latents.size)))
    for name, (_, shape, *_) in SITES.items():
        value = values[name.replace(" ", "_")]
        assert value.shape == (5, 7, *shape)
        assert read(name)[1].support(value).all(), name


@pytest.mark.slow
def test_sites_may_depend_on_each_other():
    """A hierarchical prior: the dependent Gaussian is not taken for a fixed one, Gaussian as each trace is."""

    def prior():
        a = numpyro.sample("a", dist.Normal(0, 1))
        numpyro.sample("b", dist.Normal(a, 1.0).expand([2]).to_event(1))
        numpyro.sample("c", dist.Normal(0.0, jnp.exp(a)))
        numpyro.sample("d", dist.Normal(2.0, 0.5))

    assert [site.standard for site in read_prior(prior).sites] == [True, False, False, True]


@pytest.mark.slow
def test_scale_of_a_dependent_site_is_that_of_its_marginal():
    """b | a ~ N(5a, .1): over the prior b has sd 5; the code of b must have scale of order 1, not 50.

    Robust centre and scale are estimates: a factor 2 is allowed.
    """

    def prior():
        a = numpyro.sample("a", dist.Normal(0, 1))
        numpyro.sample("b", dist.Normal(5 * a, 0.1))

    a, noise = jax.random.normal(jax.random.key(4), (2, 4000))
    z = np.asarray(read_prior(prior).to_code({"a": a, "b": 5 * a + 0.1 * noise}))[:, 1]
    low, median, high = np.quantile(z, [0.25, 0.5, 0.75])
    assert abs(median) < 0.5
    assert 0.5 < (high - low) / 1.349 < 2


def test_event_dims_are_named_by_the_site():
    """infer={"event_dims": [...]} names the dims; the table of factors shows them."""

    def prior():
        infer = {"event_dims": ["part", "coordinate"]}
        numpyro.sample("position", dist.Normal(0, 1).expand([2, 3]).to_event(2), infer=infer)

    latents = read_prior(prior)
    assert latents.sites[0].dims == ("part", "coordinate")
    assert latents.axes[:2] == ("position[0,0]", "position[0,1]")
    assert "part, coordinate" in latents.describe()


@pytest.mark.slow
def test_reading_a_prior_has_no_effect_outside():
    """Two readings agree, and a handler around the call sees no site: it is not part of a surrounding program."""
    prior = lambda: numpyro.sample("f", dist.Beta(2.0, 3.0))  # noqa: E731
    first = read_prior(prior).sites[0]
    second = []
    around = lambda: second.append(read_prior(prior).sites[0])  # noqa: E731
    trace = handlers.trace(handlers.seed(around, jax.random.key(9))).get_trace()
    assert (first.shift, first.scale) == (second[0].shift, second[0].scale)
    assert not trace


def one(fn, **options):
    return lambda: numpyro.sample("f", fn, **options)


class OnTheUnknown(dist.Normal):
    """A distribution on a space that NumPyro has no bijection to."""

    support = type("Unknown", (constraints.Constraint,), {})()


ERRORS = {
    "no site": (lambda: None, ValueError, "no latent site.*numpyro.sample"),
    "unbounded discrete": (one(dist.Poisson(3.0)), ValueError, "'f' .Poisson. is discrete without a finite list"),
    "observed": (one(dist.Normal(0, 1), obs=1.0), ValueError, "'f' is observed"),
    "batch shape": (one(dist.Normal(0, 1).expand([3])), ValueError, r"'f' has batch shape \(3,\).*to_event\(1\)"),
    "no bijection": (one(OnTheUnknown(0, 1)), ValueError, "'f' .OnTheUnknown.* no bijection"),
    "named x": (lambda: numpyro.sample("x", dist.Normal(0, 1)), ValueError, "'x' takes the name of the observation"),
    "event dims": (
        one(dist.Normal(0, 1).expand([3]).to_event(1), infer={"event_dims": ["a", "b"]}),
        ValueError,
        "'f' has 1 event dims .* names 2",
    ),
    "dim of our own": (
        one(dist.Normal(0, 1).expand([3]).to_event(1), infer={"event_dims": ["draw"]}),
        ValueError,
        r"'f' has the event_dims \['draw'\]: they must differ",
    ),
    "named as its dim": (
        one(dist.Normal(0, 1).expand([3]).to_event(1), infer={"event_dims": ["f"]}),
        ValueError,
        "'f' takes the name of a dim",
    ),
    "scoped": (
        handlers.scope(one(dist.Normal(0, 1)), prefix="a"),
        ValueError,
        r"a prior site is called 'a/f', but .* without '/'",
    ),
    "dim of no name": (
        one(dist.Normal(0, 1).expand([3]).to_event(1), infer={"event_dims": [""]}),
        ValueError,
        "a dim of prior site 'f' is called ''",
    ),
    "twice": (
        lambda: [numpyro.sample("z", dist.Normal(0, 1)) for _ in range(2)],
        ValueError,
        "the prior cannot be run: AssertionError: all sites must have unique names but got `z` duplicated",
    ),
    "nothing in it": (
        one(dist.Normal(0, 1).expand([0]).to_event(1)),
        ValueError,
        r"site 'f' has shape \(0,\), which holds no value",
    ),
    "string": ("normal", TypeError, "must be a function .* got str"),
}


@pytest.mark.parametrize("prior", [dist.Normal(0, 1), [dist.Normal(0, 1)]], ids=["Normal", "list"])
def test_a_distribution_is_not_a_prior(prior):
    """The likeliest slip: a distribution, or a list of them, where a function that samples from it is due."""
    with pytest.raises(TypeError, match=r"must be a function .* got (Normal|list)"):
        read_prior(prior)


@pytest.mark.parametrize("name", ERRORS)
def test_priors_that_cannot_be_read_are_refused(name):
    """Every message names the site, what is wrong, and what to write."""
    prior, error, message = ERRORS[name]
    with pytest.raises(error, match=f"(?s){message}"):
        read_prior(prior)


def test_a_dim_has_one_size():
    """All sites come back in one labelled Dataset."""

    def prior():
        for name, size in (("a", 2), ("b", 3)):
            numpyro.sample(name, dist.Normal(0, 1).expand([size]).to_event(1), infer={"event_dims": ["factor"]})

    with pytest.raises(ValueError, match="'factor' twice, with sizes 2 and 3, the second time for prior site 'b'"):
        read_prior(prior)

"""A program's posterior as a DataTree: groups, dims, values irrespective of the chunk size, files."""

import json

import arviz as az
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
from numpyro import distributions as dist
import pytest
import xarray as xr

from sami_ppl.decoders.decoder import ScoreDecoder
from sami_ppl.diffusion.sampler import DPMSolver
from sami_ppl.diffusion.schedule import VariancePreserving
from sami_ppl.posteriors import posterior, save_tree
from sami_ppl.program.origin import Origin
from sami_ppl.program.program import Program

pytestmark = pytest.mark.slow  # all stand on a fitted program


N, DRAWS, PREDICTIVE, LEVELS = 7, 20, 5, 3
NAMES = [f"image {i}" for i in range(N)]
X = np.random.default_rng(0).normal(size=(N, 4)).astype(np.float32)


def several():
    """Named dims, a scalar, and three constrained supports, one of which has fewer coordinates than elements."""
    numpyro.sample("place", dist.Uniform(-1.0, 2.0).expand([2]).to_event(1), infer={"event_dims": ["direction"]})
    numpyro.sample("rate", dist.Gamma(2.0, 1.0))
    numpyro.sample("share", dist.Dirichlet(jnp.ones(3)), infer={"event_dims": ["part"]})
    numpyro.sample("z", dist.Normal(0.0, 1.0).expand([2]).to_event(1))


SUPPORTS = {
    "place": lambda v: (v > -1).all() and (v < 2).all(),
    "rate": lambda v: (v > 0).all(),
    "share": lambda v: (v > 0).all() and np.allclose(v.sum(-1), 1, atol=1e-5),
    "z": lambda v: np.isfinite(v).all(),
}
DIMS = {"place": ("direction",), "rate": (), "share": ("part",), "z": ("z_axis",), "x": ("pixel",)}


def data():
    return xr.Dataset(
        {
            "x": (("obs", "pixel"), X),
            "height": ("obs", np.arange(N) / 2),
            "label": ("obs", np.arange(N) % 3),
            "camera": ("pixel", np.zeros(4)),
        },
        coords={"obs": NAMES},
    )


@pytest.fixture(scope="module")
def cache():
    return {}


@pytest.fixture
def program(cache, tiny_program, tmp_path_factory):
    if "program" not in cache:
        file = tmp_path_factory.mktemp("program") / "mine.py"
        origin = Origin(str(file), '{"latents": 7}', "", "{}")
        cache["program"] = tiny_program(several, event_dims=("pixel",), origin=origin)
    return cache["program"]


@pytest.fixture
def tree(cache, program):
    """All groups, three chunks, the last of one observation."""
    if "tree" not in cache:
        cache["tree"] = posterior(
            program, data(), key=jax.random.key(0), draws=DRAWS, predictive=PREDICTIVE, levels=LEVELS, chunk=3,
            attrs={"beta": 1.0, "stopped early": False, "note": None, "stages": {"steps": [1, 2]}},
        )  # fmt: skip
    return cache["tree"]


def test_groups_dims_and_coords(tree):
    sites = ("place", "rate", "share", "z")
    assert {name: set(group.data_vars) for name, group in tree.children.items()} == {
        "posterior": set(sites), "prior": set(sites), "log_prior": set(sites), "unconstrained_posterior": {"code"},
        "posterior_predictive": {"x"}, "prior_predictive": {"x"}, "log_likelihood": {"x"}, "observed_data": {"x"},
        "constant_data": {"height", "label"},
        "sample_stats": {"kl", "kl_axis", "lp", "log_weight", "pareto_k", "importance_ess"},
    }  # fmt: skip
    for group in ("posterior", "prior"):
        for name in sites:
            assert tree[group][name].dims == ("chain", "draw", "obs", *DIMS[name])
    assert dict(tree["posterior"].sizes) == {
        "chain": 1, "draw": DRAWS, "obs": N, "direction": 2, "part": 3, "z_axis": 2
    }  # fmt: skip
    assert tree["posterior_predictive"]["x"].dims == ("chain", "draw", "obs", "pixel")
    assert tree["posterior_predictive"].sizes["draw"] == PREDICTIVE
    assert tree["log_likelihood"]["x"].dims == ("chain", "draw", "obs")
    assert tree["observed_data"]["x"].dims == ("obs", "pixel")
    for group in tree.children.values():
        assert group.coords["obs"].values.tolist() == NAMES
        values = {k: v.values for k, v in group.data_vars.items() if k != "pareto_k"}
        assert all(np.isfinite(value).all() for value in values.values())
    assert tree["sample_stats"]["pareto_k"].isnull().all(), "20 draws have no tail"
    assert tree["sample_stats"]["kl_axis"].dims == ("chain", "obs", "axis")
    axes = ["place[0]", "place[1]", "rate", "share[0]", "share[1]", "z[0]", "z[1]"]
    assert tree["unconstrained_posterior"]["axis"].values.tolist() == axes
    assert tree["posterior"]["z"].sel(obs="image 6").shape == (1, DRAWS, 2)


def test_constant_and_observed_data_are_the_data(tree):
    np.testing.assert_array_equal(tree["observed_data"]["x"], X)
    np.testing.assert_array_equal(tree["constant_data"]["height"], np.arange(N) / 2)
    np.testing.assert_array_equal(tree["constant_data"]["label"], np.arange(N) % 3)
    assert tree["constant_data"]["label"].dtype.kind == "i"


@pytest.mark.parametrize("group", ["posterior", "prior"])
def test_draws_lie_in_their_supports_and_differ(tree, group):
    for name, inside in SUPPORTS.items():
        values = tree[group][name].values
        assert inside(values), name
        flat = values.reshape(DRAWS * N, -1)
        assert len(np.unique(flat, axis=0)) == DRAWS * N, name
    assert not np.array_equal(tree["posterior"]["z"], tree["prior"]["z"])


def test_attributes(tree):
    assert json.loads(tree.attrs["attrs"])["stages"] == {"steps": [1, 2]}
    assert (tree.attrs["program"], json.loads(tree.attrs["config"])) == ("mine.py", {"latents": 7})
    assert {"sami_ppl", "jax"} <= json.loads(tree.attrs["versions"]).keys()
    assert tree["posterior"]["rate"].attrs["long_name"] == "q(rate | x), amortised"


def codes(program, tree, group="posterior"):
    """Draws as codes (draw, obs, D)."""
    return np.asarray(program.latents.to_code({name: jnp.asarray(v[0]) for name, v in tree[group].items()}))


def standardised_means(program, found, loc):
    """Means over draws less `loc`, in standard errors; N(0, 1) each where `loc` is the posterior's."""
    _, scale = program.encode(X)
    return (codes(program, found).mean(0) - loc) / scale * np.sqrt(found["posterior"].sizes["draw"])


SLOW = pytest.mark.slow


@pytest.mark.parametrize("chunk", [pytest.param(1, marks=SLOW), 3, pytest.param(64, marks=SLOW)])
def test_every_observation_has_its_own_posterior_whatever_the_chunk(program, chunk):
    """63 or fewer normal figures below 4.5 each: false alarms under 4e-4. Those of another observation exceed it."""
    found = posterior(program, X, key=jax.random.key(1), draws=1600, predictive=0, levels=0, chunk=chunk)
    loc, scale = program.encode(X)
    assert np.abs(standardised_means(program, found, loc)).max() < 4.5
    for shift in (1, 3):
        wrong = np.abs(standardised_means(program, found, np.roll(loc, shift, axis=0)))
        assert (wrong.max(1) > 4.5).all(), "a mixed-up observation would not be seen"
    # Relative error of a standard deviation from 1,600 draws: 1 / sqrt(3200) = .018.
    np.testing.assert_allclose(codes(program, found).std(0) / scale, 1, atol=0.09)
    noise = (codes(program, found) - loc) / scale
    correlation = np.corrcoef(noise.transpose(1, 2, 0).reshape(-1, 1600)) - np.eye(loc.size)
    assert np.abs(correlation).max() < 5 / 40, "chunks or sites share noise"


@pytest.mark.slow
def test_prior_draws_do_not_depend_on_the_observations(program):
    """Uniform, Gamma and Dirichlet means at 7 × 400 draws, five standard errors."""
    found = posterior(program, X, key=jax.random.key(2), draws=400, predictive=0, levels=0)["prior"]
    for name, mean, sd in (("place", 0.5, 3 / 12**0.5), ("rate", 2.0, 2**0.5), ("share", 1 / 3, 0.2357)):
        assert found[name].mean(["chain", "draw", "obs"]).values == pytest.approx(mean, abs=5 * sd / 2800**0.5)


@pytest.mark.slow
def test_same_key_same_tree(program):
    draw = lambda seed: posterior(program, X, key=jax.random.key(seed), draws=2, predictive=0, levels=0)  # noqa: E731
    once = draw(0)
    xr.testing.assert_equal(once, draw(0))
    assert not np.array_equal(once["posterior"]["z"], draw(1)["posterior"]["z"])


def decoder(program, tree, draw):
    z = program.latents.to_code({name: jnp.asarray(v.values[0, draw]) for name, v in tree["posterior"].items()})
    return ScoreDecoder(program.denoiser, program.encoder, z, sampler=program.sampler, levels=LEVELS)


def test_log_likelihood_is_the_bound_of_the_fitted_program_with_fixed_noise(program, fill):
    """By hand for every draw, with one fixed set of noise; the parameters are those of the program given."""
    changed = program.replace(denoiser=fill(program.denoiser, 0.5))
    found = posterior(changed, X, key=jax.random.key(3), draws=4, predictive=0, levels=LEVELS, chunk=N)
    got = found["log_likelihood"]["x"].values[0]
    log_prob = jax.jit(lambda decoder: decoder.log_prob(jnp.asarray(X)))
    want = np.stack([log_prob(decoder(changed, found, i)) for i in range(4)])
    other = np.stack([log_prob(decoder(program, found, i)) for i in range(4)])
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-2)
    assert np.abs(got - other).max() > 1
    assert np.ptp(got, axis=0).max() > 1e-3, "the bound does not depend on z"


def test_log_likelihood_is_labelled_a_bound(tree):
    attrs = tree["log_likelihood"]["x"].attrs
    assert "bound" in attrs["long_name"]
    assert "not a likelihood" in attrs["note"]
    assert (attrs["units"], attrs["noise_levels"]) == ("nats", LEVELS)


@pytest.mark.slow
def test_posterior_predictive_follows_its_own_draw_and_is_not_the_data(oracle):
    """On the oracle x | z ~ N(Wz, .3 I): residuals have that variance given the own z, more given another's."""

    def prior():
        numpyro.sample("z", dist.Normal(0.0, 1.0).expand([2]).to_event(1))

    exact = oracle(VariancePreserving(-6.0, 9.0))
    program = Program(prior, exact.denoiser, exact.encoder, sampler=DPMSolver(24))
    rng = np.random.default_rng(0)
    x = rng.multivariate_normal(np.zeros(6), exact.cov, size=60).astype(np.float32)
    found = posterior(program, x, key=jax.random.key(4), draws=12, predictive=8, levels=0, chunk=32)
    drawn, z = found["posterior_predictive"]["x"].values[0], found["posterior"]["z"].values[0, :8]
    assert drawn.shape == (8, 60, 6)
    assert np.abs(drawn - x).mean(-1).min() > 0.05
    residual = lambda z: np.mean((drawn - z @ exact.weights.T) ** 2)  # noqa: E731
    # 2880 squares of a normal: the relative standard error is .026; the solver adds 3 %.
    assert residual(z) == pytest.approx(exact.noise_variance, rel=0.15)
    assert residual(np.roll(z, 1, axis=0)) > 1.2 * exact.noise_variance
    assert residual(np.roll(z, 1, axis=1)) > 1.5 * exact.noise_variance


@pytest.mark.parametrize("suffix", ["nc", "zarr"])
def test_file_round_trip(tree, tmp_path, suffix):
    file = tmp_path / f"posterior.{suffix}"
    save_tree(tree, file if suffix == "nc" else str(file))
    read = (
        xr.open_datatree(file, engine="h5netcdf")
        if suffix == "nc"
        else xr.open_datatree(str(file), engine="zarr", consolidated=False)
    )
    with read:
        xr.testing.assert_equal(read.load(), tree)
        for path in ("/", "posterior", "log_likelihood"):
            assert read[path].attrs == tree[path].attrs
        assert read["log_likelihood"]["x"].attrs == tree["log_likelihood"]["x"].attrs


def test_arviz_summary(tree):
    table = az.summary(tree, var_names=["z"], kind="stats", round_to="none")
    assert len(table) == 2 * N
    assert table["mean"].to_numpy(float) == pytest.approx(tree["posterior"]["z"].values[0].mean(0).ravel(), abs=1e-5)
    assert len(az.summary(tree, kind="all")) == N * 8


ERRORS = [
    (X[:, :3], {}, r"x must have shape \(obs, 4\), got \(7, 3\)"),
    (X[0], {}, r"x must have shape \(obs, 4\), got \(4,\); add the leading dim: x\[None\]"),
    (X[:0], {}, r"no observations: give an array of shape \(obs, \*event\)"),
    (xr.Dataset({"x": (("obs", "row"), X[:, :2])}), {}, r"x must have shape \(obs, 4\), got \(7, 2\)"),
    (X, {"draws": 0}, "draws and chunk must be at least 1.*draws=0"),
    (X, {"chunk": 0}, "draws and chunk must be at least 1.*chunk=0"),
    (X, {"predictive": -1}, "predictive and levels at least 0.*predictive=-1"),
    (X, {"levels": -1}, "predictive and levels at least 0.*levels=-1"),
    (xr.Dataset({"images": (("obs", "pixel"), X)}), {}, "variable 'x'"),
]


@pytest.mark.parametrize(("given", "settings", "message"), ERRORS)
def test_errors(program, given, settings, message):
    with pytest.raises(ValueError, match=message):
        posterior(program, given, key=jax.random.key(0), **settings)


def test_arrays_and_groups_left_out(program):
    found = program.posterior(X[:2], key=jax.random.key(0), draws=2, levels=0, predictive=0)
    left = {"posterior", "prior", "log_prior", "unconstrained_posterior", "sample_stats", "observed_data"}
    assert set(found.children) == left
    assert set(found["sample_stats"].data_vars) == {"kl", "kl_axis"}
    assert found["observed_data"]["x"].dims == ("obs", "pixel")
    assert found["posterior"].coords["obs"].values.tolist() == [0, 1]


@pytest.mark.slow
def test_sites_may_have_dims_of_the_names_of_ours(tiny_program):
    """A site's dim `axis` is not the axis of the code."""

    def prior():
        numpyro.sample("place", dist.Normal(0, 1).expand([2]).to_event(1), infer={"event_dims": ["axis"]})
        numpyro.sample("size", dist.Normal(0, 1))

    tree = posterior(tiny_program(prior), X[:3], key=jax.random.key(0), draws=2, predictive=0, levels=0)
    assert tree["posterior"]["place"].sizes == {"chain": 1, "draw": 2, "obs": 3, "axis": 2}
    assert list(tree["sample_stats"]["axis"].values) == ["place[0]", "place[1]", "size"]


def test_labels_of_observations_are_kept(tiny_program):
    data = xr.Dataset({"x": (("obs", "feature"), X[:3])}, coords={"obs": [10, 20, 30]})
    tree = posterior(tiny_program(), data, key=jax.random.key(0), draws=2, predictive=0, levels=0)
    assert tree["posterior"]["obs"].values.tolist() == [10, 20, 30]


@pytest.mark.slow
def test_draws_of_single_observations_are_not_those_of_global_sites(tiny_program):
    """Keys of chunks are folded from one key, and jax.random.split(key, n)[i] is fold_in(key, i)."""

    def prior(obs):
        numpyro.sample("one", dist.Normal(0, 1))
        numpyro.sample("two", dist.Normal(0, 1))
        with obs:
            numpyro.sample("z", dist.Normal(0, 1))

    settings: dict = {"draws": 12, "predictive": 0, "levels": 0, "chunk": 1}
    drawn = posterior(tiny_program(prior), X[:12], key=jax.random.key(0), **settings)["prior"]
    shared = np.concatenate([drawn["one"].values.reshape(-1), drawn["two"].values.reshape(-1)])
    assert not np.isclose(shared[:, None], drawn["z"].values.reshape(-1), rtol=1e-6).any()


def test_values_that_are_no_observations_are_refused(tiny_program):
    """Whole numbers would be taken for intensities, and NaN would come back as a code."""
    program, bad = tiny_program(), np.array(X[:3])
    bad[1, 2] = np.nan
    with pytest.raises(ValueError, match="NaN at observation 1"):
        program.encode(bad)
    with pytest.raises(ValueError, match=r"integers from 0 to 255.*astype\('uint8'\)"):
        program.encode(np.array([[0, 3, 255, 7]]))


def test_pixels_are_scaled_and_masks_asked_about(tiny_program):
    """8-bit values are pixels; of zeros and ones alone nobody knows whether they are black pixels or a mask."""
    program, pixels = tiny_program(), np.array([[0, 3, 255, 7]], np.uint8)
    np.testing.assert_allclose(program.observed(pixels), pixels / 127.5 - 1, atol=1e-6)
    with pytest.raises(ValueError, match=r"x \* 2.0 - 1 for a mask, x / 127.5 - 1 for images"):
        program.encode(np.array([[0, 1, 1, 0]], np.uint8))
    mask = np.array([[0, 1, 1, 0]])
    np.testing.assert_allclose(program.encode(mask)[0], program.encode(mask.astype(np.float32))[0])

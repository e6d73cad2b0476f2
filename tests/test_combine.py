"""Several fits on the dim chain: planted orders and signs are found, r-hat tells fits that agree from others."""

import json

import arviz as az
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
from numpyro import distributions as dist
import pytest
import xarray as xr

import sami_ppl as sp
from sami_ppl.encoders.affine import AffineEncoder
from sami_ppl.posteriors import combine, posterior, save_tree
from sami_ppl.posteriors.symmetry import symmetries

# z' = P z: neither P nor its signs are their own inverse, so that neither can be mixed up with it.
TURN = np.array([[0.0, -1.0, 0.0], [0.0, 0.0, 1.0], [1.0, 0.0, 0.0]], np.float32)


def normal():
    numpyro.sample("z", dist.Normal(0.0, 1.0).expand([3]).to_event(1), infer={"event_dims": ["factor"]})


@pytest.fixture(scope="module")
def fits():
    """Trees of one exact program, of the same one with its axes planted elsewhere, and of one that disagrees."""
    columns = np.linalg.qr(np.random.default_rng(0).normal(size=(6, 3)))[0] * [2.0, 1.5, 1.0]
    truth = sp.LinearGaussian(jnp.asarray(columns, jnp.float32), 0.5, sp.VariancePreserving(-8.0, 8.0))
    program = sp.Program(normal, truth.denoiser, truth.encoder)
    x, _ = truth.sample(jax.random.key(0), 12)
    angle = 0.7
    turn = np.array([[np.cos(angle), -np.sin(angle), 0], [np.sin(angle), np.cos(angle), 0], [0, 0, 1]], np.float32)

    def draw(matrix, seed):
        own = program.replace(encoder=AffineEncoder(program.encoder, jnp.asarray(matrix)))
        return posterior(own, np.asarray(x), key=jax.random.key(seed), draws=100, predictive=0, levels=0)

    return {"one": draw(np.eye(3, dtype=np.float32), 1), "planted": draw(TURN, 2), "other": draw(turn, 3)}


def largest_rhat(tree):
    return float(az.rhat(tree)["z"].max())


@pytest.mark.slow
def test_a_planted_order_and_signs_are_undone(fits):
    """36 r-hats of 2 × 100 draws: of 8,000 pairs of normal chains .013 % pass 1.08, so that a false alarm has .5 %."""
    both = combine([fits["one"], fits["planted"]])
    assert dict(both["posterior"].sizes) == {"chain": 2, "draw": 100, "obs": 12, "factor": 3}
    told = json.loads(both.attrs["matched"])
    assert told[0] == {}
    assert told[1]["order"] == {"factor": [2, 0, 1]}
    assert told[1]["signs"] == {"z": [1.0, -1.0, 1.0]}
    assert min(told[1]["correlation"]["z"]) > 0.98
    assert largest_rhat(both) < 1.08
    assert both["posterior"]["factor"].values.tolist() == [0, 1, 2]
    found, want = (both["posterior"]["z"].sel(chain=c).mean("draw") for c in (1, 0))
    np.testing.assert_allclose(found, want, atol=0.35)


@pytest.mark.slow
def test_controls_have_a_large_rhat(fits):
    assert largest_rhat(combine([fits["one"], fits["planted"]], match=False)) > 1.5
    other = combine([fits["one"], fits["other"]])
    assert largest_rhat(other) > 1.3
    assert min(json.loads(other.attrs["matched"])[1]["correlation"]["z"]) < 0.95


@pytest.mark.slow
def test_groups_are_those_of_both_but_for_coordinates_of_their_own(fits):
    groups = {"posterior", "prior", "log_prior", "sample_stats", "observed_data"}
    both = combine([fits["one"], fits["planted"]])
    assert set(both.children) == groups
    assert both["sample_stats"]["kl_axis"].dims == ("chain", "obs", "axis")


@pytest.mark.parametrize("suffix", ["nc", "zarr"])
def test_a_combined_tree_is_written_and_read(fits, tmp_path, suffix):
    both, file = combine([fits["one"], fits["planted"]]), tmp_path / f"both.{suffix}"
    save_tree(both, file)
    options = {"engine": "h5netcdf"} if suffix == "nc" else {"engine": "zarr", "consolidated": False}
    with xr.open_datatree(file, **options) as read:
        xr.testing.assert_equal(read.load(), both)
        assert json.loads(read.attrs["matched"])[1]["order"] == {"factor": [2, 0, 1]}


def test_all_sites_along_a_dim_are_reordered_together_by_their_own_signs():
    """A scale of each factor, global and positive, follows its factor; a site of two dims along the open one."""
    rng = np.random.default_rng(0)
    order, signs = np.array([2, 0, 1]), np.array([1.0, -1.0, -1.0])
    z = rng.normal(size=(1, 50, 8, 1)) * 0.1 + rng.normal(size=(8, 3))
    wide = rng.normal(size=(1, 50, 8, 2, 1)) * 0.1 + rng.normal(size=(8, 2, 3))
    scale = np.exp(rng.normal(size=(1, 50, 3)) * 0.1 + [0.0, 1.0, 2.0])
    dims = {"z": ("obs", "factor"), "wide": ("obs", "part", "factor"), "scale": ("factor",)}

    elements = [*(f"z[{i}]" for i in range(3)), *(f"wide[{i},{j}]" for i in range(2) for j in range(3))]
    kl = {"z": rng.normal(size=(1, 8, 3)), "wide": rng.normal(size=(1, 8, 2, 3))}

    def tree(values, kl):
        group = {name: (("chain", "draw", *dims[name]), value) for name, value in values.items()}
        return xr.DataTree.from_dict({
            "/": xr.Dataset(attrs={"symmetries": json.dumps({"permute": ["factor"], "flip": ["z"]})}),
            "posterior": xr.Dataset(group), "prior": xr.Dataset(group),
            "observed_data": xr.Dataset({"x": ("obs", np.arange(8.0))}),
            "sample_stats": xr.Dataset(
                {"kl_axis": (("chain", "obs", "axis"), np.concatenate([v.reshape(1, 8, -1) for v in kl.values()], -1))},
                coords={"axis": elements},
            ),
        })  # fmt: skip

    first = tree({"z": z, "wide": wide, "scale": scale}, kl)
    # Element i of the first is element order[i] of the second.
    there = np.argsort(order)
    moved = {"z": (z * signs)[..., there], "wide": wide[..., there], "scale": scale[..., there]}
    second = tree(moved, {name: value[..., there] for name, value in kl.items()})
    both = combine([first, second])
    for group in ("posterior", "prior"):
        for name, variable in both[group].data_vars.items():
            np.testing.assert_allclose(variable[1], variable[0], err_msg=f"{group} {name}")
    stats = both["sample_stats"]["kl_axis"]
    np.testing.assert_array_equal(stats[1], stats[0])
    assert stats["axis"].values.tolist() == elements


# --- what a prior leaves open -----------------------------------------------------------------------------------------


def one_by_one():
    numpyro.sample("z", dist.Normal(0.0, jnp.array([1.0, 2.0])).to_event(1), infer={"event_dims": ["factor"]})
    numpyro.sample("tone", dist.Laplace(0.0, 1.0))


def bounded():
    numpyro.sample("box", dist.Uniform(-1.0, 1.0).expand([2]).to_event(1))
    numpyro.sample("rate", dist.Gamma(2.0, 1.0).expand([3]).to_event(1))
    numpyro.sample("place", dist.Uniform(-1.0, 2.0))


def circulant():
    """The same whichever way it is shifted round, yet not in every order."""
    near = jnp.eye(4) + 0.3 * (jnp.roll(jnp.eye(4), 1, 0) + jnp.roll(jnp.eye(4), -1, 0))
    numpyro.sample("z", dist.MultivariateNormal(jnp.zeros(4), near))


def two_alike():
    """The same with the first two in either order, yet not shifted round."""
    numpyro.sample("z", dist.Normal(0.0, jnp.array([1.0, 1.0, 2.0])).to_event(1))


def scaled(obs):
    dims = {"event_dims": ["factor"]}
    scale = numpyro.sample("scale", dist.HalfCauchy(0.1).expand([3]).to_event(1), infer=dims)
    with obs:
        numpyro.sample("z", dist.Normal(0.0, scale).to_event(1), infer=dims)


def centred(obs):
    centre = numpyro.sample("centre", dist.Normal(0.0, 1.0))
    with obs:
        numpyro.sample("z", dist.Normal(centre, 1.0).expand([2]).to_event(1))


OPEN = {
    normal: (["factor"], ["z"]),
    one_by_one: ([], ["z", "tone"]),
    bounded: (["box_axis", "rate_axis"], ["box"]),
    circulant: ([], []),
    two_alike: ([], ["z"]),
    scaled: (["factor"], ["z"]),
    centred: (["z_axis"], []),
}


@pytest.mark.slow
@pytest.mark.parametrize("prior", OPEN, ids=lambda prior: prior.__name__)
def test_what_a_prior_leaves_open(tiny_program, prior):
    permute, flip = OPEN[prior]
    assert symmetries(tiny_program(prior)) == {"permute": permute, "flip": flip}


# --- mistakes ---------------------------------------------------------------------------------------------------------

WRONG = {
    "one tree": (lambda a, b: [a], r"at least two trees, got 1: write combine\(\[tree, other\]\)"),
    "no posterior": (
        lambda a, b: [a, xr.DataTree.from_dict({"prior": a["prior"].to_dataset()})],
        r"tree 1 has no group 'posterior', it has prior: write program.posterior\(data, key=...\)",
    ),
    "no data": (
        lambda a, b: [xr.DataTree.from_dict({"posterior": a["posterior"].to_dataset()}), b],
        r"tree 0 has no group 'observed_data', it has posterior: write program.posterior",
    ),
    "no attribute": (
        lambda a, b: [a, xr.DataTree.from_dict({k: v.to_dataset() for k, v in b.children.items()})],
        r"tree 1 has no attribute 'symmetries', .*: write it anew, program.posterior\(data",
    ),
    "draws": (lambda a, b: [a, b.isel(draw=slice(50))], r"tree 1 has the sizes .*'draw': 50.*draws=\.\.\., key"),
    "other observations": (
        lambda a, b: [a, b.isel(obs=slice(None, None, -1))],
        r"tree 1 is of other observations than the first: .*\[p.posterior\(data, key=...\) for p in programs\]",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_mistakes(fits, name):
    make, message = WRONG[name]
    with pytest.raises(ValueError, match=message):
        combine(make(fits["one"], fits["planted"]))

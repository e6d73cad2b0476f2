"""The front door: a prior of named factors, a program from prior and data, plans; what is guessed, said and refused."""

from dataclasses import fields, replace
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
from numpyro import distributions as dist
import pytest
import xarray as xr

import sami_ppl as sp
from sami_ppl.fitting.sizes import Extent, denoiser_stage, encoder_stage
from sami_ppl.fitting.start import told
from sami_ppl.nn import HalfUNet, ResidualMLP, UNet
from sami_ppl.program.build import unet_size
from sami_ppl.saving.files import find, load_file

KEY = jax.random.key(0)
SMALL = {"width": 8, "depth": 1}
STEPS = sp.Stage(steps=3, batch=8, validate_every=3)
RNG = np.random.default_rng(0)
VECTORS = RNG.standard_normal((40, 5)).astype(np.float32)
PIXELS = RNG.integers(0, 256, (40, 8, 8)).astype(np.uint8)


def three_factors():
    return sp.factors(
        angle=dist.VonMises(0, 1e-3),
        size=dist.LogNormal(0, 1),
        style=dist.Normal(0, 1).expand([2]),
        coords={"style_axis": ["slant", "weight"]},
    )


@pytest.mark.slow
def test_factors_are_a_prior():
    """The same sites, in the order given, as those of the function that one would write by hand."""

    def by_hand():
        numpyro.sample("angle", dist.VonMises(0, 1e-3))
        numpyro.sample("size", dist.LogNormal(0, 1))
        numpyro.sample("style", dist.Normal(0, 1).expand([2]).to_event(1))

    made, hand = sp.read_prior(three_factors()), sp.read_prior(by_hand)
    for one, other in zip(made.sites, hand.sites, strict=True):
        for field in ("name", "event_shape", "dims", "start", "law"):
            assert getattr(one, field) == getattr(other, field)
        np.testing.assert_array_equal(one.shift, other.shift)
        np.testing.assert_array_equal(one.scale, other.scale)
    assert made.axes == ("angle[0]", "angle[1]", "size", "style[slant]", "style[weight]")
    assert hand.axes[-2:] == ("style[0]", "style[1]")


@pytest.mark.slow
def test_factors_are_swapped_by_name():
    """Dims and labels stay where the shape does; the others' laws are the same objects."""
    prior = three_factors()
    heavy = prior.replace(style=dist.Laplace(0, 1).expand([2]))
    assert sp.read_prior(heavy).axes == sp.read_prior(prior).axes
    assert repr(heavy) == "factors(angle=VonMises, size=LogNormal, style=Laplace[2])"
    assert heavy.laws["size"] is prior.laws["size"]
    longer = prior.replace(style=dist.Normal(0, 1).expand([3]))
    assert sp.read_prior(longer).axes[3:] == ("style[0]", "style[1]", "style[2]")
    assert list(longer.laws) == list(prior.laws)
    with pytest.raises(ValueError, match="no factor sise; its factors are angle, size, style"):
        prior.replace(sise=dist.Normal(0, 1))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({}, ValueError, "at least one: write sp.factors"),
        ({"z": 3.0}, TypeError, "'z' must be a NumPyro distribution, got float"),
        ({"z": dist.Normal(0, 1), "coords": {"w": [1]}}, ValueError, "coords name the dim 'w'"),
        ({"z": dist.Normal(0, 1).expand([2]), "coords": {"z_axis": [1]}}, ValueError, "1 labels for the dim 'z_axis'"),
        ({"z": dist.Normal(0, 1).expand([2]), "dims": {"z": ["a", "b"]}}, ValueError, "one name for each dim"),
        ({"z": dist.Normal(0, 1), "dims": {"w": "a"}}, ValueError, "dims name w"),
    ],
)
def test_factors_that_do_not_fit_are_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        sp.factors(**arguments)


@pytest.mark.slow
def test_labels_of_one_dim_must_agree():
    """In a prior that is written by hand, where two sites share a dim."""

    def prior(second=("a", "b")):
        for name, labels in (("u", ("a", "b")), ("v", second)):
            infer = {"event_dims": ["factor"], "coords": {"factor": labels}}
            numpyro.sample(name, dist.Normal(0, 1).expand([2]).to_event(1), infer=infer)

    assert sp.read_prior(prior).axes == ("u[a]", "u[b]", "v[a]", "v[b]")
    with pytest.raises(ValueError, match="label the dim 'factor' otherwise"):
        sp.read_prior(lambda: prior(("a", "c")))
    with pytest.raises(ValueError, match="give 3 labels"):
        sp.read_prior(lambda: prior(("a", "b", "c")))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("shape", "network", "trunk"),
    [
        ((5,), ResidualMLP, ResidualMLP),
        ((1, 16, 16), ResidualMLP, ResidualMLP),
        ((1, 28, 28), UNet, ResidualMLP),
        ((3, 64, 64), UNet, HalfUNet),
        ((1, 25, 25), UNet, ResidualMLP),
        ((3, 24, 30), UNet, HalfUNet),
        ((40, 30), UNet, HalfUNet),
        ((1, 6, 10, 9), UNet, ResidualMLP),
    ],
)
def test_networks_follow_the_shape(shape, network, trunk):
    """And what the encoder says of one observation has the size of the code."""
    x = RNG.standard_normal((3, *shape)).astype(np.float32)
    size = SMALL if network is ResidualMLP else {"widths": (8,) * len(unet_size(shape)["widths"])}
    program = sp.autoencoder(three_factors(), x, size=size, key=KEY)
    assert isinstance(program.denoiser.network, network)
    assert isinstance(program.encoder.network, trunk)
    assert program.event_shape == (shape if len(shape) != 2 else (1, *shape))
    lam = jnp.zeros(())
    found = jax.eval_shape(program.encoder, jnp.zeros(program.event_shape), lam)
    assert found[0].shape == (program.latents.size,)
    assert jax.eval_shape(program.denoiser, jnp.zeros(program.event_shape), lam).shape == program.event_shape


@pytest.mark.parametrize("side", [8, 16, 25, 28, 50, 64, 96, 178, 250])
def test_the_size_of_a_unet_suits_the_image(side):
    """Its bottom map is 4 to 12 places wide, and sides that halve are not padded."""
    size = unet_size((1, side, side))
    unit = size["patch"] * 2 ** (len(size["widths"]) - 1)
    assert 4 <= -(-side // unit) <= 12
    assert (side % unit == 0) == (side % 4 == 0)


def test_signals_are_told_from_vectors():
    """By the name of the first dim, or by the wish for a U-Net, which makes vectors signals of one channel."""
    x = RNG.standard_normal((3, 1, 600)).astype(np.float32)
    named = xr.Dataset({"x": (("obs", "channel", "wavelength"), x)})
    for data, network, kind, dims in (
        (x[:, 0], None, ResidualMLP, ("feature",)),
        (x[:, 0], "unet", UNet, ("channel", "place")),
        (named.isel(channel=0), "unet", UNet, ("channel", "wavelength")),
        (named, None, UNet, ("channel", "wavelength")),
        (x, None, ResidualMLP, ("x_axis0", "x_axis1")),
    ):
        program = sp.autoencoder(three_factors(), data, network=network, progress=False, key=KEY)
        assert isinstance(program.denoiser.network, kind)
        assert program.event_dims == dims
        assert program.observed(data).shape == (3, *program.event_shape)


@pytest.mark.slow
def test_statistics_are_of_the_training_part(capsys):
    """The test part is left alone, and what was guessed is said."""
    x = np.concatenate([VECTORS, VECTORS + 9])
    data = xr.Dataset({"x": (("obs", "feature"), x)}, coords={"split": ("obs", ["train"] * 40 + ["test"] * 40)})
    program = sp.autoencoder(three_factors(), data, size=SMALL, key=KEY)
    assert program.denoiser.mean == pytest.approx(float(VECTORS.mean()), abs=1e-6)
    assert program.encoder.std == pytest.approx(float(VECTORS.std()), abs=1e-6)
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "data: 40 observations, feature 5"
    assert len(said) == 4
    sp.autoencoder(three_factors(), data, size=SMALL, key=KEY, progress=False)
    assert capsys.readouterr().out == ""


@pytest.mark.slow
def test_variables_that_the_prior_takes_come_from_the_data():
    def prior(u):
        numpyro.sample("z", dist.Normal(u[:, None], 1).expand([len(u), 2]).to_event(1))

    data = xr.Dataset({"x": (("obs", "feature"), VECTORS), "u": ("obs", RNG.standard_normal(40))})
    program = sp.autoencoder(prior, data, size=SMALL, key=KEY)
    assert program.latents.arguments == ("u",)
    with pytest.raises(ValueError, match="the prior takes u: give an xarray Dataset"):
        sp.autoencoder(prior, VECTORS, key=KEY)
    with pytest.raises(ValueError, match="no variable 'u'"):
        sp.autoencoder(prior, data.drop_vars("u"), key=KEY)


def test_families_are_passed_on():
    program = sp.autoencoder(
        three_factors(), VECTORS, families={"style": sp.families.Full}, min_scale=0.2, size=SMALL, key=KEY
    )
    assert isinstance(program.encoder.families[2], sp.families.Full)
    assert program.encoder.families[1].min_scale == 0.2


@pytest.mark.parametrize(
    ("data", "error", "message"),
    [
        (VECTORS[:1], ValueError, "1 observation, of which nothing"),
        (VECTORS[:0], ValueError, "0 observations"),
        (RNG.integers(0, 5000, (9, 5)), ValueError, r"integers from .*astype\('uint8'\)"),
        ([np.zeros((4, 4)), np.zeros((5, 4))], ValueError, "observations must have one shape"),
        (np.array([["a", "b"]]), TypeError, "array of numbers"),
        ("pictures/", TypeError, r"load_data\(path\)"),
        (np.arange(9.0), ValueError, r"data\[:, None\]"),
        (VECTORS * 100, ValueError, "about unit scale"),
        (np.where(VECTORS > 2, np.inf, VECTORS), ValueError, "infinite"),
        (np.where(VECTORS > 2, np.inf, VECTORS), ValueError, "infinite at observation"),
        (np.where(np.arange(40)[:, None] == 2, np.nan, VECTORS), ValueError, "all values of observation 2 are missing"),
        (np.ones((9, 5)), ValueError, "no spread"),
        (np.ones((9, 0)), ValueError, r"x is empty: its shape is \(9, 0\)"),
        (np.ones((9, 5), np.uint8), ValueError, "a mask or very dark images"),
        (VECTORS + 1j, TypeError, "array of numbers"),
        (xr.DataArray(VECTORS, dims=("obs", "feature")), TypeError, r"to_dataset\(name='x'\)"),
    ],
)
def test_data_that_cannot_be_guessed_are_refused(data, error, message):
    with pytest.raises(error, match=message):
        sp.autoencoder(three_factors(), data, key=KEY)


def test_priors_that_are_none_are_refused():
    with pytest.raises(ValueError, match="no latent site"):
        sp.autoencoder(lambda: None, VECTORS, key=KEY)
    with pytest.raises(TypeError, match="prior must be a function"):
        sp.autoencoder(dist.Normal(0, 1), VECTORS, key=KEY)


def test_networks_of_the_users_own():
    pair = ResidualMLP((5,), (5,), **SMALL, key=KEY), ResidualMLP((5,), (7,), **SMALL, key=KEY)
    program = sp.autoencoder(three_factors(), VECTORS, network=pair, key=KEY)
    assert program.denoiser.network is pair[0]
    with pytest.raises(ValueError, match="is a pair"):
        sp.autoencoder(three_factors(), VECTORS, network=pair, size=SMALL, key=KEY)
    with pytest.raises(ValueError, match="network must be"):
        sp.autoencoder(three_factors(), VECTORS, network="resnet", key=KEY)
    with pytest.raises(ValueError, match="takes width and depth"):
        sp.autoencoder(three_factors(), VECTORS, size={"widths": (8,)}, key=KEY)


@pytest.fixture(scope="module")
def pixels_fitted():
    """A program of grey 8-bit images, fitted by every default but size and steps."""
    program = sp.autoencoder(three_factors(), PIXELS, size=SMALL, key=KEY, progress=False)
    plan = sp.TwoStage(STEPS, STEPS, warm_steps=2)
    return sp.fit(program, PIXELS, plan, key=KEY, progress=False)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::sami_ppl.diagnostics.collapse.CollapseWarning")
def test_pixels_to_posterior(pixels_fitted):
    """Arrays as they come: scaled, with a channel, and factors back under the names and labels of the prior."""
    program, history = pixels_fitted
    assert [r["stage"] for r in history.records] == ["denoiser", "encoder"]
    assert history.records[-1]["axes"] == {"style": ["style[slant]", "style[weight]"]}
    tree = program.posterior(PIXELS[:3], key=KEY, draws=4, predictive=1, levels=1)
    posterior = tree["posterior"]
    assert posterior["style"].dims == ("chain", "draw", "obs", "style_axis")
    assert posterior["style_axis"].values.tolist() == ["slant", "weight"]
    assert list(posterior.data_vars) == ["angle", "size", "style"]
    np.testing.assert_allclose(tree["observed_data"]["x"].values[:, 0], PIXELS[:3] / 127.5 - 1, atol=1e-6)
    scaled = (PIXELS / 127.5 - 1).astype(np.float32)[:, None]
    for one, other in zip(program.encode(PIXELS), program.encode(scaled), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)


@pytest.mark.slow
def test_a_plan_takes_the_stages_that_one_would_take(pixels_fitted):
    """Bit for bit what three calls of the long form give, with the same keys."""
    program = sp.autoencoder(three_factors(), PIXELS, size=SMALL, key=KEY, progress=False)
    keys = jax.random.split(KEY, 3)
    part = {"held_out": PIXELS[36:], "progress": False}
    program, _ = sp.fit(program, PIXELS[:36], replace(STEPS, target="marginal"), key=keys[0], **part)
    program = sp.warm_start(program, PIXELS[:36], key=keys[1], steps=2, batch=STEPS.batch, progress=False)
    program, _ = sp.fit(program, PIXELS[:36], replace(STEPS, train=("encoder",)), key=keys[2], **part)
    for one, other in zip(jax.tree.leaves(program.params()), jax.tree.leaves(pixels_fitted[0].params()), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.slow
def test_another_prior_on_the_same_denoiser(pixels_fitted):
    """One call, of another size; the denoiser is the same object and the next stage trains the encoder only."""
    program, _ = pixels_fitted
    other = sp.with_prior(program, sp.factors(z=dist.Laplace(0, 1).expand([4])), key=KEY)
    assert other.denoiser is program.denoiser
    assert other.latents.size == 4
    assert other.encoder.network is program.encoder.network
    fitted, history = sp.fit(other, PIXELS, sp.EncoderOnly(STEPS, warm_steps=0), key=KEY, progress=False)
    for one, before in zip(jax.tree.leaves(fitted.denoiser), jax.tree.leaves(program.denoiser), strict=True):
        np.testing.assert_array_equal(one, before)
    assert [r["stage"] for r in history.records] == ["encoder"]
    assert not np.array_equal(fitted.encoder.loc.weight, other.encoder.loc.weight)


def test_options_are_visible():
    """To completion: the method has the keywords and defaults of the function, and both name every one."""
    ours, theirs = (inspect.signature(f).parameters for f in (sp.Program.posterior, sp.posterior))
    plain = [[(p.name, p.kind, p.default, str(p.annotation)) for p in found.values()][1:] for found in (ours, theirs)]
    assert plain[0] == plain[1]
    told = [sp.Program.posterior, sp.posterior, sp.fit, sp.autoencoder, sp.evidence_bound, sp.encode, sp.generate,
            sp.evaluate, sp.decode, sp.TwoStage, sp.EncoderOnly, sp.Joint, sp.Decoupled, sp.PriorOnly]  # fmt: skip
    for function in told:
        for name, parameter in inspect.signature(function).parameters.items():
            beside = name == "self" or parameter.kind is inspect.Parameter.VAR_KEYWORD
            assert beside or f"    {name}: " in (function.__doc__ or ""), (function, name)


@pytest.mark.slow
@pytest.mark.parametrize(("plan", "loss"), [(sp.Joint, "guided"), (sp.Decoupled, "own")])
def test_plans_of_both_networks(plan, loss):
    program = sp.autoencoder(three_factors(), VECTORS, size=SMALL, key=KEY, progress=False)
    fitted, history = sp.fit(program, VECTORS, plan(STEPS), key=KEY, progress=False)
    assert [r["stage"] for r in history.records] == ["both"]
    stage = replace(STEPS, denoiser_loss=loss)
    alone, _ = sp.fit(program, VECTORS, stage, key=jax.random.split(KEY, 1)[0], progress=False)
    for one, other in zip(jax.tree.leaves(fitted.params()), jax.tree.leaves(alone.params()), strict=True):
        np.testing.assert_array_equal(one, other)


def test_plans_that_cannot_be_run_say_so_first():
    """Before anything is compiled or written."""
    program = sp.autoencoder(three_factors(), VECTORS, size=SMALL, key=KEY, progress=False)
    fit = {"key": KEY, "progress": False}
    with pytest.raises(ValueError, match="needs a fitted denoiser"):
        sp.fit(program, VECTORS, sp.EncoderOnly(), **fit)
    with pytest.raises(ValueError, match="a batch of 99 needs"):
        sp.fit(program, VECTORS, sp.TwoStage(encoder=sp.Stage(batch=99)), **fit)
    with pytest.raises(ValueError, match="prior with parameters"):
        sp.fit(program, VECTORS, sp.PriorOnly(), **fit)
    with pytest.raises(ValueError, match="warm_steps must be at least 0"):
        sp.fit(program, VECTORS, sp.TwoStage(warm_steps=-1), **fit)
    with pytest.raises(TypeError, match="plan must be a plan"):
        sp.fit(program, VECTORS, 3000, **fit)
    with pytest.raises(TypeError, match="plan must be a plan"):
        sp.fit(program, VECTORS, sp.TwoStage, **fit)
    with pytest.raises(TypeError, match="is of a single stage"):
        sp.fit(program, VECTORS, name="mine", **fit)
    with pytest.raises(ValueError, match="Joint sets denoiser_loss='guided', its stage has denoiser_loss='own'"):
        sp.fit(program, VECTORS, sp.Joint(sp.Stage(denoiser_loss="own")), **fit)
    with pytest.raises(ValueError, match=r"TwoStage sets train=\('encoder',\), its stage has train=\('prior',\)"):
        sp.fit(program, VECTORS, sp.TwoStage(encoder=sp.Stage(train=("prior",))), **fit)
    with pytest.raises(ValueError, match="one of them is held out"):
        sp.fit(program, VECTORS[:1], **fit)
    with pytest.raises(ValueError, match="x must have shape"):
        sp.fit(program, VECTORS[:, :3], **fit)


@pytest.mark.parametrize(("count", "batch", "steps"), [(30, 30, 500), (1400, 256, 820), (50_000, 256, 3000)])
def test_sizes_follow_the_number_of_observations(count, batch, steps):
    """Small data sets are not gone through thousands of times, large ones get the most steps."""
    program = sp.autoencoder(three_factors(), VECTORS, size=SMALL, key=KEY, progress=False)
    stage = denoiser_stage(program, Extent(count, 1.0))
    assert (stage.batch, stage.steps) == (batch, steps)
    assert encoder_stage(program, Extent(count, 1.0)).batch == min(128, count)


def test_codes_that_hold_all_there_is_are_trained_by_the_bound_and_others_with_low_noise_discounted():
    """Digits have more to tell than two numbers, a plane has not; a given setting has the last word."""
    from sami_ppl.data import digits

    rng = np.random.default_rng(0)
    plane = (rng.normal(size=(400, 2)) @ rng.normal(size=(2, 6))).astype(np.float32)
    prior = sp.factors(z=dist.Normal(0, 1).expand([2]))
    found = {}
    for name, x in (("plane", plane), ("digits", digits()["x"].values[:400])):
        program = sp.autoencoder(prior, x, network="mlp", size=SMALL, key=KEY, progress=False)
        extent = Extent(len(x), told(program, x))
        assert told(program, xr.Dataset({"x": (("obs", *"abc"[: x.ndim - 1]), x)})) == extent.told
        found[name] = encoder_stage(program, extent)
        assert sp.Sized(discount=0.3).settled(encoder_stage, program, extent).discount == 0.3
    assert (found["plane"].discount, found["plane"].beta) == (0.0, 0.2)
    assert (found["digits"].discount, found["digits"].beta) == (1.0, 0.05)


def test_what_a_sized_stage_leaves_open_suits_program_and_data():
    """Its settings are those of a stage, each None; given ones count, and what follows from the steps follows them."""
    assert [f.name for f in fields(sp.Sized)] == [f.name for f in fields(sp.Stage)]
    assert all(f.default is None for f in fields(sp.Sized))
    program = sp.autoencoder(three_factors(), VECTORS, size=SMALL, key=KEY, progress=False)
    extent = Extent(1000, 1.0)
    default = encoder_stage(program, extent)
    assert sp.Sized().settled(encoder_stage, program, extent) == default
    found = sp.Sized(steps=60, beta=0.7).settled(encoder_stage, program, extent)
    assert found == replace(default, steps=60, beta=0.7, validate_every=60, warmup=12)
    assert sp.Sized(epochs=1).settled(encoder_stage, program, Extent(1280, 1.0)).count(1280) == 10
    plan = sp.TwoStage(encoder=sp.Sized(steps=60)).settled(program, extent)
    assert (plan.encoder.steps, plan.encoder.beta, plan.encoder.train) == (60, default.beta, ("encoder",))
    assert plan.denoiser == replace(denoiser_stage(program, extent), target="marginal")
    assert hash(sp.Sized(steps=60)) == hash(sp.Sized(steps=60))
    with pytest.raises(ValueError, match="steps must be positive, got -1"):
        sp.Sized(steps=-1)


@pytest.mark.parametrize("name", ["two_stage", "decoupled", "joint", "vae", "pretrained", "prior"])
def test_the_command_line_takes_the_same_stages_as_python(name):
    """What an inference file leaves open, `sp.fit` leaves open: neither has sizes of its own."""
    config = load_file(find(name, "inference")).Config()
    stages = [getattr(config, f.name) for f in fields(config) if isinstance(getattr(config, f.name), sp.Sized)]
    assert stages
    assert all(stage == sp.Sized() for stage in stages)
    if hasattr(config, "align"):
        assert config.align == sp.TwoStage().align == sp.Joint().align

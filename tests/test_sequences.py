"""Programs of sequences against one dense Gaussian: linear-Gaussian frames over Matérn processes, some missing."""

from functools import partial
from types import SimpleNamespace
from typing import Any, cast
import warnings

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
from numpyro import distributions as dist
from numpyro import handlers
from numpyro.infer import SVI
import optax
import pytest
from scipy import optimize, stats
from sequence_priors import FEATURES, GAPS, KEY, LENGTHS, NOISE, TIMES, D, T, frames, normal, smooth
import xarray as xr

import sami_ppl as sp
from sami_ppl import families
from sami_ppl.decoders.training import Objective
from sami_ppl.diagnostics import CollapseWarning, information_spectrum, noise_end_kl
from sami_ppl.encoders.frames import FramewiseEncoder
from sami_ppl.evidence import evidence_bound
from sami_ppl.fitting.objective import ScoreELBO
from sami_ppl.program.sequences import frames_of, single_frames
from sami_ppl.refinement import svi
from sami_ppl.refinement.target import log_joint, targets
from sami_ppl.runs.evidence import evidence_figures
from sami_ppl.saving.save import LoadError, load_denoiser

pytestmark = pytest.mark.slow


def rough():
    numpyro.sample("z", sp.Matern(TIMES, LENGTHS, smoothness=0.5))


def independent():
    numpyro.sample("z", sp.Matern(TIMES, 1e-3, size=D))


def learned():
    lengthscale = jnp.exp(numpyro.param("log_lengthscale", jnp.zeros(())))
    numpyro.sample("z", sp.Matern(TIMES, lengthscale, smoothness=0.5, size=D))


def hierarchical(obs):
    lengthscale = numpyro.sample("lengthscale", dist.LogNormal(0.5, 0.5).expand([D]).to_event(1))
    unit: Any = numpyro.param("unit", jnp.ones(()))
    with obs:
        numpyro.sample("z", sp.Matern(TIMES, unit * lengthscale))


def timed(times):
    numpyro.sample("z", sp.Matern(times, LENGTHS))


def frame_program():
    model = frames()
    return sp.Program(normal, model.denoiser, model.encoder, sampler=sp.DDIM(12))


@pytest.fixture(scope="module")
def program():
    return sp.over_time(frame_program(), smooth)


def kernel(prior, lengths=LENGTHS):
    """Covariance (T, D, T, D), from the textbook formulas."""
    found = np.zeros((T, D, T, D))
    for j, length in enumerate(np.broadcast_to(lengths, (D,))):
        r = np.abs(TIMES[:, None] - TIMES) / length
        s = np.sqrt(3) * r
        found[:, j, :, j] = np.exp(-r) if prior in (rough, learned) else (1 + s) * np.exp(-s)
    return found


def dense(prior, lengths=LENGTHS):
    """Mean and covariance of all (x, z), flattened (T·d, then T·D)."""
    model, cov = frames(), kernel(prior, lengths).reshape(T * D, T * D)
    lift = np.kron(np.eye(T), np.asarray(model.weights, float))
    of_x = lift @ cov @ lift.T + NOISE**2 * np.eye(T * FEATURES)
    mean = np.concatenate([np.tile(np.asarray(model.mean, float), T), np.zeros(T * D)])
    return mean, np.block([[of_x, lift @ cov], [cov @ lift.T, cov]])


def condition(prior, x):
    """Mean and covariance of what is not seen of (x, z), and log p of what is, for one sequence."""
    mean, cov = dense(prior)
    told = np.concatenate([~np.isnan(x.reshape(-1)), np.zeros(T * D, bool)])
    gain = cov[~told][:, told] @ np.linalg.inv(cov[told][:, told])
    value = x.reshape(-1)[told[: x.size]].astype(float)
    evidence = stats.multivariate_normal(mean[told], cov[told][:, told]).logpdf(value)
    return mean[~told] + gain @ (value - mean[told]), cov[~told][:, ~told] - gain @ cov[told][:, ~told], evidence


def sequences(prior, count, seed=0, gaps=()):
    mean, cov = dense(prior)
    draws = np.random.default_rng(seed).multivariate_normal(mean, cov, count)
    x = draws[:, : T * FEATURES].reshape(count, T, FEATURES).astype(np.float32)
    x[:, list(gaps)] = np.nan
    return x


def p_value(bounds, expected):
    gap = np.asarray(bounds, float) - expected
    return 2 * stats.norm.sf(abs(gap.mean() / (gap.std(ddof=1) / np.sqrt(len(gap)))))


# --- the oracle -------------------------------------------------------------------------------------------------------


def test_refinement_is_under_the_dense_gaussian():
    """log p(z, x) at other codes, a gap in the frames, and the posterior that it starts from; another process fails."""
    x = sequences(smooth, 1, gaps=GAPS)
    mean, cov, _ = condition(smooth, x[0])
    mean, cov = mean[-T * D :], cov[-T * D :, -T * D :]
    codes = np.random.default_rng(1).multivariate_normal(mean, 2 * cov, 8).astype(np.float32)
    exact = stats.multivariate_normal(mean, cov, allow_singular=True).logpdf(codes)

    def apart(prior):
        program = sp.over_time(frame_program(), prior)
        (target,) = targets(program, x, KEY, 256)
        found = np.array(jax.jit(jax.vmap(lambda z: log_joint(program, target, z)))(jnp.asarray(codes)))
        return target, np.abs((found - found[0]) - (exact - exact[0])).max()

    target, error = apart(smooth)
    assert error < 0.5, "of differences of tens of nats"
    assert apart(independent)[1] > 5
    np.testing.assert_allclose(target.loc, mean, atol=2e-3)
    np.testing.assert_allclose(target.factor @ target.factor.T, cov, atol=5e-3)
    found = svi(sp.over_time(frame_program(), smooth), x, key=KEY, draws=400, steps=100, levels=64)
    code = found["unconstrained_posterior"]["code"].values[0, :, 0]
    assert np.abs((code.mean(0) - mean) / np.sqrt(np.diag(cov))).max() < 0.3
    np.testing.assert_allclose(code.std(0), np.sqrt(np.diag(cov)), rtol=0.2)
    assert found["posterior"]["z"].dims == ("chain", "draw", "obs", "time", "factor")


@pytest.mark.parametrize(("prior", "gaps"), [(smooth, GAPS), (rough, ())])
def test_posterior_is_that_of_the_dense_gaussian(prior, gaps):
    """Means and deviations of the code at all frames; the i.i.d. prior and potentials q instead of q/p fail."""
    program = sp.over_time(frame_program(), prior)
    x = sequences(prior, 3, gaps=gaps)
    loc, scale = program.encode(x)

    def fits(loc, scale):
        good = True
        for one, mean, sd in zip(x, loc, scale, strict=True):
            expected, cov, _ = condition(prior, one)
            good &= np.allclose(mean, expected[-T * D :], atol=2e-3)
            good &= np.allclose(sd, np.sqrt(np.diag(cov)[-T * D :]), rtol=5e-3)
        return good

    assert fits(loc, scale)
    if prior is smooth:
        assert not fits(*sp.over_time(frame_program(), independent).encode(x))
        assert not fits(*program.replace(encoder=PosteriorsAsPotentials(program.encoder.frame, T)).encode(x))


class PosteriorsAsPotentials(FramewiseEncoder):
    """ψ = q(z | x) instead of q(z | x) / p(z): the prior of single frames is counted twice."""

    def potentials(self, x):
        loc = jax.vmap(self.frame.posterior)(jnp.nan_to_num(x))[0]
        factor = self.frame.distribution(jax.vmap(lambda x: self.frame.parameters(*self.frame.clean(x)))(x)).root
        seen = ~jnp.isnan(x).any(1)
        return loc, seen[:, None, None] * jnp.linalg.inv(factor @ jnp.swapaxes(factor, 1, 2))


@pytest.mark.parametrize("gaps", [(), GAPS])
def test_evidence_is_that_of_frames_and_of_their_potentials(program, gaps):
    """log p(x) = Σ log p(x_t) + log E_p ∏ψ over what is seen, ψ = q/p; exact up to single precision. ψ = q fails."""

    def evidence(program, ratio=True):
        q = program.code_law(jnp.asarray(x)).smoothed
        total = np.asarray(q.log_normaliser, float)
        for i, t in np.argwhere(~np.isnan(x[..., 0])):
            encoder = frames().encoder
            mean, cov = encoder.parameters(*encoder.clean(jnp.asarray(x[i, t])))
            peak = np.asarray(q.centre[i, t], float)
            log_q = stats.multivariate_normal(mean, np.asarray(cov, float)).logpdf(peak)
            total[i] += frames().log_prob(x[i, t]) + log_q - ratio * stats.norm.logpdf(peak).sum()
        return total

    x = sequences(smooth, 2, gaps=gaps)
    exact = [condition(smooth, one)[2] for one in x]
    np.testing.assert_allclose(evidence(program), exact, atol=0.02)
    wrong = program.replace(encoder=PosteriorsAsPotentials(program.encoder.frame, T))
    for other in (evidence(sp.over_time(frame_program(), independent)), evidence(wrong, ratio=False)):
        assert np.all(np.abs(other - exact) > 0.2)


@pytest.mark.parametrize("gaps", [(), GAPS])
def test_bound_is_the_evidence_of_what_is_seen(program, gaps):
    """192 sequences, 48 levels, false alarm 1e-4. The i.i.d. prior is off by nats."""
    x = sequences(smooth, 192, gaps=gaps)
    exact = np.array([-condition(smooth, one)[2] for one in x])
    score = lambda program: p_value(evidence_bound(program, x, key=KEY, levels=48)["bound"], exact)  # noqa: E731
    assert score(program) > 1e-4
    if not gaps:  # with them it is off by half as much, within the noise
        assert score(sp.over_time(frame_program(), independent)) < 1e-4


def test_posterior_predicts_missing_frames(program):
    """Draws of codes and images at all frames, with the moments of the dense Gaussian: 400 draws, 5 standard errors."""
    x = sequences(smooth, 2, gaps=GAPS)
    data = xr.Dataset({"x": (("obs", "time", "feature"), x)}, coords={"time": TIMES})
    count = 400
    tree = program.replace(sampler=sp.DDIM(60)).posterior(data, key=KEY, draws=count, predictive=count, levels=2)
    assert tree["posterior"]["z"].dims == ("chain", "draw", "obs", "time", "factor")
    np.testing.assert_array_equal(tree["posterior"]["time"], TIMES)
    for group in ("posterior", "prior", "posterior_predictive", "log_likelihood"):
        assert all(np.isfinite(v.values).all() for v in tree[group].data_vars.values()), group
    for i, one in enumerate(x):
        mean, cov, _ = condition(smooth, one)
        sd, missing = np.sqrt(np.diag(cov)), len(GAPS) * FEATURES
        images = tree["posterior_predictive"]["x"].values[0, :, i, list(GAPS)]
        images = np.moveaxis(images, 0, 1).reshape(count, -1)
        codes = tree["posterior"]["z"].values[0, :, i].reshape(count, -1)
        for draws, m, s in ((images, mean[:missing], sd[:missing]), (codes, mean[missing:], sd[missing:])):
            assert np.all(np.abs(draws.mean(0) - m) < 5 * s / np.sqrt(count))
            assert np.all(np.abs(draws.std(0) / s - 1) < 5 / np.sqrt(2 * count))


def test_figures_of_the_evidence_of_sequences_with_gaps(program, monkeypatch):
    """The bound is of whole sequences; density of the flow and information are of the frames that are seen."""
    stub = lambda denoiser, x, key: np.asarray(jax.vmap(denoiser, in_axes=(0, None))(x, jnp.zeros(()))).sum(1)  # noqa: E731
    monkeypatch.setattr("sami_ppl.runs.evidence.flow_log_prob", stub)
    monkeypatch.setattr("sami_ppl.runs.evidence.importance_proposal", lambda program, data, key: None)
    data = xr.Dataset({"x": (("obs", "time", "feature"), sequences(smooth, 3, gaps=GAPS))})
    run = SimpleNamespace(program=program, module=None, config=None, own_data=True)
    settings: Any = {"levels": 2, "draws": 32, "weighted": 0, "flow": 2}
    figures, tree = evidence_figures(cast(Any, run), data, key=KEY, **settings)
    assert tree["bound"].sizes["obs"] == 3
    assert tree["information"]["axis"].values.tolist() == ["z[0]", "z[1]"]
    assert np.isfinite([*figures["information"].values(), *figures["flow"]["negative_log_density"].values()]).all()


# --- priors that learn ------------------------------------------------------------------------------------------------


def test_the_lengthscale_is_the_most_likely_one():
    """SVI on the bound, all else held, finds the maximum of the dense likelihood; 120 sequences with gaps."""
    x = sequences(learned, 120, gaps=(1,))
    program = sp.over_time(frame_program(), learned)

    def negative(log_length):
        mean, cov = dense(learned, np.exp(log_length))
        told = ~np.isnan(x[0].reshape(-1))
        law = stats.multivariate_normal(mean[: T * FEATURES][told], cov[: T * FEATURES, : T * FEATURES][told][:, told])
        return -law.logpdf(x.reshape(len(x), -1)[:, told]).sum()

    best = optimize.minimize_scalar(negative, (0.0, 1.0)).x
    rates = {True: optax.adam(optax.cosine_decay_schedule(0.1, 150)), False: optax.set_to_zero()}
    optimiser = optax.multi_transform(rates, lambda params: {name: name == "log_lengthscale" for name in params})
    svi = SVI(partial(program.model, objective=Objective("none")), program.guide, optimiser, ScoreELBO())
    state = svi.init(KEY, x)
    update = jax.jit(lambda state: svi.update(state, x)[0])
    for _ in range(150):
        state = update(state)
    assert abs(float(svi.get_params(state)["log_lengthscale"]) - best) < 0.1
    assert abs(best) > 0.5, "it has moved"


def test_fits_save_and_load(tiny_program, tmp_path):
    """The ordinary fit trains parameters and global sites of the prior; the saved program is the same."""
    rng = np.random.default_rng(0)
    x = np.cumsum(0.3 * rng.normal(size=(40, T, 4)), 1).astype(np.float32)
    x[::3, 4] = np.nan
    stage = sp.Stage(steps=12, batch=8, warmup=1, learning_rate=0.02, validate_every=12, beta=1.0, train=("encoder",))
    program = sp.over_time(tiny_program(), hierarchical)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CollapseWarning)  # twelve steps are no fit
        fitted, history = sp.fit(program, x, stage, key=KEY, progress=False)
    record = history.stage_records()[-1]
    assert np.isfinite([record["bound"], *record["own"]]).all()
    for name, start in program.prior_params.items():
        assert not np.allclose(fitted.prior_params[name], start, atol=1e-4), name
    sp.save(fitted, tmp_path / "saved")
    again = sp.load(tmp_path / "saved", program)
    for one, other in zip(again.encode(x[:2]), fitted.encode(x[:2]), strict=True):
        np.testing.assert_array_equal(one, other)
    tree = fitted.posterior(x[:2], key=KEY, draws=3, predictive=1, levels=1)
    assert tree["posterior"]["lengthscale"].shape == (1, 3, D)
    assert np.isfinite(tree["posterior"]["z"]).all()


def test_the_guide_is_smoothed_at_the_global_sites_that_it_has_drawn(tiny_program):
    """Its process has the lengthscale of the same draw, times the parameter; control: draws differ."""
    program, x = sp.over_time(tiny_program(), hierarchical), np.zeros((2, T, 4), np.float32)
    program = program.replace(prior_params=program.prior_params | {"unit": jnp.asarray(3.0)})

    @jax.jit
    def drawn(key):
        trace = handlers.trace(handlers.seed(program.guide, key)).get_trace(x)
        return trace["lengthscale"]["value"], trace["z"]["fn"].process.lengthscale

    value, used = drawn(KEY)
    np.testing.assert_allclose(used, np.broadcast_to(3 * value, used.shape), rtol=1e-6)
    assert np.abs(drawn(jax.random.key(1))[0] - value).min() > 1e-3


def test_a_denoiser_of_frames_serves_sequences(tiny_program, tmp_path):
    """What was fitted to single frames is loaded into a program of sequences; that of other frames is refused."""
    sp.save(tiny_program(), tmp_path / "frames")
    clips = sp.over_time(tiny_program().replace(denoiser=jax.tree.map(jnp.zeros_like, tiny_program().denoiser)), smooth)
    found = load_denoiser(tmp_path / "frames", clips)
    assert eqx.tree_equal(found.denoiser.frame, tiny_program().denoiser)
    assert found.denoiser.frames == T
    with pytest.raises(LoadError, match="do not fit the program"):
        load_denoiser(tmp_path / "frames", sp.over_time(frame_program(), smooth))


def test_times_may_be_data(program):
    """Every sequence at its own times: the posterior is that of a program of these times."""
    x = sequences(smooth, 4, gaps=GAPS)
    times = np.stack([TIMES, 2 * TIMES, 0.5 * TIMES, TIMES]).astype(np.float32)
    given = sp.over_time(frame_program(), timed, given={"times": times})
    loc, _ = given.encode(x, given={"times": times})
    np.testing.assert_allclose(loc[[0, 3]], program.encode(x[[0, 3]])[0], atol=1e-4)
    assert not np.allclose(loc[1], program.encode(x[[1]])[0][0], atol=1e-2)
    data = xr.Dataset({"x": (("obs", "time", "feature"), x), "times": (("obs", "time"), times)})
    assert np.isfinite(evidence_bound(given, data, key=KEY, levels=2)["bound"]).all()


def test_frames_come_back(program):
    """frames_of undoes over_time: the same networks under N(0, I)."""
    single = frames_of(program)
    x = sequences(smooth, 2)
    assert single.event_shape == (FEATURES,)
    assert single.latents.sites[0].standard
    for one, other in zip(single.encode(x[:, 0]), frame_program().encode(x[:, 0]), strict=True):
        np.testing.assert_array_equal(one, other)
    draws = np.asarray(jax.jit(lambda key: program.prior_codes(key, 4000))(KEY)).reshape(-1, T * D)
    expected = kernel(smooth).reshape(T * D, T * D)
    assert np.all(np.abs(np.cov(draws, rowvar=False) - expected) < 5 * np.sqrt((1 + expected**2) / len(draws)))


def test_frames_are_observations_by_themselves():
    """Those that are seen, each with its factors, of the sequence or of the frame, and its part of the split."""
    x = np.arange(12.0).reshape(2, 3, 2)
    x[1, 1] = np.nan
    values = {"x": (("obs", "time", "feature"), x), "a": ("obs", [5, 6]), "b": (("obs", "time"), x[..., 1])}
    data = xr.Dataset(values, coords={"split": ("obs", ["train", "test"]), "time": [0.0, 1.0, 2.0]})
    found = single_frames(data)
    assert found["x"].dims == ("obs", "feature")
    np.testing.assert_array_equal(found["x"], np.delete(x.reshape(6, 2), 4, 0))
    np.testing.assert_array_equal(found["a"], [5, 5, 5, 6, 6])
    np.testing.assert_array_equal(found["b"], found["x"][:, 1])
    np.testing.assert_array_equal(found["split"], ["train"] * 3 + ["test"] * 2)


# --- what cannot be done ----------------------------------------------------------------------------------------------


def box():
    numpyro.sample("z", dist.Uniform(-1, 1).expand([D]).to_event(1))


def two_sites():
    numpyro.sample("a", sp.Matern(TIMES, 1.0))
    numpyro.sample("b", sp.Matern(TIMES, 1.0))


def plain_sequence():
    numpyro.sample("z", dist.Normal(0, 1).expand([T, D]).to_event(2))


def three_factors():
    numpyro.sample("z", sp.Matern(TIMES, 1.0, size=3))


def backwards():
    numpyro.sample("z", sp.Matern(TIMES[::-1], 1.0, size=D))


def with_gap(change):
    x = sequences(smooth, 3)
    change(x)
    return x


def mixture_frames(mlp):
    schedule, settings = sp.VariancePreserving(-4.0, 4.0), {"families": {"z": families.Mixture}, "key": KEY}
    encoder = sp.FamilyEncoder(mlp(FEATURES, 6, key=KEY), schedule, (FEATURES,), sp.read_prior(normal), **settings)
    denoiser = sp.GaussianDenoiser(jnp.zeros(FEATURES), jnp.eye(FEATURES), schedule)
    return sp.Program(normal, denoiser, encoder)


REFUSED = {
    "order": (lambda p, mlp: sp.over_time(frame_program(), backwards), ValueError, "times must increase"),
    "factors": (lambda p, mlp: sp.over_time(frame_program(), three_factors), ValueError,
                r"Matern process of shape \(T, D\) = \(6, 2\), got 'z' \(6, 3\)"),
    "sites": (lambda p, mlp: sp.over_time(frame_program(), two_sites), ValueError, "must have one site, a Matern"),
    "no process": (lambda p, mlp: sp.over_time(frame_program(), plain_sequence), ValueError, "a Matern process"),
    "replaced": (lambda p, mlp: p.replace(prior=normal), ValueError, "a Matern process"),
    "frames' prior": (lambda p, mlp: sp.over_time(frame_program().replace(prior=box), smooth), ValueError,
                      "the frames' prior must be Normal.*site 'z' is not a fixed Normal"),
    "twice": (lambda p, mlp: sp.over_time(p, smooth), ValueError, "one of sequences already"),
    "no frames": (lambda p, mlp: frames_of(frame_program()), ValueError, "not one of sequences"),
    "family": (lambda p, mlp: sp.over_time(mixture_frames(mlp), smooth), TypeError, "is not Gaussian, as sequences"),
    "length": (lambda p, mlp: p.encode(np.zeros((2, 5, FEATURES))), ValueError, r"x must have shape \(obs, 6, 3\)"),
    "all missing": (lambda p, mlp: p.observations(with_gap(lambda x: x[1].fill(np.nan))), ValueError,
                    "all frames of observation 1 are missing"),
    "partly": (lambda p, mlp: p.observations(with_gap(lambda x: x[1, 2, :1].fill(np.nan))), ValueError,
               "frame 2 of observation 1 is NaN in part"),
    "no sequence": (lambda p, mlp: frame_program().observations(np.full((2, FEATURES), np.nan)), ValueError,
                    "x is NaN at observation 0.*only frames of sequences"),
    "times": (lambda p, mlp: sp.over_time(frame_program(), timed, given={"times": TIMES[None]}).code_law(
        sequences(smooth, 2), {"times": TIMES[None]}), ValueError, r"array of shape \(2, ...\)}, one row for each"),
    "calibration": (lambda p, mlp: sp.simulation_based_calibration(p, key=KEY), ValueError, "sequences"),
    "noisy end": (lambda p, mlp: noise_end_kl(p, sequences(smooth, 2), key=KEY), ValueError,
                  "noise_end_kl is for .* single observations"),
    "information": (lambda p, mlp: information_spectrum(p, sequences(smooth, 2), key=KEY), ValueError,
                    r"information_spectrum is for .* sequences: give frames_of\(program\)"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_done_is_refused(program, mlp, name):
    call, error, message = REFUSED[name]
    with pytest.raises(error, match=f"(?s){message}"):
        call(program, mlp)

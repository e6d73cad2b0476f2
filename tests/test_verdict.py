"""What figures of a fit warn of, and how many of a posterior's widths are the encoder's least."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from numpyro import distributions as dist
import pytest

import sami_ppl as sp
from sami_ppl.diagnostics import fit_warnings, floor_share
from sami_ppl.diagnostics.verdict import verdict

SITES = {"place": ("place[0]", "place[1]"), "kind": ("kind",)}
GOOD = {
    "kl_nats": {"place[0]": 3.0, "place[1]": 2.0, "kind": 0.6},
    "z_gain": 50.0,
    "samples": {"mse_own": 0.01, "mse_other": 0.5, "mse_mean_image": 0.25},
    "at_floor": 0.02,
    "guidance_gain": 4.0,
    "kl_total_nats": 5.6,
    "prior_draws": {"frechet": 0.02, "frechet_data": 0.004},
    "calibration": {"simulations": 256, "false_alarm": 0.01, "calibrated": True, "verdict": {"kind": "calibrated"}},
}
OFF = {**GOOD["calibration"], "calibrated": False, "verdict": {"kind": "too narrow by a factor of about 1.4"}}
X = np.random.default_rng(0).normal(size=(30, 6)).astype(np.float32)


def changed(**figures):
    return fit_warnings({**GOOD, **figures}, SITES)


def test_a_good_fit_is_not_warned_of():
    assert changed() == []
    assert changed(at_floor=None) == [], "families without independent widths"
    assert changed(calibration={"simulations": 40, "calibrated": None}) == [], "too few simulations to say"
    for figure in ("guidance_gain", "prior_draws", "calibration"):
        assert fit_warnings({name: value for name, value in GOOD.items() if name != figure}, SITES) == []


@pytest.mark.parametrize(
    ("figures", "message"),
    [
        ({"kl_nats": dict.fromkeys(GOOD["kl_nats"], 0.01)}, "The posterior has collapsed"),
        ({"z_gain": 0.01}, "z informs nothing"),
        ({"kl_nats": {**GOOD["kl_nats"], "kind": 0.01}}, "Nothing is told of 'kind'"),
        ({"samples": {"mse_own": 0.285, "mse_other": 0.34, "mse_mean_image": 0.344}}, "Samples hardly follow"),
        ({"samples": {"mse_own": 0.039, "mse_other": 0.06, "mse_mean_image": 0.019}}, "than the mean image is"),
        ({"at_floor": 0.6}, "60% of the posterior's widths lie at the least"),
        ({"guidance_gain": 2.0}, "costs 5.6 nats of KL and guidance gains 2.0"),
        ({"prior_draws": {"frechet": 0.05, "frechet_data": 0.004}}, "Draws of the prior do not look like the data"),
        ({"calibration": OFF}, r"not calibrated, by 256 simulations (false alarms 1 %): kind too narrow by a factor"),
    ],
)
def test_each_fault_is_told_by_itself(figures, message):
    (found,) = changed(**figures)
    assert message in found


def test_the_verdict_says_what_is_known_of_calibration():
    """Calibrated is said as what it is, what was not checked too; without figures nothing is."""
    assert verdict({}) == "Not checked."
    good = verdict({"warnings": [], **GOOD})
    assert good.startswith("No warning")
    assert "256 simulations cannot tell its posteriors from calibrated ones (false alarms 1 %)" in good
    assert verdict({"warnings": []}).endswith("calibration is not checked.")
    assert verdict({"warnings": ["…"], "calibration": OFF}) == "1 warning; its posteriors are not calibrated."


def program_of(families):
    prior = sp.factors(a=dist.Normal(0, 1).expand([2]), b=dist.Normal(0, 1))
    size = {"width": 4, "depth": 1}
    return sp.autoencoder(prior, X, families=families, size=size, progress=False, key=jax.random.key(0))


@pytest.mark.parametrize("families", [None, {"b": sp.families.Full}])
def test_widths_at_the_floor_are_counted(families):
    """Where the last layer asks for scales far below the least, all lie there; where for others, none."""
    program = program_of(families)

    def widths(raw):
        last = (lambda e: e.log_scale.bias) if families is None else (lambda e: e.families[0].scale.bias)
        return program.replace(encoder=eqx.tree_at(last, program.encoder, replace_fn=lambda b: jnp.full_like(b, raw)))

    assert floor_share(widths(-30.0), X) == 1
    assert floor_share(widths(0.0), X) == 0


def test_widths_behind_other_axes_are_counted_too_and_those_of_mixtures_not():
    program = program_of(None)
    narrow = eqx.tree_at(lambda e: e.log_scale.bias, program.encoder, replace_fn=lambda b: jnp.full_like(b, -30.0))
    turned = sp.AffineEncoder(narrow, 0.5 * jnp.eye(3))
    assert floor_share(program.replace(encoder=turned), X) == 1
    assert floor_share(program.replace(encoder=sp.OwnGuideEncoder(turned, program.encoder)), X) == 0
    assert floor_share(program_of({site: sp.families.Mixture for site in ("a", "b")}), X) is None

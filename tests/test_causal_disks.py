"""Causal disks: the data obey their mechanisms, and the priors have the graph that they name."""

from dataclasses import replace

import jax
import numpy as np
import pytest

from sami_ppl import intervene
from sami_ppl.data import causal_disks, render
from sami_ppl.data.causal_disks import NOISE, PARENT, UNITS, WEIGHT, mechanisms
from sami_ppl.diffusion.sampler import DDIM
from sami_ppl.saving import files as programs

KEY = jax.random.key(0)
MODULE = programs.load_file(programs.find("causal_disks", "models"))
SMALL = MODULE.Config(observations=400, width=8, depth=1, labelled=0.25)


def test_data_obey_the_mechanisms():
    data = MODULE.load(SMALL, key=KEY)
    values = {name: data[name].values for name in PARENT}
    np.testing.assert_allclose(data["x"].values, render(**values), atol=1e-5)
    for name, parent in PARENT.items():
        moved = 0.0 if parent is None else WEIGHT[name] * (values[parent] - UNITS[parent][0])
        noise = (values[name] - UNITS[name][0] - moved) / NOISE[name]
        assert np.abs(noise).max() <= 1 + 1e-5
        assert abs(noise.std() - 3**-0.5) < 0.05
    assert np.corrcoef(values["centre_x"], values["background"])[0, 1] > 0.4
    told = data["labelled"].values == 1
    assert not told[data["split"].values == "test"].any()
    assert abs(told[data["split"].values == "train"].mean() - 0.25) < 0.1
    truth = np.stack([values[name] for name in PARENT], -1)
    np.testing.assert_array_equal(data["label"].values[told], truth[told])
    assert not data["label"].values[~told].any()


def test_no_images_are_refused():
    with pytest.raises(ValueError, match="n must be at least 1"):
        causal_disks(KEY, 0)


def test_setting_a_factor_moves_what_follows():
    noise = dict.fromkeys(PARENT, 0.5)
    before, after = mechanisms(noise), mechanisms(noise, {"centre_y": 0.3})
    assert after["centre_x"] == before["centre_x"]
    np.testing.assert_allclose(after["background"] - before["background"], 1.5 * (0.3 - before["centre_y"]))


@pytest.mark.slow
@pytest.mark.parametrize("prior", ["causal", "independent"])
def test_priors_have_their_graph(prior):
    program = MODULE.build(replace(SMALL, prior=prior), MODULE.load(SMALL, key=KEY), key=KEY)
    parents = {site.name: site.parents for site in program.latents.sites}
    if prior == "independent":
        assert not any(parents.values())
        return
    assert parents == {"centre_x": (), "centre_y": ("centre_x",), "background": ("centre_y",)}
    true = {f"{n}_weight": w * UNITS[PARENT[n]][1] / UNITS[n][1] / MODULE.STEP
            for n, w in WEIGHT.items()}  # fmt: skip
    fitted = program.replace(prior_params={n: np.float32(w) for n, w in true.items()})
    assert MODULE.weights(fitted) == pytest.approx(WEIGHT, rel=1e-5)
    low, high = (intervene(fitted, {"centre_x": v}, key=KEY, size=8, sampler=DDIM(3)).mean() for v in (0.3, 0.7))
    np.testing.assert_allclose(high["centre_y"] - low["centre_y"], 0.6 * 0.4, atol=1e-4)
    np.testing.assert_allclose(high["background"] - low["background"], 1.5 * 0.6 * 0.4, atol=1e-4)

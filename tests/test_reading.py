"""Latent diffusion in runs: images become latents before anything sees them, and pixels in the report again."""

import json
from pathlib import Path
import shutil

from commands import refused, sets, stages
import equinox as eqx
import jax
import numpy as np
from numpyro import distributions as dist
from PIL import Image
import pytest
import xarray as xr

import sami_ppl as sp
from sami_ppl._util.errors import UserError
from sami_ppl._util.progress import telling
from sami_ppl.data import Stream, split
from sami_ppl.runs import reading
from sami_ppl.runs import run as running
from sami_ppl.runs.report import pictures, tables
from sami_ppl.saving import files as programs

FOLDER = Path(__file__).parent / "data" / "diffusers"
PIPELINE = str(FOLDER / "latent")
KEY = jax.random.key(0)
X = np.load(FOLDER / "images.npz")["x"][:12]  # 32×32, of clothes
IMAGES = xr.Dataset({"x": (("obs", "channel", "row", "column"), X[:, None] / np.float32(127.5) - 1)})


class Rows:
    """A source of the rows of an array."""

    def __init__(self, x):
        self.x = x

    def __len__(self):
        return len(self.x)

    def rows(self, i, /):
        return self.x[i]


@pytest.fixture(scope="module")
def autoencoder():
    return sp.diffusion.autoencoder_from_diffusers(PIPELINE)


@pytest.fixture(scope="module")
def latents(autoencoder):
    return split(sp.diffusion.to_latents(autoencoder, IMAGES), test=0.5, key=KEY)


@pytest.fixture(scope="module")
def program(latents):
    prior = sp.factors(z=dist.Normal(0, 1).expand([2]))
    return sp.autoencoder(
        prior, latents, network="mlp", size={"width": 4, "depth": 1}, sampler=sp.DDIM(2), progress=False, key=KEY
    )


def test_images_become_latents_and_latents_stay(autoencoder, latents, capsys):
    with telling(True):
        found = reading.as_latents(IMAGES, PIPELINE)
        np.testing.assert_array_equal(found["x"], sp.diffusion.to_latents(autoencoder, IMAGES)["x"])
        assert reading.as_latents(latents, PIPELINE) is latents
        stream = Stream(Rows(latents["x"].values))
        assert reading.as_latents(stream, PIPELINE) is stream
    said = capsys.readouterr().err
    assert f"making images (1, 32, 32) latents (2, 8, 8), by {PIPELINE}; what is fitted and measured is of lat" in said
    assert said.count("are taken for latents") == 2


def test_an_autoencoder_that_is_lost_costs_the_pixels(tmp_path):
    assert reading.decoding_autoencoder(None, (2, 8, 8)) is None
    assert reading.decoding_autoencoder(PIPELINE, (2, 8, 8)).settings.latent_channels == 2
    with pytest.warns(UserWarning, match=r"pictures of the report are left out.*there is no folder .*config\.json"):
        assert reading.decoding_autoencoder(str(tmp_path / "moved"), (2, 8, 8)) is None
    with pytest.warns(UserWarning, match=r"is another: latents have 2 channels, those of the run 4"):
        assert reading.decoding_autoencoder(PIPELINE, (4, 8, 8)) is None


def test_what_cannot_be_made_latents_is_said(tmp_path):
    for images, message in (
        (IMAGES.isel(row=slice(30)), rf"^autoencoder={PIPELINE}: .* of sides that 4 divides, got \(1, 30, 32\)"),
        (xr.concat([IMAGES] * 3, "channel"), r"takes images \(1, h, w\) .* got \(3, 32, 32\)"),
        (Stream(Rows(X[:, None])), r"^stream=True reads what is stored, and latents of images \(1, 32, 32\)"),
    ):
        with pytest.raises(UserError, match=message):
            reading.as_latents(images, PIPELINE)
    with pytest.raises(UserError, match=r"no vae/config\.json"):
        reading.as_latents(IMAGES, str(tmp_path))


def test_the_option_is_named_where_its_folder_does_not_do(sami, tmp_path):
    np.savez("x.npz", x=X)
    command = ["run", "images", "--data", "x.npz", "--out", "out", "--quiet", "--autoencoder"]
    assert f"sami: --autoencoder {FOLDER / 'plain'}: " in refused(sami(*command, FOLDER / "plain"))
    assert "sami: --autoencoder nowhere: there is no folder nowhere" in refused(sami(*command, "nowhere"))
    assert [file.name for file in tmp_path.iterdir()] == ["x.npz"]


def test_a_page_says_what_is_of_latents(autoencoder):
    metrics = {"autoencoder": "a<b", "bound_nats": {"mean": 1.0, "se": 0.1}, "samples": {"mse_own": 1.0}}
    plain, latent = ("".join(tables.measures(metrics, latent=latent)) for latent in (False, True))
    assert "squared errors a pixel" in plain
    assert "latent" not in plain
    assert "squared errors a number of a latent" in latent
    assert "The whole program, on latents of one autoencoder" in latent
    assert "In pixels, which the autoencoder a&lt;b makes" in tables.pixels(metrics, autoencoder)
    assert "the autoencoder a&lt;b was not found" in tables.pixels(metrics, None)
    assert "In pixels, which the autoencoder makes" in tables.pixels({}, autoencoder)
    assert not tables.pixels({}, None)


def test_an_inference_brings_the_autoencoder_of_its_denoiser(tmp_path):
    inference = programs.load_file(programs.find("pretrained", "inference"))
    for denoiser, autoencoder in (
        (PIPELINE, PIPELINE), (str(FOLDER / "plain"), None), ("nobody/nothing", None), (str(tmp_path), None), ("", None)
    ):  # fmt: skip
        assert inference.autoencoder(inference.Config(denoiser=denoiser)) == autoencoder


def test_a_run_remembers_what_its_data_were_made_by(tmp_path, monkeypatch):
    """Wherever the next command is called; other observations are read for it as its own were."""
    monkeypatch.chdir(FOLDER)
    assert reading.named_autoencoder("latent") == PIPELINE
    assert reading.named_autoencoder("nobody/nothing") == "nobody/nothing"
    np.savez(tmp_path / "x.npz", x=X)
    (tmp_path / "config.json").write_text(json.dumps({"data": None, "autoencoder": PIPELINE}))
    assert reading.read_as(tmp_path) == {"autoencoder": PIPELINE}
    found = reading.read_data(tmp_path / "x.npz", **reading.read_as(tmp_path))
    np.testing.assert_allclose(found["x"], reading.as_latents(IMAGES, PIPELINE)["x"], atol=1e-5)


def test_latents_are_kept_to_the_last_bit(latents, tmp_path, monkeypatch):
    reading.keep_latents(latents.assign(file=("obs", [f"{i}.png" for i in range(12)])), tmp_path)
    monkeypatch.setattr(reading, "as_latents", lambda *a: pytest.fail("they need not be made again"))
    found = reading.run_data(None, None, None, {}, autoencoder=PIPELINE, kept=tmp_path, key=KEY)
    np.testing.assert_array_equal(found["x"], latents["x"])
    np.testing.assert_array_equal(found["split"], latents["split"])
    assert found["file"].values.tolist()[-1] == "11.png"


@pytest.mark.slow
def test_pictures_are_what_the_decoder_makes_of_latents(program, latents, autoencoder, monkeypatch):
    """Of another decoder they are others, of the same samples; without one, latents of two channels are not drawn."""
    monkeypatch.setattr(pictures, "ACTIVE_VARIANCE", -1.0)  # not fitted, no axis is active

    def drawn(decoder):
        m = pictures.gather(program, latents, {}, [], key=KEY, autoencoder=decoder)
        return {name: getattr(m, name) for name in ("x", "conditional", "marginal", "prior", "moved")}, m

    found, m = drawn(autoencoder)
    assert m.latent
    assert {name: a.shape for name, a in found.items()} == {
        "x": (6, 1, 32, 32), "conditional": (6, 4, 1, 32, 32), "marginal": (16, 1, 32, 32), "prior": (16, 1, 32, 32),
        "moved": (2, 7, 1, 32, 32),
    }  # fmt: skip
    test = latents.isel(obs=latents["split"].values == "test")["x"].values
    np.testing.assert_array_equal(m.test, test)
    np.testing.assert_allclose(found["x"], sp.diffusion.to_images(autoencoder, test), atol=1e-5)
    brighter = eqx.tree_at(lambda a: a.decoder.conv_out.bias, autoencoder, replace_fn=lambda bias: bias + 0.5)
    other, _ = drawn(brighter)
    for name, image in found.items():
        np.testing.assert_allclose(other[name] - image, 0.5, atol=1e-4)
    unseen, m = drawn(None)
    assert unseen["x"].shape == (6, 2, 8, 8)
    assert unseen["conditional"] is None
    assert not m.latent
    assert pictures.gather(program, latents.isel(obs=[0]), {"autoencoder": "lost"}, [], key=KEY).latent


@pytest.mark.slow
@pytest.mark.release
# Two steps teach nothing, which is said.
@pytest.mark.filterwarnings("ignore")
def test_a_pipeline_and_a_folder_of_photographs_make_one_report(sami, tmp_path, monkeypatch):
    """Pictures are in pixels; the run is opened again without the images, and, pictures apart, without the pipeline."""
    monkeypatch.setattr(running, "MEASURED", 1.0)  # seconds
    shutil.copytree(PIPELINE, tmp_path / "pipeline")
    (tmp_path / "photographs").mkdir()
    for i, image in enumerate(X):
        Image.fromarray(image).save(f"photographs/{i:02}.png")
    settings = [*stages("encoder"), "warm_steps=2", "align=False", "latents=2", "posterior_obs=2", "draws=2"]
    command = ["run", "images", "--with", "pretrained", "--data", "photographs", "--out", "mine",
               *sets("denoiser=pipeline", *settings)]  # fmt: skip
    code, out, err = sami(*command)
    assert code == 0, err
    assert "making images (1, 32, 32) latents (2, 8, 8)" in err
    assert f"errors and bounds are of latents, by {tmp_path / 'pipeline'}, not of pixels" in out
    assert sp.load("mine/model").event_shape == (2, 8, 8)
    described = json.loads(Path("mine/config.json").read_text())
    assert described["autoencoder"] == str(tmp_path / "pipeline")
    drawn = {"reconstructions", "unconditional", "prior"}
    assert {file.stem for file in Path("mine/figures").glob("*.png")} >= drawn
    page = Path("mine/report.html").read_text()
    assert "In pixels, which the autoencoder" in page
    assert "squared errors a number of a latent" in page
    assert "Errors and losses are of latents" in page

    shutil.rmtree("photographs")
    run = running.open_run(Path("mine"))
    assert run.autoencoder == str(tmp_path / "pipeline")
    assert not run.own_data
    code, out, err = sami("report", "mine", "--quiet")
    assert code == 0, err
    assert "In pixels" in Path("mine/report.html").read_text()

    shutil.move("pipeline", "elsewhere")
    code, out, err = sami("report", "mine", "--quiet")
    assert code == 0, err
    page = Path("mine/report.html").read_text()
    assert "was not found when this page was written" in page
    assert "Samples without a code" not in page

    np.savez("two.npz", x=np.zeros((4, 2, 4, 4), np.float32) + np.random.default_rng(0).normal(size=(4, 2, 4, 4)))
    wrong = [("two.npz" if word == "photographs" else "other" if word == "mine" else word) for word in command]
    wrong = [word.replace("denoiser=pipeline", "denoiser=elsewhere") for word in wrong]
    message = refused(sami(*wrong, "--quiet"))
    assert "observations of shape (2, 8, 8), the data are of (2, 4, 4)" in message
    assert "those of its own autoencoder" in message
    assert not Path("other").exists()

"""Program files: how they are found, listed, copied, loaded, and how settings reach their configurations."""

from dataclasses import asdict, dataclass, field
import shutil
from types import SimpleNamespace
from typing import Literal

import jax
import numpy as np
import pytest
import xarray as xr

from sami_ppl.fitting.stage import Stage
from sami_ppl.runs.settings import _has, configure, default_configs
from sami_ppl.saving import files as programs
from sami_ppl.saving import save as io
from sami_ppl.saving.files import UserError, copy, find, list_files, load_file, make_config

MODELS, INFERENCES = sorted(list_files("models")), sorted(list_files("inference"))


@dataclass(frozen=True)
class Model:
    latents: int = 3
    radius: float = 0.2
    widths: tuple[int, ...] = (32, 64)
    kind: Literal["mlp", "unet"] = "mlp"
    source: str = ""
    limit: int | None = None
    flag: bool = False
    noise: float = 1.0


@dataclass(frozen=True)
class Inference:
    encoder: Stage = Stage(steps=10)
    denoiser: Stage = Stage(steps=20)
    flag: bool = True
    noise: float = 2.0


CONDITIONAL = '''
"""Mine."""

from dataclasses import dataclass

import numpyro
from numpyro import distributions as dist

import sami_ppl as sp


@dataclass(frozen=True)
class Config:
    """Settings."""


def prior(u):
    numpyro.sample("z", dist.Normal(u, 1).to_event(1))


def build(config, data, *, key):
    return sp.autoencoder(prior, data, size={"width": 4, "depth": 1}, progress=False, key=key)
'''

# Finding


def test_every_file_is_listed_with_its_description():
    for kind in programs.KINDS:
        folder = programs.folders(kind)[0]
        assert sorted(list_files(kind)) == sorted(f.stem for f in folder.glob("*.py"))
        for name, (file, description) in list_files(kind).items():
            assert file.stem == name
            assert description.lower().startswith(name.replace("_", " "))
            assert description.endswith(".")


def test_a_broken_file_does_not_hide_the_others(tmp_path, monkeypatch):
    (tmp_path / "broken.py").write_text("def f(:\n")
    (tmp_path / "silent.py").write_text("x = 1\n")
    (tmp_path / "_shared.py").write_text('"""Not a program."""\n')
    (tmp_path / "good.py").write_text('"""Good.\n\nMore."""\nraise SystemExit("listing runs nothing")\n')
    monkeypatch.setattr(programs, "folders", lambda kind: [tmp_path])
    found = {name: description for name, (_, description) in list_files("models").items()}
    assert list(found) == ["broken", "good", "silent"]
    assert found["good"] == "Good."
    assert found["silent"] == "(no description)"
    assert "not valid Python" in found["broken"]


def test_the_nearest_folder_wins(tmp_path, monkeypatch):
    near, far = tmp_path / "near", tmp_path / "far"
    for folder in (near, far):
        folder.mkdir()
        (folder / "disks.py").write_text(f'"""{folder.name}"""')
    monkeypatch.setattr(programs, "folders", lambda kind: [near, far])
    assert list_files("models")["disks"] == (near / "disks.py", "near")


def test_find_by_name_and_by_path(tmp_path, monkeypatch):
    mine = tmp_path / "mine.py"
    mine.write_text("")
    assert find(str(mine), "models") == mine
    expected = list_files("models")["disks"][0]
    monkeypatch.chdir(tmp_path)
    assert find("disks", "models") == find("disks.py", "models") == find("models/disks.py", "models") == expected
    assert find("joint", "inference") == list_files("inference")["joint"][0]


@pytest.mark.parametrize("name", ["disk", "diks", "models/disk.py", "models/disks", "elsewhere/disks.py", "Disks"])
def test_near_names_are_offered(name):
    with pytest.raises(UserError, match=rf"no models file '{name}'; did you mean disks.*Known: {', '.join(MODELS)}"):
        find(name, "models")


def test_an_unknown_name_lists_the_known():
    with pytest.raises(UserError) as caught:
        find("qqqqqqq", "inference")
    assert "did you mean" not in str(caught.value)
    assert all(name in str(caught.value) for name in INFERENCES)


# Copying


@pytest.mark.parametrize("name", ["disks", "models/disks.py", "joint"])
def test_copy(tmp_path, name):
    kind = "inference" if name == "joint" else "models"
    copied = copy(name, tmp_path / "mine.py")
    assert copied == tmp_path / "mine.py"
    assert copied.read_bytes() == find(name, kind).read_bytes()
    assert copy(name, tmp_path).name == find(name, kind).name
    assert copy(str(copied), tmp_path / "again.py").read_bytes() == copied.read_bytes()


def test_copy_never_overwrites(tmp_path):
    target = tmp_path / "disks.py"
    target.write_text("months of work")
    for path in (target, tmp_path):
        with pytest.raises(UserError, match=r"disks\.py exists already and is not overwritten"):
            copy("disks", path)
    assert target.read_text() == "months of work"


@pytest.mark.parametrize(
    ("name", "target", "message"),
    [
        ("disk", "a.py", "did you mean disks"),
        ("elsewhere/disks.py", "a.py", "no models file 'elsewhere/disks.py'"),
        ("disks", "none/a.py", "no folder .*none: make it first"),
        ("disks", "a.txt", "ending in .py"),
    ],
)
def test_copy_says_what_is_wrong(tmp_path, name, target, message):
    with pytest.raises(UserError, match=message):
        copy(name, tmp_path / target)
    assert not list(tmp_path.iterdir())


# Loading


@pytest.mark.parametrize("name", MODELS)
def test_models_keep_their_contract(name):
    module = load_file(find(name, "models"))
    config = module.Config()
    assert make_config(module.Config, asdict(config)) == config
    assert callable(module.build)
    assert callable(module.load)
    with pytest.raises(AttributeError, match="cannot assign"):
        config.latents = 1
    # What is recommended is a setting of at least one inference, of the right type.
    for key, value in getattr(module, "RECOMMENDED", {}).items():
        inferences = [load_file(find(other, "inference")).Config() for other in INFERENCES]
        owners = [config for config in inferences if _has(config, key.split("."))]
        assert owners, f"RECOMMENDED has {key!r}, which no inference has"
        configure({f"inference.{key}": str(value)}, {"inference": owners[0]})


@pytest.mark.parametrize("name", INFERENCES)
def test_inferences_keep_their_contract(name):
    module = load_file(find(name, "inference"))
    assert make_config(module.Config, asdict(module.Config())) == module.Config()
    assert callable(module.run)
    assert min(module.Config().posterior_obs, module.Config().draws) > 0, "of the posterior that ends every run"


def test_files_of_one_name_are_modules_of_their_own(tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        shutil.copyfile(find("disks", "models"), tmp_path / folder / "disks.py")
    one, two = (load_file(tmp_path / folder / "disks.py") for folder in ("a", "b"))
    assert one.Config is not two.Config
    assert one.__name__ != two.__name__


def test_a_file_without_config_is_refused(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("Config = dict\n")
    with pytest.raises(UserError, match=r"mine\.py has no dataclass Config.*sami cp disks my\.py"):
        load_file(file)


@pytest.mark.parametrize("old", ["def build(config, *, key): ...", "def adapt(config, data): ...\n"])
def test_a_file_that_does_not_build_from_data_is_refused(tmp_path, old):
    """And the form that is called is shown."""
    file = tmp_path / "mine.py"
    head = "import dataclasses\n\nConfig = dataclasses.make_dataclass('Config', [])\n"
    file.write_text(f"{head}{old}\n")
    with pytest.raises(UserError, match=r"mine\.py has no build\(config, data, \*, key\).*sp\.autoencoder"):
        load_file(file)
    file.write_text(f"{head}def build(config, data, *, key): ...\n")
    assert callable(load_file(file).build)


@pytest.mark.slow
def test_values_that_the_prior_takes_are_saved(tmp_path):
    """A prior p(z | u) is read from the values of u: the loaded program is read from the same."""
    file = tmp_path / "mine.py"
    file.write_text(CONDITIONAL)
    rng = np.random.default_rng(0)
    variables = {"x": (("obs", "feature"), rng.normal(size=(9, 5))), "u": (("obs", "of"), 3 + rng.normal(size=(9, 2)))}
    program = programs.build_program(file, {}, xr.Dataset(variables), key=jax.random.key(0))
    loaded = io.load(io.save(program, tmp_path / "model"))
    assert loaded.given == program.given
    assert len(program.given) == 9
    np.testing.assert_array_equal(loaded.latents.sites[0].shift, program.latents.sites[0].shift)
    assert program.latents.sites[0].shift[0] > 2
    assert loaded.origin == program.origin._replace(file=loaded.origin.file)


@pytest.mark.slow
def test_a_program_remembers_where_it_came_from(tmp_path):
    """And is saved with the text that built it, also where the file has been edited since."""
    file = tmp_path / "mine.py"
    file.write_text(find("digits", "models").read_text())
    values, data = {"latents": 2, "width": 8, "depth": 1}, xr.Dataset({"x": (("obs", "feature"), np.eye(3, 5))})
    program = programs.build_program(file, values, data, key=jax.random.key(0))
    file.write_text("edited")
    loaded = io.load(io.save(program, tmp_path / "model"))
    assert loaded.latents.size == 2
    assert program.latents.size == 2
    assert loaded.event_shape == program.event_shape == (5,)
    assert loaded.denoiser.std == program.denoiser.std
    assert program.origin.file == str(file)
    assert '"latents": 2' in program.origin.config


# Settings


@pytest.mark.parametrize(
    ("key", "text", "owner", "value"),
    [
        ("latents", "6", "model", 6),
        ("model.latents", "6", "model", 6),
        ("radius", "1", "model", 1.0),
        ("radius", "2e-1", "model", 0.2),
        ("widths", "(8, 16)", "model", (8, 16)),
        ("widths", "8,16", "model", (8, 16)),
        ("kind", "unet", "model", "unet"),
        ("source", "3", "model", "3"),
        ("limit", "None", "model", None),
        ("limit", "none", "model", None),
        ("limit", "7", "model", 7),
        ("model.flag", "True", "model", True),
        ("inference.flag", "false", "inference", False),
        ("encoder.steps", "99", "inference", 99),
        ("inference.denoiser.learning_rate", "1e-2", "inference", 1e-2),
    ],
)
def test_a_setting_reaches_its_field(key, text, owner, value):
    before = {"model": Model(), "inference": Inference()}
    after = configure({key: text}, before)
    found = after[owner]
    for part in key.removeprefix(f"{owner}.").split("."):
        found = getattr(found, part)
    assert found == value
    assert type(found) is type(value)
    other = "inference" if owner == "model" else "model"
    assert after[other] == before[other]
    assert before == {"model": Model(), "inference": Inference()}


@pytest.mark.parametrize(
    ("key", "text", "message"),
    [
        ("flag", "true", r"setting flag: ambiguous, write model\.flag or inference\.flag"),
        ("latent", "6", r"setting latent: there is no such setting; did you mean latents"),
        ("encoder.step", "6", r"did you mean encoder\.steps \(int, \d+\)"),
        ("model.encoder.steps", "6", r"no such setting"),
        ("encoder", "6", r"no such setting.*encoder\.steps"),
        ("latents.x", "6", r"no such setting"),
        ("qqqq", "6", r"no such setting; Known: latents, .*denoiser\.patience"),
        ("latents", "six", r"setting latents=six: expected int"),
        ("latents", "6.0", r"expected int"),
        ("latents", "True", r"expected int"),
        ("radius", "wide", r"setting radius=wide: expected float"),
        ("radius", "", r"expected float"),
        ("radius", "9" * 400, r"setting radius=9+: int too large"),
        ("radius", "(" * 9000, r"expected float"),
        ("widths", "8", r"setting widths=8: expected tuple"),
        ("widths", "a,b", r"expected tuple"),
        ("widths", "8,wide", r"expected tuple"),
        ("widths", "8.5,16", r"expected tuple"),
        ("model.flag", "yes", r"expected bool"),
        ("model.flag", "1", r"expected bool"),
        ("limit", "many", r"expected int or None"),
        ("kind", "cnn", r"setting kind=cnn: expected one of mlp, unet"),
        ("encoder.steps", "-4", r"setting encoder\.steps=-4: steps must be positive"),
        ("encoder.ema", "1", r"setting encoder\.ema=1: ema must lie in"),
    ],
)
def test_a_setting_that_is_wrong_is_named(key, text, message):
    with pytest.raises(UserError, match=message):
        configure({key: text}, {"model": Model(), "inference": Inference()})


def test_the_user_has_the_last_word_over_what_a_model_recommends():
    recommended = {
        "encoder.steps": 3000, "encoder.learning_rate": 1, "encoder.patience": None, "flag": False, "both.steps": 7,
    }  # fmt: skip
    model, inference = SimpleNamespace(Config=Model, RECOMMENDED=recommended), SimpleNamespace(Config=Inference)
    found = default_configs(model, inference, {"encoder.steps": "5", "latents": "4"})
    assert found["inference"].encoder == Stage(steps=5, learning_rate=1.0)
    assert found["inference"].flag is False
    assert found["inference"].denoiser == Stage(steps=20)
    assert found["model"] == Model(latents=4)
    assert default_configs(SimpleNamespace(Config=Model), inference, {}) == {"model": Model(), "inference": Inference()}


def test_configurations_come_back_from_json():
    @dataclass(frozen=True)
    class Nested:
        stage: Stage = Stage()
        widths: tuple[int, ...] = ()
        names: dict = field(default_factory=dict)

    values = {"stage": {"steps": 4}, "widths": [1, 2], "names": {"a": 1}}
    assert make_config(Nested, values) == Nested(Stage(steps=4), (1, 2), {"a": 1})
    with pytest.raises(TypeError, match="unexpected"):
        make_config(Nested, {"width": 1})

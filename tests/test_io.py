"""Saved programs: what is written comes back bit for bit, and what does not fit is said by name."""

import json
from pathlib import Path
import shutil

import equinox as eqx
from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
from numpyro import distributions as dist
import pytest
from saved_programs import DATA, PROGRAM_FILE, edit, same, shifted

from sami_ppl.diffusion.denoiser import PreconditionedDenoiser
from sami_ppl.diffusion.schedule import VariancePreserving
from sami_ppl.encoders.affine import AffineEncoder
from sami_ppl.encoders.encoder import DiagonalEncoder
from sami_ppl.nn.flax import FlaxNetwork
from sami_ppl.program.program import Program
from sami_ppl.saving.files import build_program
from sami_ppl.saving.save import FORMAT_VERSION, LoadError, load, load_denoiser, load_networks, save


@pytest.fixture
def saved(tiny_program, tmp_path):
    return save(tiny_program(), tmp_path / "saved")


# Round trips


@pytest.mark.slow
def test_arrays_come_back_bit_for_bit(tiny_program, fill, tmp_path):
    program = fill(tiny_program())
    folder = save(program, tmp_path / "deep" / "saved")
    loaded = load(folder, shifted(program))
    assert same(program, loaded)
    assert not same(program, shifted(program))
    x = jnp.ones(4)
    assert np.array_equal(program.encoder.posterior(x)[0], loaded.encoder.posterior(x)[0])


def test_rotated_encoder(tiny_program, tmp_path):
    program = tiny_program()
    rotation = jnp.asarray([[0.6, 0.8], [-0.8, 0.6]])
    rotated = program.replace(encoder=AffineEncoder(program.encoder, rotation))
    loaded = load(save(rotated, tmp_path / "saved"), program)
    assert isinstance(loaded.encoder, AffineEncoder)
    assert same(rotated, loaded)
    assert same(rotated, load(tmp_path / "saved", shifted(rotated)))


def test_flax_networks(tmp_path):
    class Network(nnx.Module):
        def __init__(self, out, *, rngs):
            self.layer = nnx.Linear(4, out, rngs=rngs)

        def __call__(self, x, log_snr):
            return self.layer(x)

    def build(seed):
        schedule, rngs = VariancePreserving(-4.0, 4.0), nnx.Rngs(seed)
        denoiser = PreconditionedDenoiser(FlaxNetwork(Network(4, rngs=rngs)), schedule, (4,))
        network = FlaxNetwork(Network(3, rngs=rngs))
        return Program(prior, denoiser, DiagonalEncoder(network, schedule, (4,), 2, key=jax.random.key(seed)))

    def prior():
        numpyro.sample("z", dist.Normal(0, 1).expand([2]).to_event(1))

    program, other = build(0), build(1)
    loaded = load(save(program, tmp_path / "saved"), other)
    assert same(program, loaded)
    assert not same(program, other)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("site", "extra"),
    [
        ("pass", 0),
        ('numpyro.sample("size", dist.Beta(2.0, 3.0))', 1),
        ('numpyro.sample("made", made)\n\n    made = dist.Normal(jax.numpy.zeros(()), 2.0)', 1),
    ],
    ids=["normal", "beta", "an array made while it is built"],
)
def test_program_of_a_file_needs_nothing_else(tmp_path, monkeypatch, site, extra):
    source = tmp_path / "source"
    source.mkdir()
    file = source / "vectors.py"
    file.write_text(PROGRAM_FILE.replace("PRIOR", site).replace("EXTRA", str(extra)))
    config = {"latents": 3, "inner": {"depth": 2}}
    program = build_program(file, config, DATA, key=jax.random.key(5))
    save(program, tmp_path / "saved")
    shutil.rmtree(source)
    monkeypatch.chdir(tmp_path)
    moved = shutil.move(tmp_path / "saved", tmp_path / "moved")
    loaded = load(moved)
    assert same(program, loaded)
    assert len(loaded.denoiser.network.blocks) == 2
    assert loaded.latents.axes == program.latents.axes
    for ours, theirs in zip(program.latents.sites, loaded.latents.sites, strict=True):
        assert np.array_equal(ours.shift, theirs.shift)
        assert np.array_equal(ours.scale, theirs.scale)
    # What was loaded is a program of a file again.
    assert same(load(save(loaded, tmp_path / "again")), program)


def test_a_program_saved_again_replaces_the_old_one(tiny_program, saved):
    save(shifted(tiny_program()), saved)
    assert same(load(saved, tiny_program()), shifted(tiny_program()))
    assert [p.name for p in saved.parent.iterdir()] == ["saved"]


def test_nothing_is_pickled(saved):
    assert sorted(p.name for p in saved.iterdir()) == ["arrays.npz", "program.json"]
    with np.load(saved / "arrays.npz", allow_pickle=False) as arrays:
        assert len(arrays.files) > 5
        assert all(arrays[name].dtype.kind == "f" for name in arrays.files)
    assert json.loads((saved / "program.json").read_text())["format"] == "sami_ppl program"


# What cannot be saved is not half saved


def test_a_foreign_folder_is_not_touched(tiny_program, tmp_path):
    (tmp_path / "thesis.tex").write_text("all of it")
    with pytest.raises(FileExistsError, match="something else"):
        save(tiny_program(), tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


def test_what_lies_in_the_folder_of_a_program_is_not_lost(tiny_program, saved):
    (saved / "posterior.nc").write_text("all of it")
    with pytest.raises(
        FileExistsError, match=r"something else than a saved program \(posterior\.nc\): give a new folder"
    ):
        save(shifted(tiny_program()), saved)
    assert (saved / "posterior.nc").read_text() == "all of it"
    assert same(load(saved, tiny_program()), tiny_program())


def test_what_lies_beside_is_not_touched(tiny_program, saved):
    for name in ("saved.old", "saved.part"):
        saved.with_name(name).mkdir()
        (saved.with_name(name) / "thesis.tex").write_text("all of it")
    save(shifted(tiny_program()), saved)
    assert sorted(str(p.relative_to(saved.parent)) for p in saved.parent.glob("*/*.tex")) == [
        "saved.old/thesis.tex",
        "saved.part/thesis.tex",
    ]
    assert len(list(saved.parent.iterdir())) == 3


@pytest.mark.parametrize("fails", ["numpy.savez", "sami_ppl.saving.save._checksum", "pathlib.Path.write_text"])
def test_interrupted_save_leaves_the_old_one(tiny_program, saved, monkeypatch, fails):
    def stop(*arguments, **named):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(fails, stop)
        with pytest.raises(KeyboardInterrupt):
            save(shifted(tiny_program()), saved)
    assert same(load(saved, tiny_program()), tiny_program())
    save(shifted(tiny_program()), saved)
    assert same(load(saved, tiny_program()), shifted(tiny_program()))


@pytest.mark.parametrize("failing", [1, 2], ids=["once", "and the way back too"])
def test_save_interrupted_at_the_last_moment_loses_neither(tiny_program, saved, monkeypatch, failing):
    """Between the two renames: the old program comes back, or, where that is stopped too, both lie beside, whole."""
    replace, calls = Path.replace, []

    def stop(self, target):
        calls.append(self)
        if 1 < len(calls) <= 1 + failing:
            raise KeyboardInterrupt
        return replace(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", stop)
        with pytest.raises(KeyboardInterrupt):
            save(shifted(tiny_program()), saved)
    if failing == 1:
        assert [p.name for p in saved.parent.iterdir()] == ["saved"]
        assert same(load(saved, tiny_program()), tiny_program())
    else:
        (aside,) = saved.parent.iterdir()
        assert same(load(aside / "old", tiny_program()), tiny_program())
        assert same(load(aside / "new" / "saved", tiny_program()), shifted(tiny_program()))


# What cannot be loaded says why


def test_saved_from_python_needs_the_program(saved):
    with pytest.raises(LoadError, match=r"saved from Python.*load\('.*saved', program\)"):
        load(saved)


def test_missing_folder(tiny_program, tmp_path):
    with pytest.raises(LoadError, match=r"nowhere holds no saved program \(no program.json\)"):
        load(tmp_path / "nowhere", tiny_program())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a": 1}', r"program\.json is no sami_ppl program \(format None\)"),
        ('{"format": "other"}', r"no sami_ppl program \(format 'other'\)"),
        ("[1, 2]", r"no sami_ppl program \(format 'list'\)"),
        ('{"format": "sami_ppl pro', r"program\.json is damaged"),
        ("\udcff", r"program\.json is damaged"),
        (f'{{"format": "sami_ppl program", "format_version": {FORMAT_VERSION}}}', r"damaged \(no aligned"),
    ],
)
def test_foreign_or_damaged_description(tiny_program, saved, text, message):
    (saved / "program.json").write_text(text, errors="surrogateescape")
    with pytest.raises(LoadError, match=message):
        load(saved, tiny_program())
    with pytest.raises(LoadError, match=message):
        load_denoiser(saved, tiny_program())


@pytest.mark.parametrize(
    ("version", "advice"),
    [(1, "fit the program again, or load it by what wrote it"), (FORMAT_VERSION + 1, "update it")],
)
def test_another_format_is_refused_by_its_number(tiny_program, saved, version, advice):
    edit(saved, format_version=version, versions={"sami_ppl": "7.0"})
    of = rf"is of format {version}, written by sami_ppl 7\.0; this one, .*, reads format {FORMAT_VERSION}: {advice}"
    for read in (load, load_denoiser, load_networks):
        with pytest.raises(LoadError, match=of):
            read(saved, tiny_program())


def truncate(file):
    file.write_bytes(file.read_bytes()[:-100])


def change(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def put_a_folder(file):
    file.unlink()
    file.mkdir()


@pytest.mark.parametrize("damage", [truncate, change, Path.unlink, put_a_folder])
def test_damaged_arrays(tiny_program, saved, damage):
    damage(saved / "arrays.npz")
    for read in (load, load_denoiser):
        with pytest.raises(LoadError, match=r"arrays\.npz is missing, truncated or changed"):
            read(saved, tiny_program())


def test_folder_instead_of_description(tiny_program, saved):
    put_a_folder(saved / "program.json")
    with pytest.raises(LoadError, match="holds no saved program"):
        load(saved, tiny_program())


def test_damaged_program_file(exact_run, tmp_path):
    folder = shutil.copytree(exact_run / "model", tmp_path / "model")
    text = (folder / "program.py").read_text()
    (folder / "program.py").write_text(text.replace("sp.Program(", "sp.Program(lost, ", 1))
    with pytest.raises(LoadError, match=r"damaged, or fails: .*program\.py, line \d+: NameError: name 'lost'"):
        load(folder)


def test_wrong_shapes_are_named(tiny_program, mlp, saved):
    program = tiny_program()
    wide = mlp(4, 6, key=jax.random.key(0))
    wide = eqx.tree_at(lambda n: (n.inner, n.outer), wide, (jnp.zeros((5, 9)), jnp.zeros((9, 6))))
    other = program.replace(encoder=eqx.tree_at(lambda e: e.network, program.encoder, wide))
    with pytest.raises(LoadError, match=r"\.encoder\.network\.inner: saved \(5, 6\), expected \(5, 9\)"):
        load(saved, other)


def test_arrays_too_many_or_too_few_are_named(tiny_program, saved):
    variance = tiny_program(noise="variance")
    with pytest.raises(LoadError, match=r"\.encoder\.embed.*: saved not at all, expected \(64"):
        load(saved, variance)
    with pytest.raises(LoadError, match=r"\.encoder\.embed.*: saved \(64.*\), expected none"):
        load(save(variance, saved.with_name("variance")), tiny_program())


def test_other_latents_are_named(tiny_program, saved):
    def prior():
        numpyro.sample("height", dist.Normal(0.0, 1.0).expand([2]).to_event(1))

    with pytest.raises(LoadError, match=r"latent sites \{'z': \[2\]\}, this one has \{'height': \[2\]\}"):
        load(saved, tiny_program(prior))

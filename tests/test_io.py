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

from sami_ppl.denoiser import PreconditionedDenoiser
from sami_ppl.encoder import DiagonalEncoder, RotatedEncoder
from sami_ppl.io import LoadError, load, load_denoiser, load_networks, save
from sami_ppl.nn.flax import FlaxNetwork
from sami_ppl.program import Program
from sami_ppl.programs import build_program
from sami_ppl.sampler import Heun, StochasticDPMSolver
from sami_ppl.schedule import VarianceExploding, VariancePreserving

PROGRAM_FILE = '''
"""Vectors: a small program with a bounded factor."""

from dataclasses import dataclass

import jax
import numpyro
from numpyro import distributions as dist

from sami_ppl import DiagonalEncoder, PreconditionedDenoiser, Program, VariancePreserving
from sami_ppl.nn import ResidualMLP


@dataclass(frozen=True)
class Inner:
    depth: int = 1


@dataclass(frozen=True)
class Config:
    latents: int = 2
    shape: tuple[int, ...] = (4,)
    inner: Inner = Inner()


def make_prior(latents):
    def prior():
        numpyro.sample("z", dist.Normal(0, 1).expand([latents]).to_event(1))
        PRIOR

    return prior


def build(config, *, key):
    keys = jax.random.split(key, 3)
    schedule, size, shape = VariancePreserving(-4.0, 4.0), {"width": 4, "depth": config.inner.depth}, config.shape
    denoiser = PreconditionedDenoiser(ResidualMLP(shape, shape, **size, key=keys[0]), schedule, shape)
    network = ResidualMLP(shape, (3,), **size, key=keys[1])
    encoder = DiagonalEncoder(network, schedule, shape, config.latents + EXTRA, key=keys[2])
    return Program(make_prior(config.latents), denoiser, encoder)
'''


def leaves(tree):
    return [np.asarray(leaf) for leaf in jax.tree.leaves(eqx.filter(tree, eqx.is_array))]


def same(a, b):
    pairs = list(zip(leaves(a), leaves(b), strict=True))
    return bool(pairs) and all(np.array_equal(u, v) and u.dtype == v.dtype for u, v in pairs)


def shifted(program):
    """The same structure with other arrays."""
    return jax.tree.map(lambda a: a + 1 if eqx.is_inexact_array(a) else a, program)


@pytest.fixture
def saved(tiny_program, tmp_path):
    return save(tiny_program(), tmp_path / "saved")


def edit(folder, **changes):
    file = folder / "program.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


# Round trips


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
    rotated = program.replace(encoder=RotatedEncoder(program.encoder, rotation))
    loaded = load(save(rotated, tmp_path / "saved"), program)
    assert isinstance(loaded.encoder, RotatedEncoder)
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
    config = {"latents": 3, "shape": [4], "inner": {"depth": 2}}
    program = build_program(file, config, key=jax.random.key(5))
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


@pytest.mark.parametrize("fails", ["numpy.savez", "sami_ppl.io._checksum", "pathlib.Path.write_text"])
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
    rename, calls = Path.rename, []

    def stop(self, target):
        calls.append(self)
        if 1 < len(calls) <= 1 + failing:
            raise KeyboardInterrupt
        return rename(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", stop)
        with pytest.raises(KeyboardInterrupt):
            save(shifted(tiny_program()), saved)
    if failing == 1:
        assert [p.name for p in saved.parent.iterdir()] == ["saved"]
        assert same(load(saved, tiny_program()), tiny_program())
    else:
        (aside,) = saved.parent.iterdir()
        assert same(load(aside / "old", tiny_program()), tiny_program())
        assert same(load(aside / "new", tiny_program()), shifted(tiny_program()))


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
        ('{"format": "sami_ppl program", "format_version": 1}', r"damaged \(no aligned"),
    ],
)
def test_foreign_or_damaged_description(tiny_program, saved, text, message):
    (saved / "program.json").write_text(text, errors="surrogateescape")
    with pytest.raises(LoadError, match=message):
        load(saved, tiny_program())
    with pytest.raises(LoadError, match=message):
        load_denoiser(saved, tiny_program())


def test_newer_format(tiny_program, saved):
    edit(saved, format_version=99, versions={"sami_ppl": "7.0"})
    with pytest.raises(LoadError, match=r"written by sami_ppl 7\.0 in a newer format: update"):
        load(saved, tiny_program())


def truncate(file):
    file.write_bytes(file.read_bytes()[:-100])


def change(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize("damage", [truncate, change, Path.unlink])
def test_damaged_arrays(tiny_program, saved, damage):
    damage(saved / "arrays.npz")
    for read in (load, load_denoiser):
        with pytest.raises(LoadError, match=r"arrays\.npz is missing, truncated or changed"):
            read(saved, tiny_program())


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


# What is built is what was saved


def vectors(folder, *, latents=2, site="pass"):
    """The program of a file, and that file."""
    file = folder / "vectors.py"
    file.write_text(PROGRAM_FILE.replace("PRIOR", site).replace("EXTRA", "0"))
    return build_program(file, {"latents": latents}, key=jax.random.key(5))


def with_static(module, **values):
    """A copy of a module with other static fields."""
    copy = jax.tree.map(lambda leaf: leaf, module)
    for name, value in values.items():
        object.__setattr__(copy, name, value)
    return copy


def prior_of(law):
    return lambda: numpyro.sample("z", law.to_event(1))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"prior": prior_of(dist.Laplace(0.0, 1.0).expand([2]))},
            r"sites\.z\.law\.kind = 'Laplace', this program has 'Normal': build .* call load\('.*saved', program\)",
        ),
        ({"prior": prior_of(dist.Normal(0.0, 2.0).expand([2]))}, r"sites\.z\.law\.scale.* = 2\.0, .* has 1\.0"),
        ({"prior": prior_of(dist.Uniform(-1.0, 1.0).expand([2]))}, r"sites\.z\.law\.kind = 'Uniform'"),
        ({"sampler": Heun(11)}, r"sampler\.kind = 'Heun', this program has 'StochasticDPMSolver'"),
        ({"sampler": StochasticDPMSolver(7)}, r"sampler\.evaluations = 7, this program has 20"),
        ({"global_guide": "full"}, r"global_guide = 'full', this program has 'diagonal'"),
        ({"event_dims": ("pixel",)}, r"event_dims\[0\] = 'pixel', this program has 'feature'"),
    ],
)
def test_a_program_that_its_file_does_not_build_is_said(tmp_path, changes, message):
    """Nor is it built from other Python; the program itself is what fits."""
    file = vectors(tmp_path)
    program = file.replace(**changes)
    save(program, tmp_path / "saved")
    for arguments in ((), (file,)):
        with pytest.raises(LoadError, match=message):
            load(tmp_path / "saved", *arguments)
    assert same(load(tmp_path / "saved", program), program)


def test_networks_with_other_settings_are_said(tmp_path):
    program = vectors(tmp_path)
    wide = VariancePreserving(-9.0, 9.0)
    for changes, message in (
        (
            {name: with_static(getattr(program, name), schedule=wide) for name in ("denoiser", "encoder")},
            r"denoiser\.schedule\.log_snr_min = -9\.0, this program has -4\.0",
        ),
        ({"encoder": with_static(program.encoder, min_scale=0.5)}, r"encoder\.min_scale = 0\.5, .* has 0\.03"),
    ):
        save(program.replace(**changes), tmp_path / "saved")
        with pytest.raises(LoadError, match=message):
            load(tmp_path / "saved")
        load(tmp_path / "saved", program.replace(**changes))


def test_units_and_weights_of_training_come_back(tmp_path):
    """Exactly: no float is rounded on the way."""
    program = vectors(tmp_path)
    third = {"mean": -1 / 3, "std": 0.1 + 0.2}
    changed = program.replace(
        denoiser=with_static(program.denoiser, predict="noise", **third),
        encoder=with_static(program.encoder, mean=np.float32(0.7), std=2.0),
        denoiser_loss="own",
        discount=0.25,
    )
    loaded = load(save(changed, tmp_path / "saved"))
    assert eqx.tree_equal(loaded.denoiser, changed.denoiser)
    assert (loaded.denoiser.mean, loaded.denoiser.std, loaded.denoiser.predict) == (-1 / 3, 0.1 + 0.2, "noise")
    assert (loaded.encoder.mean, loaded.encoder.std) == (float(np.float32(0.7)), 2.0)
    assert (loaded.denoiser_loss, loaded.discount) == ("own", 0.25)


def test_other_global_sites_and_variables_are_said(tiny_program, tmp_path):
    def hierarchical(width):
        def prior(obs, u):
            scale = numpyro.sample("scale", dist.HalfNormal(width))
            with obs:
                numpyro.sample("z", dist.Normal(u[:, None] * jnp.ones(2), scale).to_event(1))

        return prior

    def build(width, u):
        encoder = tiny_program().encoder
        return Program(hierarchical(width), tiny_program().denoiser, encoder, given={"u": np.array(u)})

    folder = save(build(1.0, [0.0, 1.0]), tmp_path / "saved")
    assert same(load(folder, build(1.0, [0.0, 1.0])), build(1.0, [0.0, 1.0]))
    with pytest.raises(LoadError, match=r"sites\.scale\.law\..*scale = 1\.0, this program has 3\.0"):
        load(folder, build(3.0, [0.0, 1.0]))
    with pytest.raises(LoadError, match=r"given\.u\[1\] = 0\.5, this program has 1\.0"):
        load(folder, build(1.0, [0.0, 2.0]))


def test_a_file_without_a_description_of_its_program_is_read(tmp_path):
    """As they were written before: nothing is compared."""
    program = vectors(tmp_path)
    folder = save(program, tmp_path / "saved")
    description = json.loads((folder / "program.json").read_text())
    del description["program"]
    (folder / "program.json").write_text(json.dumps(description))
    assert same(load(folder), program)
    assert same(load(folder, shifted(program).replace(sampler=Heun(11))), program)
    other = program.replace(denoiser=with_static(shifted(program.denoiser), mean=1.0, std=2.0))
    found = load_denoiser(folder, other)
    assert eqx.tree_equal(found.denoiser, program.denoiser), "as its program file builds it"


def test_a_program_is_saved_again_where_its_file_was_run(tmp_path):
    """Running it leaves bytecode in the folder."""
    program = vectors(tmp_path)
    folder = save(program, tmp_path / "saved")
    (folder / "__pycache__").mkdir(exist_ok=True)
    assert same(load(save(load(folder), folder)), program)


# Networks alone


def test_denoiser_of_a_program_with_other_latents(tiny_program, saved):
    def prior():
        numpyro.sample("height", dist.Normal(0.0, 1.0).expand([3]).to_event(1))

    keys = jax.random.split(jax.random.key(9))
    base = tiny_program()
    encoder = DiagonalEncoder(base.encoder.network, base.encoder.schedule, (4,), 3, key=keys[0])
    program = Program(prior, shifted(base.denoiser), encoder)
    found = load_denoiser(saved, program)
    assert same(found.denoiser, base.denoiser)
    assert not same(program.denoiser, base.denoiser)
    assert same(found.encoder, program.encoder)
    assert found.latents.axes == program.latents.axes


def test_denoiser_of_another_structure_is_refused(tiny_program, mlp, saved):
    program = tiny_program()
    denoiser = PreconditionedDenoiser(mlp(3, 3, key=jax.random.key(0)), program.denoiser.schedule, (3,))
    encoder = DiagonalEncoder(mlp(3, 6, key=jax.random.key(0)), denoiser.schedule, (3,), 2, key=jax.random.key(0))
    with pytest.raises(LoadError, match=r"\.denoiser\.network\.inner: saved \(5, 6\), expected \(4, 6\)"):
        load_denoiser(saved, Program(program.prior, denoiser, encoder))


def with_units(program, mean, std):
    """The program for data of this mean and standard deviation."""
    units = {"mean": mean, "std": std}
    return program.replace(
        denoiser=with_static(program.denoiser, **units), encoder=with_static(program.encoder, **units)
    )


def test_a_denoiser_keeps_the_units_of_its_data(tmp_path, fill):
    """As it denoised, it denoises; those of the encoder are the new program's, and both are loaded again."""
    fitted, new = with_units(fill(vectors(tmp_path)), -0.5, 0.3), with_units(vectors(tmp_path), 2.0, 4.0)
    found = load_denoiser(save(fitted, tmp_path / "fitted"), new)
    x, log_snr = jnp.array([0.3, -1.0, 0.5, 2.0]), jnp.array(0.5)
    np.testing.assert_array_equal(found.denoiser.x_hat(x, log_snr), fitted.denoiser.x_hat(x, log_snr))
    assert not np.allclose(with_units(fitted, 2.0, 4.0).denoiser.x_hat(x, log_snr), fitted.denoiser.x_hat(x, log_snr))
    assert (found.encoder.mean, found.encoder.std) == (2.0, 4.0)
    again = load(save(found, tmp_path / "again"))
    assert eqx.tree_equal((again.denoiser, again.encoder), (found.denoiser, found.encoder))


def test_networks_of_a_program_with_another_prior(tmp_path, fill):
    fitted = with_units(fill(vectors(tmp_path)), -0.5, 0.3)
    rotated = fitted.replace(encoder=RotatedEncoder(fitted.encoder, jnp.asarray([[0.6, 0.8], [-0.8, 0.6]])))
    new = with_units(vectors(tmp_path), 2.0, 4.0).replace(prior=prior_of(dist.Laplace(0.0, 1.0).expand([2])))
    for program in (fitted, rotated):
        found = load_networks(save(program, tmp_path / "fitted"), new)
        assert eqx.tree_equal((found.denoiser, found.encoder), (program.denoiser, program.encoder))
        assert found.latents.sites[0].law["kind"] == "Laplace"
        again = load(save(found, tmp_path / "again"), new)
        assert eqx.tree_equal((again.denoiser, again.encoder), (found.denoiser, found.encoder))


def test_networks_of_another_schedule_or_kind_are_refused(tiny_program, tmp_path):
    program = vectors(tmp_path)
    folder = save(program, tmp_path / "saved")
    wide = VariancePreserving(-4.0, 9.0)
    networks = {name: with_static(getattr(program, name), schedule=wide) for name in ("denoiser", "encoder")}
    exploding = {name: with_static(getattr(program, name), schedule=VarianceExploding(-4.0, 4.0)) for name in networks}

    class Other(PreconditionedDenoiser):
        """A denoiser with the same arrays."""

    denoiser = program.denoiser
    other = Other(denoiser.network, denoiser.schedule, denoiser.event_shape)
    for changes, message in (
        (
            networks,
            r"denoiser\.schedule\.log_snr_max = 4\.0, this program has 9\.0: build the program with the settings",
        ),
        (exploding, r"denoiser\.schedule\.kind = 'VariancePreserving', this program has 'VarianceExploding'"),
        ({"denoiser": other}, r"denoiser\.kind = 'PreconditionedDenoiser', this program has 'Other'"),
    ):
        for read in (load_denoiser, load_networks):
            with pytest.raises(LoadError, match=message):
                read(folder, program.replace(**changes))

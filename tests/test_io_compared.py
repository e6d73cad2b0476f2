"""Saved programs: what is built, or reused, is compared with what was saved."""

import json

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
from numpyro import distributions as dist
import pytest
from saved_programs import DATA, PROGRAM_FILE, same, shifted

from sami_ppl.diffusion.denoiser import PreconditionedDenoiser
from sami_ppl.diffusion.sampler import Heun, StochasticDPMSolver
from sami_ppl.diffusion.schedule import VarianceExploding, VariancePreserving
from sami_ppl.encoders.affine import AffineEncoder
from sami_ppl.encoders.encoder import DiagonalEncoder
from sami_ppl.program.program import Program
from sami_ppl.saving.files import build_program
from sami_ppl.saving.save import LoadError, load, load_denoiser, load_networks, save


@pytest.fixture
def saved(tiny_program, tmp_path):
    return save(tiny_program(), tmp_path / "saved")


# What is built is what was saved


def vectors(folder, *, latents=2, site="pass"):
    """The program of a file, and that file."""
    file = folder / "vectors.py"
    file.write_text(PROGRAM_FILE.replace("PRIOR", site).replace("EXTRA", "0"))
    return build_program(file, {"latents": latents}, DATA, key=jax.random.key(5))


def with_static(module, **values):
    """A copy of a module with other static fields."""
    copy = jax.tree.map(lambda leaf: leaf, module)
    for name, value in values.items():
        object.__setattr__(copy, name, value)
    return copy


def prior_of(law):
    return lambda: numpyro.sample("z", law.to_event(1))


@pytest.mark.slow
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


@pytest.mark.slow
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


def test_units_of_the_networks_come_back(tmp_path):
    """Exactly: no float is rounded on the way."""
    program = vectors(tmp_path)
    third = {"mean": -1 / 3, "std": 0.1 + 0.2}
    changed = program.replace(
        denoiser=with_static(program.denoiser, predict="noise", **third),
        encoder=with_static(program.encoder, mean=np.float32(0.7), std=2.0),
    )
    loaded = load(save(changed, tmp_path / "saved"))
    assert eqx.tree_equal(loaded.denoiser, changed.denoiser)
    assert (loaded.denoiser.mean, loaded.denoiser.std, loaded.denoiser.predict) == (-1 / 3, 0.1 + 0.2, "noise")
    assert (loaded.encoder.mean, loaded.encoder.std) == (float(np.float32(0.7)), 2.0)
    assert "denoiser_loss" not in (tmp_path / "saved" / "program.json").read_text(), "nothing of training is saved"


@pytest.mark.slow
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


def test_a_file_without_a_description_of_its_program_is_refused(tmp_path):
    """Nothing could be compared."""
    folder = save(vectors(tmp_path), tmp_path / "saved")
    description = json.loads((folder / "program.json").read_text())
    del description["program"]
    (folder / "program.json").write_text(json.dumps(description))
    with pytest.raises(LoadError, match=r"damaged \(no program\)"):
        load(folder)


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


@pytest.mark.slow
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
    rotated = fitted.replace(encoder=AffineEncoder(fitted.encoder, jnp.asarray([[0.6, 0.8], [-0.8, 0.6]])))
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

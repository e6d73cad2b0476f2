"""Programs, latents and sites print as short tables, whatever they hold."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
from numpyro import distributions as dist
import pytest

import sami_ppl as sp
from sami_ppl import families
from sami_ppl.evidence.elbo import LatentDraw
from sami_ppl.nn import ResidualMLP

KEY = jax.random.key(0)
SHAPE, SCHEDULE = (5,), sp.VariancePreserving(-4.0, 5.0)
X = np.random.default_rng(0).standard_normal((20, 5)).astype(np.float32)


def prior():
    rate = numpyro.param("rate", 1.0)
    numpyro.sample("place", dist.Normal(0, rate).expand([2]).to_event(1), infer={"event_dims": ["axis"]})
    numpyro.sample("light", dist.Beta(2.0, 2.0))


@pytest.fixture(scope="module")
def program():
    network = ResidualMLP(SHAPE, SHAPE, width=8, depth=2, key=KEY)
    trunk = ResidualMLP(SHAPE, (6,), width=8, depth=2, key=KEY)
    encoder = sp.encoder_for(prior, trunk, SCHEDULE, SHAPE, families={"place": families.Full}, key=KEY)
    return sp.Program(prior, sp.PreconditionedDenoiser(network, SCHEDULE, SHAPE), encoder, sampler=sp.DDIM(3))


def row(text, start):
    (found,) = [line.split() for line in text.splitlines() if line.split()[:1] == [start]]
    return found


@pytest.mark.slow
def test_a_program_prints_as_a_short_table(program):
    text = repr(program)
    assert len(text.splitlines()) <= 20
    assert max(map(len, text.splitlines())) <= 120
    assert row(text, "place") == ["place", "Normal", "2", "axis", "Full", "0–1"]
    assert row(text, "light") == ["light", "Beta", "scalar", "Diagonal", "2"]
    count = sum(a.size for a in jax.tree.leaves(eqx.filter(program.denoiser, eqx.is_inexact_array)))
    assert f"PreconditionedDenoiser of ResidualMLP, {count:,} parameters" in text
    for part in ("log-SNR -4 to 5", "DDIM, 3 evaluations", "Program of 5 (feature), 3 axes of z", "rate"):
        assert part in text


@pytest.mark.slow
def test_it_says_what_was_never_fitted(program):
    assert "never: denoiser, encoder" in repr(program)
    moved = jax.tree.map(lambda leaf: leaf + 0.01 if eqx.is_inexact_array(leaf) else leaf, program.denoiser)
    assert row(repr(program.replace(denoiser=moved)), "fitted") == ["fitted", "never:", "encoder"]


@pytest.mark.slow
def test_describe_says_more(program):
    text = program.describe()
    assert text.startswith(repr(program))
    for part in ("from unconstrained space", "the encoder sees noise as 'full'", "global guide", "built in Python"):
        assert part in text
        assert part not in repr(program)


def test_layers_can_still_be_printed(program):
    assert "Linear(" in eqx.tree_pformat(program)
    assert "Linear(" not in repr(program)


def test_what_holds_no_numbers_prints_too(program):
    """JAX prints programs in its errors."""
    texts = [repr(eqx.filter(program, False)), repr(eqx.filter_eval_shape(lambda p: p, program))]
    jax.jit(lambda leaf: texts.append(repr(eqx.tree_at(lambda p: p.prior_params["rate"], program, leaf))))(1.0)
    assert len(texts) == 3
    assert all(text.startswith("Program(") for text in texts)


def test_notebooks_get_the_same_escaped(program):
    marked = program.replace(event_dims=("<b>",))
    assert "&lt;b&gt;" in marked._repr_html_()
    assert "<b>" not in marked._repr_html_()
    assert "<pre" in program.latents._repr_html_()


def test_latents_and_sites_print_short(program):
    assert repr(program.latents.sites[1]).startswith("Euclidean('light', scalar, Beta, ")
    assert repr(program.latents).splitlines()[0] == "Latents of 2 sites, 3 axes of z"
    assert "place" in repr(program.latents)
    assert len(repr(program.latents).splitlines()) == 4


@pytest.mark.slow
def test_of_many_sites_the_first_are_listed(program):
    def many():
        for i in range(30):
            numpyro.sample(f"site{i}", dist.Normal(0, 1))

    trunk = ResidualMLP(SHAPE, (6,), width=8, depth=2, key=KEY)
    encoder = sp.encoder_for(many, trunk, SCHEDULE, SHAPE, key=KEY)
    wide = sp.Program(many, program.denoiser, encoder)
    assert len(repr(wide).splitlines()) <= 20
    assert "22 more sites" in repr(wide)
    assert "site29" in wide.describe()


def test_results_print_as_short_tables(program):
    """Arrays by shape and range, a program by its first line; what is traced by its shape."""
    found = sp.align(sp.Program(sp.factors(z=dist.Normal(0, 1).expand([2])), program.denoiser, diagonal()), X)
    lines = repr(found).splitlines()
    assert lines[0] == "Alignment"
    assert row(repr(found), "program")[:3] == ["program", "Program", "of"]
    assert "matrix         float64 (2, 2), mean" in repr(found)
    assert len(lines) == 6
    assert found._repr_html_().startswith("<pre")
    draw = LatentDraw({"z": np.ones(2), "none": np.ones(0)}, jnp.ones((1, 2)), None, "text", {})
    assert row(repr(draw), "values[z]") == ["values[z]", "float64", "(2,),", "mean", "1,", "1", "to", "1"]
    assert row(repr(draw), "values[none]")[1:] == ["float64", "(0,)"]
    seen = []
    jax.make_jaxpr(lambda z: seen.append(repr(draw._replace(z=z))))(jnp.ones(3))
    assert row(seen[0], "z") == ["z", "float32", "(3,)"]


def diagonal():
    trunk = ResidualMLP(SHAPE, (6,), width=8, depth=1, key=KEY)
    return sp.DiagonalEncoder(trunk, SCHEDULE, SHAPE, 2, key=KEY)

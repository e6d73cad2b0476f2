"""Samples from codes, images, the prior and the denoiser alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sami_ppl import DDIM, decode, generate
from sami_ppl.posteriors.generate import CHUNK


@pytest.mark.slow
def test_equal_keys_and_codes_give_equal_samples_in_any_chunk(tiny_program):
    """A sample is a function of its key and code: padding and chunks do not show."""
    program = tiny_program()
    z = jax.random.normal(jax.random.key(0), (CHUNK + 3, program.latents.size))
    keys = jax.random.split(jax.random.key(1), len(z))
    all_at_once = decode(program, z, keys)
    assert all_at_once.shape == (CHUNK + 3, *program.event_shape)
    last = decode(program, z[-3:], keys[-3:])
    np.testing.assert_allclose(all_at_once[-3:], last, rtol=2e-4, atol=2e-4)
    assert not np.allclose(all_at_once[0], all_at_once[1])


@pytest.mark.slow
def test_each_way_of_asking(tiny_program):
    """Codes, images, a number of draws from the prior, a number of draws without guidance; another sampler."""
    program = tiny_program()
    key = jax.random.key(2)
    x = jax.random.normal(key, (4, *program.event_shape))
    z = jnp.zeros((4, program.latents.size))
    for arguments in ({"z": z}, {"x": x}, {"size": 4}, {"size": 4, "guided": False}):
        out = generate(program, key=key, sampler=DDIM(3), **arguments)
        assert out.shape == (4, *program.event_shape)
        assert np.isfinite(out).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "exactly one of z"),
        ({"size": 2, "z": jnp.zeros((2, 3))}, "exactly one of z"),
        ({"z": jnp.zeros((2, 99))}, r"z must have shape \(n, "),
        ({"z": jnp.zeros((2, 3)), "guided": False}, "guided=False samples the denoiser alone"),
    ],
)
def test_bad_requests(tiny_program, arguments, message):
    """The message says what to give."""
    with pytest.raises(ValueError, match=message):
        generate(tiny_program(), key=jax.random.key(0), **arguments)


def test_one_key_per_code(tiny_program):
    program = tiny_program()
    with pytest.raises(ValueError, match=r"keys must be one per code, \(3,\), got \(5,\)"):
        decode(program, jnp.zeros((3, program.latents.size)), jax.random.split(jax.random.key(0), 5))

"""Fixtures shared by all tests: strict JAX modes, float64, a tiny program, the linear-Gaussian oracle."""

from collections.abc import Callable
import contextlib
from dataclasses import asdict, dataclass
import functools
import json
import os
from pathlib import Path
import sys

# Compiling is most of what the tests do. What is compiled is kept on disk, the many small programs too, and found by
# other modules, other workers, processes that tests start, and the next run; set before JAX reads it.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parents[1] / ".pytest_cache" / "compiled"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
from numpyro import distributions as dist
import pytest
from two_priors import PRIORS

from sami_ppl._util.maps import forget_if_many
from sami_ppl.diffusion.denoiser import GaussianDenoiser, PreconditionedDenoiser
from sami_ppl.diffusion.sampler import DDIM
from sami_ppl.diffusion.schedule import AbstractSchedule, VariancePreserving
from sami_ppl.encoders.encoder import AbstractEncoder, DiagonalEncoder, encoder_for
from sami_ppl.encoders.law import DiagonalLaw
from sami_ppl.posteriors import save_tree
from sami_ppl.priors.read import read_prior
from sami_ppl.program.program import Program
from sami_ppl.runs import cli
from sami_ppl.runs import run as running
from sami_ppl.saving import files as programs
from sami_ppl.saving import save as io

# These tests compile much and compute little: XLA's optimisations cost more than they save.
jax.config.update("jax_disable_most_optimizations", True)


# Files that take longest, first: workers take whole files, and what begins last should be short.
LONGEST = (
    "prior_runs", "docs", "negative_controls", "cli_runs", "cli", "comparing", "evaluating", "families", "readme",
    "sequences", "prior_oracles", "packaging", "evidence", "discrete", "parallel", "calibrating", "front_door",
    "refinement",
)  # fmt: skip


def pytest_collection_modifyitems(items):
    places = {f"test_{name}.py": place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.name, len(places)))


@pytest.fixture(autouse=True)
def forget_what_was_compiled():
    """Some files compile more than a process may hold."""
    yield
    forget_if_many(0.3)


@pytest.fixture(autouse=True, scope="module")
def forget_at_the_end():
    """What one file compiles, another seldom needs."""
    yield
    jax.clear_caches()


@pytest.fixture
def strict():
    """No implicit rank or dtype promotion. NumPyro itself relies on both, so this is for our own pure functions."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(jax.numpy_rank_promotion("raise"))
        stack.enter_context(jax.numpy_dtype_promotion("strict"))
        yield


@pytest.fixture(scope="session")
def exact_run(tmp_path_factory):
    """The folder of a run that needed no fit: linear-Gaussian data, 400 of them, and the exact networks."""
    out = tmp_path_factory.mktemp("exact") / "run"
    file = programs.find("linear_gaussian", "models")
    module = programs.load_file(file)
    config = module.Config(observations=400, networks="exact")
    data = module.load(config, key=jax.random.key(0))
    program = programs.build_program(file, config, data, key=jax.random.key(0))
    io.save(program, out / "model")
    description = {"seed": 0, "data": None, "settings": {"model": asdict(config)}}
    (out / "config.json").write_text(json.dumps(description))
    save_tree(
        program.posterior(data.isel(obs=slice(3)), key=jax.random.key(1), draws=8, levels=8), out / "posterior.nc"
    )
    samples = {"mse_own": 0.3, "mse_other": 2.0, "mse_mean_image": 1.0}
    metrics = {"kl_nats": dict.fromkeys(program.latents.axes, 1.0), "z_gain": 9.0, "samples": samples, "warnings": []}
    (out / "metrics.json").write_text(json.dumps(metrics))
    return out


@pytest.fixture
def sami(monkeypatch, capsys, tmp_path):
    """`sami(*arguments)` in an empty folder: exit code, stdout, stderr.

    The compilation cache is for users: nothing is written into their folder here, no setting stays behind.
    """
    monkeypatch.setattr(running, "use_compilation_cache", lambda: None)
    monkeypatch.delenv("SAMI_TRACE", raising=False)
    monkeypatch.chdir(tmp_path)

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["sami", *map(str, arguments)])
        try:
            code = cli.main() or 0
        except SystemExit as stop:
            code = stop.code or 0
        out, err = capsys.readouterr()
        return code, out, err

    return call


@pytest.fixture
def x64():
    """Double precision. Build arrays inside the test: those made before stay in single precision."""
    with jax.enable_x64(True):
        yield


@dataclass
class Counter:
    """A function that counts its calls; under `jax.jit`, its traces."""

    function: Callable
    calls: int = 0

    def __call__(self, *args, **kwargs):
        self.calls += 1
        return self.function(*args, **kwargs)


@pytest.fixture
def counted():
    """`counted(f)` is f with `.calls`, the number of times it was called: traced, where it is jitted."""
    return Counter


class ExactEncoder(AbstractEncoder):
    """q(z | x_λ) = p(z | x_λ) of z ~ N(0, I), x = Wz + N(0, s₀² I) with WᵀW diagonal.

    x_λ = αWz + N(0, vI) with v = α²s₀² + σ², so that posterior precision is I + α²WᵀW/v, its mean α Wᵀx_λ/v over it.
    """

    weights: jax.Array
    noise_variance: float
    schedule: AbstractSchedule

    @property
    def event_shape(self):
        return self.weights.shape[:1]

    @property
    def latent_size(self):
        return self.weights.shape[1]

    def parameters(self, x_noisy, log_snr):
        alpha, sigma = self.schedule.alpha(log_snr), self.schedule.sigma(log_snr)
        variance = alpha**2 * self.noise_variance + sigma**2
        precision = 1 + alpha**2 * jnp.sum(self.weights**2, 0) / variance
        return alpha * (self.weights.T @ x_noisy) / variance / precision, precision**-0.5

    def distribution(self, parameters):
        return DiagonalLaw(*parameters)


@dataclass(frozen=True)
class Oracle:
    """z ~ N(0, I₂), x = Wz + N(0, s₀² I₆): score, posterior, evidence and information are all known."""

    schedule: AbstractSchedule
    noise_variance: float = 0.3

    @functools.cached_property
    def weights(self) -> np.ndarray:
        orthonormal = np.linalg.qr(np.random.default_rng(0).normal(size=(6, 2)))[0]
        return orthonormal * np.array([1.5, 0.8])

    @property
    def cov(self) -> np.ndarray:
        """Covariance of x."""
        return self.weights @ self.weights.T + self.noise_variance * np.eye(6)

    @property
    def denoiser(self) -> GaussianDenoiser:
        return GaussianDenoiser(jnp.zeros(6), jnp.asarray(self.cov, jnp.result_type(float)), self.schedule)

    @property
    def encoder(self) -> ExactEncoder:
        return ExactEncoder(jnp.asarray(self.weights, jnp.result_type(float)), self.noise_variance, self.schedule)


@pytest.fixture
def oracle():
    """`oracle(schedule)`: the linear-Gaussian oracle, in the precision of the test."""
    return Oracle


@pytest.fixture
def exact_encoder():
    """The class of the oracle's encoder, for tests that break it on purpose."""
    return ExactEncoder


def normal_prior():
    numpyro.sample("z", dist.Normal(0.0, 1.0).expand([2]).to_event(1))


class MLP(eqx.Module):
    """One hidden layer on (x, λ), λ left out where it is None: every derivative is there, and it compiles quickly."""

    inner: jax.Array
    outer: jax.Array

    def __init__(self, size: int, out: int, *, key):
        inner_key, outer_key = jax.random.split(key)
        self.inner = jax.random.normal(inner_key, (size + 1, 6)) * size**-0.5
        self.outer = jax.random.normal(outer_key, (6, out)) * 0.4

    def __call__(self, x, log_snr):
        inputs = jnp.append(x, jnp.zeros((), x.dtype) if log_snr is None else 0.2 * log_snr)
        return jnp.tanh(inputs @ self.inner) @ self.outer


@pytest.fixture
def mlp():
    """`mlp(size, out, key=key)`: a network quick to compile."""
    return MLP


@pytest.fixture
def tiny_program():
    """`tiny_program(prior)`: denoiser and diagonal encoder on MLPs for vectors of 4, quick to compile."""

    def build(prior=normal_prior, *, noise="full", **changes) -> Program:
        keys = jax.random.split(jax.random.key(7), 3)
        schedule = VariancePreserving(-4.0, 4.0)
        denoiser = PreconditionedDenoiser(MLP(4, 4, key=keys[0]), schedule, (4,))
        network = MLP(4, 6, key=keys[1])
        encoder = DiagonalEncoder(network, schedule, (4,), read_prior(prior).size, noise=noise, key=keys[2])
        return Program(prior, denoiser, encoder, **{"sampler": DDIM(6), **changes})

    return build


@pytest.fixture(scope="module")
def built():
    """Programs built once for a module."""
    return {}


@pytest.fixture
def program(built, tiny_program):
    """`program(name)`: the tiny program on one of the two priors."""

    def get(name="gaussian"):
        if name not in built:
            built[name] = tiny_program(PRIORS[name])
        return built[name]

    return get


def fill(network, size=0.2):
    """The network with noise added to every array leaf: zero-initialised layers hide dependence on λ and on weights."""
    rng = np.random.default_rng(0)
    add = lambda leaf: leaf + jnp.asarray(size * rng.normal(size=leaf.shape), leaf.dtype)  # noqa: E731
    return jax.tree.map(lambda leaf: add(leaf) if eqx.is_inexact_array(leaf) else leaf, network)


@pytest.fixture(name="fill")
def fill_fixture():
    """`fill(network)`: random values in every array leaf."""
    return fill


def cubature(size: int) -> np.ndarray:
    """2n points ±√n eᵢ: their mean of f is E f(N(0, I)) exactly, for every f of degree at most 3."""
    return np.sqrt(size) * np.concatenate([np.eye(size), -np.eye(size)])


@pytest.fixture(name="cubature")
def cubature_fixture():
    """`cubature(n)`: 2n points with which Gaussian expectations of quadratic functions are exact."""
    return cubature


@pytest.fixture
def quadrature():
    """`quadrature(low, high)`: λ and weights of a composite Gauss-Legendre rule, exact here to float64."""

    def rule(low: float, high: float, pieces: int = 12, order: int = 10) -> tuple[np.ndarray, np.ndarray]:
        nodes, weights = np.polynomial.legendre.leggauss(order)
        edges = np.linspace(low, high, pieces + 1)
        half = 0.5 * np.diff(edges)[:, None]
        return (edges[:-1, None] + half * (nodes + 1)).ravel(), (half * weights).ravel()

    return rule


@pytest.fixture
def build(tiny_program, mlp, fill):
    """`build(prior, given)`: a tiny program with the encoder that suits the prior, its weights filled."""

    def build(prior, given=None):
        schedule = VariancePreserving(-4.0, 4.0)
        network = mlp(4, 6, key=jax.random.key(3))
        encoder = encoder_for(prior, network, schedule, (4,), given=given, key=jax.random.key(4))
        denoiser = tiny_program().denoiser
        return Program(prior, denoiser, fill(encoder), given=given, sampler=DDIM(4))

    return build

"""A program: prior + denoiser + encoder. It is a NumPyro model and its guide."""

from collections.abc import Mapping
import dataclasses
from functools import partial
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key
import numpy as np
import numpyro
from numpyro import handlers
from numpyro.contrib.module import eqx_module

from sami_ppl._util.chunks import by_chunks, chunk_of
from sami_ppl._util.keys import check_key
from sami_ppl.data.checks import as_numbers
from sami_ppl.data.layout import default_event_dims
from sami_ppl.decoders.decoder import ScoreDecoder
from sami_ppl.decoders.guidance import check_pair, given, is_guided
from sami_ppl.decoders.training import BOUND, Objective, refuse
from sami_ppl.diffusion.denoiser import AbstractDenoiser
from sami_ppl.diffusion.sampler import AbstractSampler, StochasticDPMSolver
from sami_ppl.encoders.encoder import AbstractEncoder
from sami_ppl.encoders.law import CodeLaw
from sami_ppl.priors.alike import first_alike
from sami_ppl.priors.latents import Latents, check_event_dims
from sami_ppl.priors.lookups import check_lookups
from sami_ppl.priors.read import Given, GivenValues, Prior, read_prior, sample_prior
from sami_ppl.program.guide import (
    Beta,
    GlobalGuide,
    initial_guide,
    sample_global_sites,
    sample_latents,
    scale_sites,
    values_of,
)
from sami_ppl.program.observations import WithObservations
from sami_ppl.program.origin import Origin
from sami_ppl.program.posterior import WithPosterior
from sami_ppl.program.summary import Readable

NETWORKS = ("denoiser", "encoder")


class Program(Readable, WithObservations, WithPosterior):
    """A SAMI program: a prior over latent factors, a denoiser, and an encoder that is guide and guidance at once.

    Generative process, for each observation:

        factors ~ prior();  z = code of the factors in unconstrained space
        x ~ ScoreDecoder(z): reverse diffusion with the noise prediction ε_θ − σ ∇ log q(z | x_λ, λ)

    or, where the denoiser takes the code itself (`decoders.conditional`), with its own.

    Inference: q(factors | x) = the encoder at the clean end, pushed onto the prior's supports.

    A hierarchical prior, `def prior(obs)`, has global sites too, outside the plate `obs`; their guide, `global_guide`,
    is a Gaussian in unconstrained space, "diagonal" or "full", or a NumPyro function that samples them.
    `prior_params` holds its parameters and those that the prior itself makes by `numpyro.param`; they are trained with
    the encoder. A prior p(z | u), `def prior(u)`, takes variables of the data; `given` holds their values for some
    observations, from which the prior is read and its marginal drawn. The guide does not see u, so that it may guide a
    denoiser that does not either.

    `model` and `guide` are ordinary NumPyro functions: give them to SVI, Predictive, handlers, render_model.
    `event_dims` names the dims of one observation, ("channel", "row", "column") for images and ("feature",) for vectors
    unless given. Attributes can be replaced by `program.replace(encoder=...)`.

    Raises what `read_prior` raises, ValueError where denoiser, encoder and prior do not fit each other, and TypeError
    for `denoiser_loss` and `discount`, which are of training: `Stage` has them.
    """

    denoiser: AbstractDenoiser
    encoder: AbstractEncoder
    sampler: AbstractSampler
    prior_params: dict[str, Any]
    prior: Prior = eqx.field(static=True)
    given: GivenValues = eqx.field(static=True)
    latents: Latents = eqx.field(static=True)
    event_dims: tuple[str, ...] = eqx.field(static=True)
    global_guide: GlobalGuide = eqx.field(static=True)
    origin: Origin | None = eqx.field(static=True)

    def __init__(
        self,
        prior: Prior,
        denoiser: AbstractDenoiser,
        encoder: AbstractEncoder,
        *,
        sampler: AbstractSampler | None = None,
        prior_params: dict[str, Any] | None = None,
        given: Given | GivenValues | None = None,
        event_dims: tuple[str, ...] | None = None,
        global_guide: GlobalGuide = "diagonal",
        origin: Origin | None = None,
        **unknown: Any,
    ):
        refuse("Program", unknown)
        self.given = given if isinstance(given, GivenValues) else GivenValues.of(given or {})
        self.prior, self.latents = first_alike(prior), read_prior(prior, self.given)
        self.denoiser, self.encoder = denoiser, encoder
        self.global_guide = global_guide
        self.prior_params = self._initial_params() | (prior_params or {})
        self.sampler = StochasticDPMSolver(20) if sampler is None else sampler
        self.event_dims = default_event_dims(denoiser.event_shape) if event_dims is None else tuple(event_dims)
        self.origin = origin

    def __check_init__(self) -> None:
        check_pair(self.denoiser, self.encoder)
        self.encoder.check_latents(self.latents)
        expected = self._initial_params()
        for name, value in self.prior_params.items():
            if name not in expected or jax.tree.map(jnp.shape, value) != jax.tree.map(jnp.shape, expected[name]):
                raise ValueError(
                    f"prior_params holds {name!r}, which the prior does not have in this shape; it has "
                    f"{', '.join(expected) or 'none'}: leave prior_params out to begin anew"
                )
        check_event_dims(self.latents, self.event_dims, self.event_shape)

    def _initial_params(self) -> dict[str, Any]:
        return {**self.latents.params, **initial_guide(self.latents, self.global_guide)}

    @property
    def event_shape(self) -> tuple[int, ...]:
        """Shape of one observation."""
        return self.denoiser.event_shape

    @property
    def of_sequences(self) -> bool:
        """Whether observations are sequences, whose frames may be missing."""
        return self.encoder.single is not self.encoder

    @property
    def guided(self) -> bool:
        """Whether the encoder guides the denoiser, at every noise level; other denoisers take the code themselves."""
        return is_guided(self.denoiser)

    def decoder(self, z: Float[Array, " D"]) -> AbstractDenoiser:
        """The denoiser of p(x | z), for one code z."""
        return given(self.denoiser, self.encoder, z)

    def replace(self, **changes: Any) -> "Program":
        """A copy with some of its attributes replaced, under the names that `Program` takes.

        Raises TypeError for other names, and what `Program` raises. A new prior begins with its own parameters, a new
        `global_guide` with its own too.
        """
        names = [f.name for f in dataclasses.fields(self) if f.name != "latents"]
        if "prior" in changes:
            changes.setdefault("prior_params", None)  # those at hand are of the prior replaced
        if "global_guide" in changes:
            own = {name: value for name, value in self.prior_params.items() if name in self.latents.params}
            changes.setdefault("prior_params", own)
        refuse("replace", set(changes) - set(names), names)
        return type(self)(**{name: changes.get(name, getattr(self, name)) for name in names})

    def model(
        self,
        x: Float[Array, "obs *event"] | None = None,
        *,
        size: int | None = None,
        total: int | None = None,
        beta: Beta = 1.0,
        levels: int = 1,
        given: Given | None = None,
        objective: Objective = BOUND,
    ) -> Float[Array, "obs *event"]:
        """The generative program over a batch of observations, or over `size` unobserved ones.

        `total`: number of observations that the batch stands for; terms are then scaled by total / batch.
        `beta`: weight of the latent sites, or of each by name; give the guide the same. `levels`: noise levels per
        observation in the bound. `given`: the variables that the prior takes, one row for each observation.
        `objective`: what of the bound is trained; default, the bound. Raises ValueError for observations of another
        shape, and for variables that the prior takes and are not given.
        """
        size = self._batch_size(x, size)
        denoiser: Any = eqx_module("denoiser", self.denoiser)
        encoder: Any = eqx_module("encoder", self.encoder)
        key = numpyro.prng_key()
        plate = numpyro.plate("obs", total or size, subsample_size=size)
        with scale_sites(beta), handlers.trace() as trace:
            self.sample_prior(plate, size, given)
        z = self.latents.to_code({site.name: trace[site.name]["value"] for site in self.latents.sites})
        with plate:
            return self._observe(denoiser, encoder, z, x, size, levels, key, objective)

    def guide(
        self,
        x: Float[Array, "obs *event"] | None = None,
        *,
        size: int | None = None,
        total: int | None = None,
        beta: Beta = 1.0,
        levels: int = 1,
        given: Given | None = None,
        objective: Objective = BOUND,
    ) -> dict[str, Array]:
        """The amortised posterior of the factors given x, and the guide of global sites.

        Takes the arguments of `model`, returns the values of the sites of each observation. Raises ValueError without
        observations, and what `model` raises.
        """
        if x is None:
            raise ValueError(
                "the guide is amortised: it needs the observations, guide(x); for draws from the prior use model"
            )
        size = self._batch_size(x, size)
        encoder: Any = eqx_module("encoder", self.encoder)
        with scale_sites(beta):
            global_values = values_of(self.latents.global_sites, self.sample_global_sites)
        q = self.code_law(x, given, encoder=encoder, global_values=global_values, objective=objective)
        with numpyro.plate("obs", total or size, subsample_size=size), scale_sites(beta):
            return sample_latents(self.latents, q)

    def code_law(
        self, x: Array, given: Given | None = None, *, encoder: AbstractEncoder | None = None,
        global_values: Any = None, objective: Objective = BOUND,
    ) -> CodeLaw:  # fmt: skip
        """The guide's law of codes given x (obs, *event), a distribution of batch shape (obs,) and event shape (D,).

        It is the encoder's own at the clean end; of sequences, the law smoothed by the prior at its current parameters
        and at values `global_values` of the global sites (default: one draw from their guide, always the same).
        """
        if global_values is None:
            global_values = values_of(
                self.latents.global_sites, handlers.seed(self.sample_global_sites, jax.random.key(0))
            )
        prior = partial(self.sample_prior, numpyro.plate("obs", len(x)), len(x), given)
        guide = lambda encoder, x: encoder.guide(x, handlers.substitute(prior, data=dict(global_values)))  # noqa: E731
        return objective.clean_pass(guide)(objective.evaluated(self.encoder if encoder is None else encoder), x)

    def single(self, data: Any = None) -> tuple["Program", Any]:
        """The program of single observations and these, a Dataset or an array: of sequences those of their frames that
        are seen; any other program is one already and stays as it is.
        """
        if not self.of_sequences:
            return self, data
        from sami_ppl.program.sequences import frames_of, single_frames  # which builds on programs

        return frames_of(self), None if data is None else single_frames(data)

    def sample_prior(self, plate: Any, size: int, given: Given | None = None) -> None:
        """Sample all sites of the prior, at its fitted parameters, for the `size` observations of a plate.

        Raises ValueError where a variable that the prior takes is not in `given`, or not with `size` rows, and for
        labels outside the table that the prior looks up by them.
        """
        for name in self.latents.arguments:
            found = jnp.shape(given[name]) if given is not None and name in given else None
            if found is None or found[:1] != (size,):
                got = "none" if found is None else f"an array of shape {found}"
                raise ValueError(
                    f"the prior takes {name!r}: pass given={{{name!r}: array of shape ({size}, ...)}}, one row for "
                    f"each observation; got {got}"
                )
        check_lookups(given or {}, self.latents.tables)
        with handlers.substitute(data=self.prior_params):
            sample_prior(self.prior, plate, given, by_rows=self.latents.by_rows)

    def derived(
        self, values: Mapping[str, Array], size: int, given: Given | None = None, *, of_globals: bool = False
    ) -> dict[str, Array]:
        """What the prior computes by `numpyro.deterministic` from the values of all its sites, for `size` observations;
        `of_globals`: what it computes of global sites, once.
        """
        found = [site for site in self.latents.derived if site.is_global == of_globals]
        if not found:
            return {}
        run = handlers.seed(handlers.substitute(self.sample_prior, data=dict(values)), jax.random.key(0))
        trace = handlers.trace(run).get_trace(numpyro.plate("obs", size), size, given)
        batch = () if of_globals else (size,)
        return {s.name: jnp.broadcast_to(trace[s.name]["value"], (*batch, *s.event_shape)) for s in found}

    def sample_global_sites(self) -> None:
        """Sample the global sites from their guide."""
        sample_global_sites(self.latents, self.prior_params, self.global_guide)

    def prior_codes(
        self, key: Key[Array, ""], size: int, do: Mapping[str, Array] | None = None, given: Given | None = None
    ) -> Float[Array, "size D"]:
        """Codes z drawn from the fitted prior, each with global sites of its own, drawn from their guide.

        A prior p(z | u) is drawn at `given`, one row for each code, or else at the u of observations in `self.given`,
        picked at random. `do`: values of sites set from outside; sites that depend on them feel it.
        """
        check_key(key)
        held: dict[str, Any] = {name: jnp.asarray(value)[None] for name, value in (do or {}).items()}

        def one(key: Array, own: Given) -> Array:
            global_key, own_key, row_key = jax.random.split(key, 3)
            rows = jax.random.randint(row_key, (1,), 0, len(self.given))
            given = {name: value[None] for name, value in own.items()} or self.given.rows(rows)
            global_values = handlers.trace(handlers.seed(self.sample_global_sites, global_key)).get_trace()
            run = handlers.seed(handlers.do(handlers.replay(self.sample_prior, global_values), data=held), own_key)
            trace = handlers.trace(run).get_trace(numpyro.plate("obs", 1), 1, given)
            # Under `do`, a trace still holds what the site itself would have been.
            values = {s.name: held.get(s.name, trace[s.name]["value"]) for s in self.latents.sites}
            return self.latents.to_code(values)[0]

        return jax.vmap(one)(jax.random.split(key, size), {n: jnp.asarray(v) for n, v in (given or {}).items()})

    def marginal_model(
        self,
        x: Float[Array, "obs *event"] | None = None,
        *,
        size: int | None = None,
        total: int | None = None,
        beta: Beta = 1.0,
        levels: int = 1,
        given: Given | None = None,
        objective: Objective = BOUND,
    ) -> Float[Array, "obs *event"]:
        """The denoiser alone, a model of x without latents: what the first of two stages fits. Guide: `no_guide`."""
        size = self._batch_size(x, size)
        denoiser: Any = eqx_module("denoiser", self.denoiser)
        key = numpyro.prng_key()
        with numpyro.plate("obs", total or size, subsample_size=size):
            return self._observe(denoiser, None, None, x, size, levels, key, objective)

    def no_guide(self, x: Array | None = None, **arguments: Any) -> None:
        """The guide of `marginal_model`, which has no latent sites."""

    def _observe(
        self,
        denoiser: AbstractDenoiser,
        encoder: AbstractEncoder | None,
        z: Array | None,
        x: Array | None,
        size: int,
        levels: int,
        key: Array | None,
        objective: Objective,
    ) -> Array:
        decoder = ScoreDecoder(
            denoiser, encoder, z, sampler=self.sampler, key=key, levels=levels, objective=objective, batch_shape=(size,)
        )
        drawn: Any = numpyro.sample("x", decoder, obs=x, infer={"event_dims": list(self.event_dims)})
        return drawn

    def _batch_size(self, x: Array | np.ndarray | None, size: int | None) -> int:
        if x is None:
            return 1 if size is None else size
        self.check_observations(x)
        if size is not None and size != len(x):
            raise ValueError(f"size is {size} but x holds {len(x)} observations: leave size out where x is given")
        return len(x)

    def moments(self, x: Array, given: Given | None = None) -> tuple[Array, Array]:
        """Mean and standard deviation (obs, D) of the code's posterior."""
        q = self.code_law(x, given)
        return jnp.asarray(q.mean), jnp.sqrt(jnp.asarray(q.variance))

    def encode(self, x: Any, *, given: Given | None = None, chunk: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Mean and standard deviation (obs, D) of the posterior of the code z, chunk by chunk.

        For more than these, such as correlations, `code_law` gives the posterior itself.

        Args:
            x: observations, an array (obs, *event) or a Dataset; for a store beyond memory see `sami_ppl.encode`.
            given: of sequences, the variables that the prior takes, each (obs, ...).
            chunk: observations at a time; default 1,024, fewer of large ones.

        Raises what `observed` raises, and ValueError for labels outside the table that the prior looks up by them.
        """
        given = {name: as_numbers(name, value) for name, value in (given or {}).items()}
        check_lookups(given, self.latents.tables)
        chunk = chunk_of(1024, self.event_shape) if chunk is None else chunk
        return by_chunks(partial(compiled_moments, self), chunk, self.observed(x), given)

    def params(self) -> dict[str, Any]:
        """The parameters of the networks and of the prior under the names that NumPyro gives them."""
        networks = {f"{name}$params": eqx.partition(getattr(self, name), eqx.is_inexact_array)[0] for name in NETWORKS}
        return networks | self.prior_params

    def with_params(self, params: Mapping[str, Any]) -> "Program":
        """The program with parameters as SVI returns them; networks not among them keep theirs."""
        networks = {
            name: eqx.combine(params[f"{name}$params"], getattr(self, name))
            for name in NETWORKS
            if f"{name}$params" in params
        }
        own = {name: params[name] for name in self.prior_params if name in params}
        return self.replace(prior_params=self.prior_params | own, **networks)


@eqx.filter_jit
def compiled_moments(program: Program, x: Array, given: Given) -> tuple[Array, Array]:
    """`program.moments`, compiled once for all programs of the same structure."""
    return program.moments(x, given)

"""A program: prior + denoiser + encoder. It is a NumPyro model and its guide."""

from collections.abc import Mapping
import dataclasses
from functools import partial
from typing import Any, get_args

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key
import numpy as np
import numpyro
from numpyro import handlers
from numpyro.contrib.module import eqx_module
import xarray as xr

from sami_ppl._util.chunks import padded_chunks
from sami_ppl.data.layout import arranged, default_event_dims
from sami_ppl.decoders.bound import DenoiserLoss
from sami_ppl.decoders.decoder import ScoreDecoder
from sami_ppl.decoders.guidance import check_pair
from sami_ppl.diffusion.denoiser import AbstractDenoiser
from sami_ppl.diffusion.sampler import AbstractSampler, StochasticDPMSolver
from sami_ppl.encoders.encoder import AbstractEncoder, check_latents
from sami_ppl.encoders.frames import FramewiseEncoder, check_sequences, floating, smoothed
from sami_ppl.priors.discrete import labels
from sami_ppl.priors.read import Frozen, Given, Prior, check_numbers, check_variable, read_prior, sample_prior
from sami_ppl.priors.sites import Latents, check_event_dims
from sami_ppl.program.guide import (
    Beta,
    GlobalGuide,
    initial_guide,
    sample_latents,
    sample_shared,
    scale_sites,
    values_of,
)
from sami_ppl.program.origin import Origin
from sami_ppl.program.posterior import WithPosterior
from sami_ppl.program.summary import Readable

NETWORKS = ("denoiser", "encoder")


class Program(Readable, WithPosterior):
    """A SAMI program: a prior over latent factors, a denoiser, and an encoder that is guide and guidance at once.

    Generative process, for each observation:

        factors ~ prior();  z = code of the factors in unconstrained space
        x ~ ScoreDecoder(z): reverse diffusion with the noise prediction ε_θ − σ ∇ log q(z | x_λ, λ)

    Inference: q(factors | x) = the encoder at the clean end, pushed onto the prior's supports.

    A hierarchical prior, `def prior(obs)`, has global sites too, outside the plate `obs`; their guide, `global_guide`,
    is a Gaussian in unconstrained space, "diagonal" or "full", or a NumPyro function that samples them.
    `prior_params` holds its parameters and those that the prior itself makes by `numpyro.param`; they are trained with
    the encoder. A prior p(z | u), `def prior(u)`, takes variables of the data; `given` holds their values for some
    observations, from which the prior is read and its marginal drawn. The guide does not see u, so that it may guide a
    denoiser that does not either.

    `model` and `guide` are ordinary NumPyro functions: give them to SVI, Predictive, handlers, render_model.
    `event_dims` names the dims of one observation, ("channel", "row", "column") for images and ("feature",) for vectors
    unless given. `denoiser_loss` and `discount` shape training only (see `bound.noise_error` and `ScoreDecoder`).
    Attributes can be replaced by `program.replace(encoder=...)`.

    Raises what `read_prior` raises, and ValueError where denoiser, encoder and prior do not fit each other.
    """

    denoiser: AbstractDenoiser
    encoder: AbstractEncoder
    sampler: AbstractSampler
    prior_params: dict[str, Any]
    prior: Prior = eqx.field(static=True)
    given: Frozen = eqx.field(static=True)
    latents: Latents = eqx.field(static=True)
    event_dims: tuple[str, ...] = eqx.field(static=True)
    denoiser_loss: DenoiserLoss = eqx.field(static=True)
    discount: float = eqx.field(static=True)
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
        given: Given | Frozen | None = None,
        event_dims: tuple[str, ...] | None = None,
        denoiser_loss: DenoiserLoss = "guided",
        discount: float = 0.0,
        global_guide: GlobalGuide = "diagonal",
        origin: Origin | None = None,
    ):
        if denoiser_loss not in get_args(DenoiserLoss):
            raise ValueError(f"denoiser_loss must be one of {get_args(DenoiserLoss)}, got {denoiser_loss!r}")
        self.given = given if isinstance(given, Frozen) else Frozen.of(given or {})
        self.prior, self.latents = prior, read_prior(prior, self.given)
        self.denoiser, self.encoder = denoiser, encoder
        self.global_guide = global_guide
        self.prior_params = self._initial_params() | (prior_params or {})
        self.sampler = StochasticDPMSolver(20) if sampler is None else sampler
        self.event_dims = default_event_dims(denoiser.event_shape) if event_dims is None else tuple(event_dims)
        self.denoiser_loss, self.discount, self.origin = denoiser_loss, discount, origin

    def __check_init__(self) -> None:
        check_pair(self.denoiser, self.encoder)
        check_sequences(self.encoder, self.latents)
        check_latents(self.encoder, self.latents)
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
        if unknown := set(changes) - set(names):
            raise TypeError(f"replace() takes {', '.join(names)}; got {', '.join(sorted(unknown))}")
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
    ) -> Float[Array, "obs *event"]:
        """The generative program over a batch of observations, or over `size` unobserved ones.

        `total`: number of observations that the batch stands for; terms are then scaled by total / batch.
        `beta`: weight of the latent sites, or of each by name; give the guide the same. `levels`: noise levels per
        observation in the bound. `given`: the variables that the prior takes, one row for each observation. Raises
        ValueError for observations of another shape, and for variables that the prior takes and are not given.
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
            return self._observe(denoiser, encoder, z, x, size, levels, key)

    def guide(
        self,
        x: Float[Array, "obs *event"] | None = None,
        *,
        size: int | None = None,
        total: int | None = None,
        beta: Beta = 1.0,
        levels: int = 1,
        given: Given | None = None,
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
            shared = values_of(self.latents.shared, self.sample_shared)
        parameters = self.guide_parameters(x, given, encoder=encoder, shared=shared)
        with numpyro.plate("obs", total or size, subsample_size=size), scale_sites(beta):
            return sample_latents(self.latents, encoder, parameters)

    def guide_parameters(
        self, x: Array, given: Given | None = None, *, encoder: AbstractEncoder | None = None, shared: Any = None
    ) -> Any:
        """What determines the guide's law of codes given x (obs, *event): the encoder's parameters, or, of sequences,
        the law smoothed by the prior at its current parameters and at values `shared` of the global sites (default: one
        draw from their guide, always the same).
        """
        encoder = self.encoder if encoder is None else encoder
        if not isinstance(encoder, FramewiseEncoder):
            clean = lambda encoder, x: jax.vmap(lambda x: encoder.parameters(*encoder.clean(x)))(x)  # noqa: E731
            # Decoupled training takes this pass again for its gradient, and holds nothing of it while guidance is
            # differentiated: a tenth more work of the encoder for a fifth less memory.
            return (eqx.filter_checkpoint(clean) if self.denoiser_loss == "own" else clean)(encoder, x)
        if shared is None:
            shared = values_of(self.latents.shared, handlers.seed(self.sample_shared, jax.random.key(0)))
        prior = partial(self.sample_prior, numpyro.plate("obs", len(x)), len(x), given)
        return smoothed(encoder, x, handlers.substitute(prior, data=dict(shared)))

    def sample_prior(self, plate: Any, size: int, given: Given | None = None) -> None:
        """Sample all sites of the prior, at its fitted parameters, for the `size` observations of a plate.

        Raises ValueError where a variable that the prior takes is not in `given`, or not with `size` rows.
        """
        for name in self.latents.arguments:
            found = jnp.shape(given[name]) if given is not None and name in given else None
            if found is None or found[:1] != (size,):
                got = "none" if found is None else f"an array of shape {found}"
                raise ValueError(
                    f"the prior takes {name!r}: pass given={{{name!r}: array of shape ({size}, ...)}}, one row for "
                    f"each observation; got {got}"
                )
        with handlers.substitute(data=self.prior_params):
            sample_prior(self.prior, plate, given)

    def sample_shared(self) -> None:
        """Sample the global sites from their guide."""
        sample_shared(self.latents, self.prior_params, self.global_guide)

    def prior_codes(
        self, key: Key[Array, ""], size: int, do: Mapping[str, Array] | None = None
    ) -> Float[Array, "size D"]:
        """Codes z drawn from the fitted prior, each with global sites of its own, drawn from their guide.

        A prior p(z | u) is drawn at the u of observations in `self.given`, picked at random. `do`: values of sites set
        from outside; sites that depend on them feel it.
        """
        held: dict[str, Any] = {name: jnp.asarray(value)[None] for name, value in (do or {}).items()}

        def one(key: Array) -> Array:
            shared_key, own_key, row_key = jax.random.split(key, 3)
            given = self.given.rows(jax.random.randint(row_key, (1,), 0, len(self.given)))
            shared = handlers.trace(handlers.seed(self.sample_shared, shared_key)).get_trace()
            run = handlers.seed(handlers.do(handlers.replay(self.sample_prior, shared), data=held), own_key)
            trace = handlers.trace(run).get_trace(numpyro.plate("obs", 1), 1, given)
            # Under `do`, a trace still holds what the site itself would have been.
            values = {s.name: held.get(s.name, trace[s.name]["value"]) for s in self.latents.sites}
            return self.latents.to_code(values)[0]

        return jax.vmap(one)(jax.random.split(key, size))

    def marginal_model(
        self,
        x: Float[Array, "obs *event"] | None = None,
        *,
        size: int | None = None,
        total: int | None = None,
        beta: Beta = 1.0,
        levels: int = 1,
        given: Given | None = None,
    ) -> Float[Array, "obs *event"]:
        """The denoiser alone, a model of x without latents: what the first of two stages fits. Guide: `no_guide`."""
        size = self._batch_size(x, size)
        denoiser: Any = eqx_module("denoiser", self.denoiser)
        key = numpyro.prng_key()
        with numpyro.plate("obs", total or size, subsample_size=size):
            return self._observe(denoiser, None, None, x, size, levels, key)

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
    ) -> Array:
        decoder = ScoreDecoder(
            denoiser, encoder, z, sampler=self.sampler, key=key, levels=levels, denoiser_loss=self.denoiser_loss,
            discount=self.discount, batch_shape=(size,),
        )  # fmt: skip
        drawn: Any = numpyro.sample("x", decoder, obs=x, infer={"event_dims": list(self.event_dims)})
        return drawn

    def _batch_size(self, x: Array | np.ndarray | None, size: int | None) -> int:
        if x is None:
            return 1 if size is None else size
        self.check_observations(x)
        if size is not None and size != len(x):
            raise ValueError(f"size is {size} but x holds {len(x)} observations: leave size out where x is given")
        return len(x)

    def check_observations(self, x: Array | np.ndarray) -> None:
        """Raise ValueError unless x has shape (obs, *event)."""
        if jnp.ndim(x) != 1 + len(self.event_shape) or jnp.shape(x)[1:] != self.event_shape:
            raise ValueError(
                f"x must have shape (obs, {', '.join(map(str, self.event_shape))}), got {jnp.shape(x)}"
                + ("; add the leading dim: x[None]" if jnp.shape(x) == self.event_shape else "")
            )

    def observed(
        self, data: xr.Dataset | Array | np.ndarray, *, at_least: int = 1, why: str = ""
    ) -> Float[np.ndarray, "obs *event"]:
        """Observations x as floats, of an array or of a Dataset with the variable x, in the program's layout: dims are
        matched by name, in arrays channels that are last come to the front and grey images get theirs.

        Raises ValueError for another shape, for no observations, and for fewer than `at_least`, saying `why`.
        """
        if isinstance(data, xr.Dataset):
            check_variable(data, "x")
        x: Any = data["x"].values if isinstance(data, xr.Dataset) else data
        dims = data["x"].dims[1:] if isinstance(data, xr.Dataset) else None
        x = arranged(x, dims, self.event_shape, self.event_dims)
        self.check_observations(x)
        if len(x) == 0:
            raise ValueError("data holds no observations: give an array of shape (obs, *event)")
        if len(x) < at_least:
            raise ValueError(f"{why or 'x'} needs at least {at_least} observations, got {len(x)}: give more of them")
        return floating(x, self.encoder)

    def observations(self, data: xr.Dataset | Array | np.ndarray) -> tuple[Float[np.ndarray, "obs *event"], Given]:
        """Observations x and the variables that the prior takes, of an array of x or a Dataset with all of them.

        Raises ValueError for observations of another shape, and for a variable that is missing, or no finite number.
        """
        named = self.latents.arguments
        x = self.observed(data)
        if not isinstance(data, xr.Dataset):
            if named:
                raise ValueError(
                    f"the prior takes {', '.join(named)}: give an xarray Dataset with x and {', '.join(named)} on obs"
                )
            return x, {}
        for name in named:
            check_variable(data, name)
        given = {name: data[name].values for name in named}
        check_numbers(given)
        self.known_values(given, len(x))
        return x, given

    def known_values(self, given: Given, size: int) -> dict[str, np.ndarray]:
        """Of partly observed discrete sites: the value, −1 where unknown, (obs,). Raises what `labels` raises."""
        if not self.latents.discrete or not self.latents.arguments:
            return {}
        run = handlers.seed(self.sample_prior, jax.random.key(0))
        return labels(handlers.trace(run).get_trace(numpyro.plate("obs", size), size, given), self.latents)

    def moments(self, x: Array, given: Given | None = None) -> tuple[Array, Array]:
        """Location (obs, D) and scale of the code's posterior; of sequences mean and marginal standard deviations."""
        if not isinstance(self.encoder, FramewiseEncoder):
            return jax.vmap(self.encoder.posterior)(x)
        q = self.guide_parameters(x, given)
        return q.mean.reshape(len(x), -1), jnp.sqrt(q.variance).reshape(len(x), -1)

    def encode(self, x: Any, *, given: Given | None = None, chunk: int = 1024) -> tuple[np.ndarray, np.ndarray]:
        """Posteriors of the code z: location (obs, D), and scale (obs, D), or (obs, D, D), A with cov = A Aᵀ.

        Args:
            x: observations, an array (obs, *event) or a Dataset; for a store beyond memory see `sami_ppl.encode`.
            given: of sequences, the variables that the prior takes, each (obs, ...).
            chunk: observations at a time.
        """
        x = self.observed(x)
        moments, parts = jax.jit(lambda *arguments: self.moments(*arguments)), []
        for rows, count in padded_chunks(len(x), chunk):
            at = {name: jnp.asarray(value)[rows] for name, value in (given or {}).items()}
            parts.append(tuple(leaf[:count] for leaf in jax.device_get(moments(jnp.asarray(x[rows]), at))))
        loc, scale = (np.concatenate(part) for part in zip(*parts, strict=True))
        return loc, scale

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

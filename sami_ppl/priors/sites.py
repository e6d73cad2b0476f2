"""The factors of a program as its prior has them, and the code z that they make up."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
import itertools
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float
import numpy as np
from numpyro.distributions.transforms import Transform

from sami_ppl._util.tables import as_html, table


@dataclass(frozen=True, eq=False, repr=False)
class LatentSite:
    """One site of the prior and its place in the code z.

    Coordinates of z are unconstrained, but for directions: the code of an angle is (cos, sin), that of a unit vector
    itself; `manifold` says so. `components`: of a mixture prior, else 1. `standard`: a fixed Normal, so that
    the prior of z is N(0, I). `parents`: the sites that its law depends on directly. `process`: a process over time,
    whose frames have that prior each. `categories`: number of values of a discrete site, whose code is one-hot, else 0.
    `kinds`: the discrete sites that a continuous site's prior depends on, through others too. `temperature`: of a
    relaxed prior. `law`: the prior's in plain values, with its numbers where these are fixed. `coords`: dim → labels
    of its values, where the prior gives them.
    """

    name: str
    event_shape: tuple[int, ...]
    dims: tuple[str, ...]
    transform: Transform
    unconstrained_shape: tuple[int, ...]
    start: int
    shift: np.ndarray
    scale: np.ndarray
    standard: bool
    manifold: Literal["circle", "sphere"] | None = None
    components: int = 1
    parents: tuple[str, ...] = ()
    process: bool = False
    categories: int = 0
    kinds: tuple[str, ...] = ()
    temperature: float | None = None
    law: Mapping[str, Any] = field(default_factory=dict)
    coords: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)

    @property
    def size(self) -> int:
        """Number of unconstrained coordinates."""
        return math.prod(self.unconstrained_shape)

    @property
    def code(self) -> slice:
        """The coordinates of the code z that belong to this site."""
        return slice(self.start, self.start + self.size)

    @property
    def axes(self) -> tuple[str, ...]:
        """One label per coordinate: the site's name, indexed where it has several, by the labels of its dims."""
        if self.unconstrained_shape == ():
            return (self.name,)
        shape = self.unconstrained_shape
        # Unconstrained coordinates of a simplex, or one-hot ones, are not those that the prior's labels name.
        own = self.coords if shape == self.event_shape else {}
        dims = self.dims if shape == self.event_shape else ("",) * len(shape)
        labels = [own.get(dim, range(size)) for dim, size in zip(dims, shape, strict=True)]
        return tuple(f"{self.name}[{','.join(map(str, label))}]" for label in itertools.product(*labels))

    def __repr__(self) -> str:
        shape = "×".join(map(str, self.event_shape)) or "scalar"
        law = f", {self.law['kind']}" if "kind" in self.law else ""
        return f"LatentSite({self.name!r}, {shape}{law}, {type(self.transform).__name__})"

    def to_code(self, value: Float[Array, "*batch_and_event"]) -> Float[Array, "*batch d"]:
        """Site value → its coordinates of z."""
        batch = value.shape[: value.ndim - len(self.event_shape)]
        unconstrained = jnp.asarray(self.transform.inv(value)).reshape((*batch, self.size))
        dtype = unconstrained.dtype
        return (unconstrained - jnp.asarray(self.shift, dtype)) / jnp.asarray(self.scale, dtype)

    def from_code(self, z: Float[Array, "*batch d"]) -> Float[Array, "*batch_and_event"]:
        """Coordinates of z → site value."""
        unconstrained = jnp.asarray(self.shift, z.dtype) + jnp.asarray(self.scale, z.dtype) * z
        return jnp.asarray(self.transform(unconstrained.reshape(z.shape[:-1] + self.unconstrained_shape)))


@dataclass(frozen=True, eq=False, repr=False)
class Latents:
    """The sites of a prior, in the order of the program, and the code z that those of one observation make up.

    `shared`: global sites, outside the plate over observations; they are no part of z. `params`: what the prior learns,
    by the name of its `numpyro.param`, as it begins. `arguments`: the variables of the data that the prior takes.
    """

    sites: tuple[LatentSite, ...]
    shared: tuple[LatentSite, ...] = ()
    params: Mapping[str, Any] = field(default_factory=dict)
    arguments: tuple[str, ...] = ()

    @property
    def size(self) -> int:
        """D, the number of coordinates of z."""
        return sum(site.size for site in self.sites)

    @property
    def discrete(self) -> tuple[LatentSite, ...]:
        """The discrete sites, over whose values objectives sum."""
        return tuple(site for site in self.sites if site.categories)

    @property
    def coords(self) -> dict[str, tuple[Any, ...]]:
        """Labels of the values of the sites' dims, where the prior gives them."""
        return {dim: labels for site in (*self.sites, *self.shared) for dim, labels in site.coords.items()}

    @property
    def axes(self) -> tuple[str, ...]:
        """One label per coordinate of z."""
        return tuple(label for site in self.sites for label in site.axes)

    def to_code(self, values: Mapping[str, Array]) -> Float[Array, "*batch D"]:
        """Site values → z."""
        return jnp.concatenate([site.to_code(jnp.asarray(values[site.name])) for site in self.sites], axis=-1)

    def from_code(self, z: Float[Array, "*batch D"]) -> dict[str, Array]:
        """z → site values."""
        return {site.name: site.from_code(z[..., site.code]) for site in self.sites}

    def onto_support(self, z: Float[Array, "*batch D"]) -> Float[Array, "*batch D"]:
        """The nearest codes that a value has: directions get length 1, codes of kinds one 1; other coordinates stay."""
        parts = []
        for site in self.sites:
            part = z[..., site.code]
            if site.manifold is not None:
                vectors = part.reshape(*part.shape[:-1], -1, site.unconstrained_shape[-1])
                length = jnp.sqrt(jnp.sum(vectors**2, -1, keepdims=True) + 1e-12)
                part = (vectors / length).reshape(part.shape)
            elif site.categories:
                part = jax.nn.one_hot(jnp.argmax(part, -1), site.categories, dtype=part.dtype)
            parts.append(part)
        return jnp.concatenate(parts, axis=-1)

    def describe(self) -> str:
        """A table of the factors: site, shape, support's transform, coordinates of z."""
        rows = [("site", "shape", "dims", "from unconstrained space", "axes of z")]
        for site in self.sites:
            shape = "×".join(map(str, site.event_shape)) or "scalar"
            span = f"{site.start}" if site.size == 1 else f"{site.start}–{site.start + site.size - 1}"
            rows.append((site.name, shape, ", ".join(site.dims), type(site.transform).__name__, span))
        for site in self.shared:
            shape = "×".join(map(str, site.event_shape)) or "scalar"
            rows.append((site.name, shape, ", ".join(site.dims), type(site.transform).__name__, "global"))
        return table(rows)

    def __repr__(self) -> str:
        of = f", shared={[site.name for site in self.shared]}" if self.shared else ""
        return f"Latents of {len(self.sites)} sites, {self.size} axes of z{of}\n{self.describe()}"

    def _repr_html_(self) -> str:
        return as_html(repr(self))


def check_event_dims(latents: Latents, dims: tuple[str, ...], shape: tuple[int, ...]) -> None:
    """Raise ValueError unless the names of the dims of an observation are as many as these, and free.

    Observations and sites may share a dim, such as time.
    """
    if len(dims) != len(shape):
        raise ValueError(
            f"event_dims must name each of the {len(shape)} dims of an observation of shape {shape}, got {dims}"
        )
    sizes = dict(zip(dims, shape, strict=True))
    own = [pair for site in latents.sites for pair in zip(site.dims, site.event_shape, strict=True)]
    taken = {"obs", "chain", "draw", "x", *(dim for dim, size in own if size != sizes.get(dim))}
    if clash := taken & set(dims):
        raise ValueError(f"event_dims {sorted(clash)} are names of other dims or of the observation: rename them")


def check_site_dims(sites: Sequence[LatentSite]) -> None:
    """Raise ValueError unless the sites of a prior, global ones too, and their dims can lie in one labelled Dataset."""
    sizes: dict[str, int] = {}
    coords: dict[str, Any] = {}
    reserved = {"obs", "chain", "draw"}
    for site in sites:
        if len(set(site.dims)) < len(site.dims) or reserved & set(site.dims):
            raise ValueError(
                f"prior site {site.name!r} has the event_dims {list(site.dims)}: they must differ from each other and "
                "from obs, chain and draw"
            )
        for dim, size in zip(site.dims, site.event_shape, strict=True):
            if len(labels := site.coords.get(dim, range(size))) != size:
                raise ValueError(
                    f"coords of prior site {site.name!r} give {len(labels)} labels for the dim {dim!r}, which has "
                    f"{size} values: give one for each"
                )
            if (held := coords.setdefault(dim, site.coords.get(dim))) != site.coords.get(dim, held):
                raise ValueError(
                    f"coords of prior site {site.name!r} label the dim {dim!r} otherwise than another site does: give "
                    "one of the dims another name"
                )
            if sizes.setdefault(dim, size) != size:
                raise ValueError(
                    f"event_dims name {dim!r} twice, with sizes {sizes[dim]} and {size}, the second time for prior "
                    f"site {site.name!r}: give each size a name of its own"
                )
    if clash := [site.name for site in sites if site.name in reserved | set(sizes)]:
        raise ValueError(
            f"prior site {clash[0]!r} takes the name of a dim of the posterior: rename the site or the dim"
        )

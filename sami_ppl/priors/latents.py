"""The factors of a program as its prior has them, and the code z that they make up."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from sami_ppl._util.tables import as_html, table
from sami_ppl.data.layout import check_name
from sami_ppl.priors.sites import Discrete, LatentSite


@dataclass(frozen=True, eq=False, kw_only=True)
class Derived:
    """What a prior computes from its sites, by `numpyro.deterministic`; `is_global` where of all observations."""

    name: str
    event_shape: tuple[int, ...]
    dims: tuple[str, ...]
    coords: Mapping[str, tuple[Any, ...]]
    is_global: bool


@dataclass(frozen=True, eq=False, repr=False)
class Latents:
    """The sites of a prior, in the order of the program, and the code z that those of one observation make up.

    `global_sites`: those outside the plate over observations; they are no part of z. `params`: what the prior learns,
    by the name of its `numpyro.param`, as it begins. `arguments`: the variables of the data that the prior takes.
    `derived`: what the prior computes from its sites. `by_rows`: whether the prior, being one of a single observation,
    runs for one at a time. `tables`: of a variable by which the prior looks up the rows of a table, their number.
    """

    sites: tuple[LatentSite, ...]
    global_sites: tuple[LatentSite, ...] = ()
    params: Mapping[str, Any] = field(default_factory=dict)
    arguments: tuple[str, ...] = ()
    derived: tuple[Derived, ...] = ()
    by_rows: bool = False
    tables: Mapping[str, int] = field(default_factory=dict)

    def __deepcopy__(self, memo: Any) -> "Latents":
        """Itself, being immutable: a copied program keeps the structure of the one it is of."""
        return self

    @property
    def size(self) -> int:
        """D, the number of coordinates of z."""
        return sum(site.size for site in self.sites)

    @property
    def discrete(self) -> tuple[Discrete, ...]:
        """The discrete sites, over whose values objectives sum."""
        return tuple(site for site in self.sites if isinstance(site, Discrete))

    @property
    def coords(self) -> dict[str, tuple[Any, ...]]:
        """Labels of the values of the sites' dims, where the prior gives them."""
        return {
            dim: labels
            for site in (*self.sites, *self.global_sites, *self.derived)
            for dim, labels in site.coords.items()
        }

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
        parts = [site.onto_support(z[..., site.code]) for site in self.sites]
        return jnp.concatenate(parts, axis=-1)

    def describe(self) -> str:
        """A table of the factors: site, shape, support's transform, coordinates of z."""
        rows = [("site", "shape", "dims", "from unconstrained space", "axes of z")]
        for site in self.sites:
            shape = "×".join(map(str, site.event_shape)) or "scalar"
            span = f"{site.start}" if site.size == 1 else f"{site.start}–{site.start + site.size - 1}"
            rows.append((site.name, shape, ", ".join(site.dims), type(site.transform).__name__, span))
        for site in self.global_sites:
            shape = "×".join(map(str, site.event_shape)) or "scalar"
            rows.append((site.name, shape, ", ".join(site.dims), type(site.transform).__name__, "global"))
        return table(rows)

    def __repr__(self) -> str:
        of = f", global_sites={[site.name for site in self.global_sites]}" if self.global_sites else ""
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


def check_site_dims(sites: Sequence[LatentSite | Derived]) -> None:
    """Raise ValueError unless the sites of a prior, global ones too, and their dims can lie in one labelled Dataset."""
    sizes: dict[str, int] = {}
    coords: dict[str, Any] = {}
    reserved = {"obs", "chain", "draw"}
    for site in sites:
        check_name(site.name, "a prior site")
        for dim in site.dims:
            check_name(dim, f"a dim of prior site {site.name!r}")
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

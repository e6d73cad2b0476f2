"""A prior from a list of named factors, for the simple case in which they are independent."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpyro
from numpyro import distributions as dist

from sami_ppl.distributions.supports import unwrapped


class Factors:
    """A prior of independent named factors, `p(z) = ∏ p(z_i)`: a NumPyro function of no arguments.

    Made by `factors`. `replace` swaps factors by name; everything else is as for a prior that is written by hand.
    """

    def __init__(
        self,
        laws: Mapping[str, dist.Distribution],
        dims: Mapping[str, tuple[str, ...]],
        coords: Mapping[str, tuple[Any, ...]],
    ):
        self.laws, self.dims = MappingProxyType(dict(laws)), MappingProxyType(dict(dims))
        self.coords = MappingProxyType(dict(coords))

    def __call__(self) -> None:
        """Sample every factor."""
        for name, law in self.laws.items():
            dims = self.dims.get(name)
            numpyro.sample(
                name, law, infer={"event_dims": list(dims), "coords": dict(self.coords)} if dims is not None else {}
            )

    def replace(self, **laws: dist.Distribution) -> "Factors":
        """The prior with other laws for some of its factors, in the same order.

        A factor of the same shape keeps its dims and coordinates. Raises what `factors` raises, and ValueError for a
        name that the prior does not have.
        """
        if unknown := sorted(set(laws) - set(self.laws)):
            raise ValueError(f"the prior has no factor {', '.join(unknown)}; its factors are {', '.join(self.laws)}")
        changed = {name: _as_event(name, law) for name, law in laws.items()}
        kept = [n for n in self.laws if n not in changed or changed[n].event_shape == self.laws[n].event_shape]
        dims = {name: self.dims[name] for name in kept if name in self.dims}
        named = {dim for names in dims.values() for dim in names}
        coords = {dim: values for dim, values in self.coords.items() if dim in named}
        return factors({**self.laws, **changed}, dims=dims, coords=coords)

    def __repr__(self) -> str:
        return "factors(" + ", ".join(f"{name}={_law_text(law)}" for name, law in self.laws.items()) + ")"


def factors(
    laws: Mapping[str, dist.Distribution] | None = None,
    /,
    *,
    dims: Mapping[str, str | Sequence[str]] | None = None,
    coords: Mapping[str, Sequence[Any]] | None = None,
    **named: dist.Distribution,
) -> Factors:
    """The prior of independent named factors.

        prior = sp.factors(angle=dist.VonMises(0, 1e-3), size=dist.LogNormal(0, 1), style=dist.Normal(0, 1).expand([4]))

    It is an ordinary NumPyro prior, `prior()` samples every factor; factors that depend on each other, parameters that
    are learned, global factors and p(z | u) need a function of your own (docs: composing priors).

    Args:
        laws: name → law, in place of keywords, for names such as "dims" that keywords cannot have.
        dims: names of the dims of factors that have several values; `style_axis` for a vector `style` unless given.
        coords: dim → labels of its values, such as `{"style_axis": ["slant", "width", "weight", "serif"]}`; they come
            back in posteriors, tables and reports.
        **named: name → law; all dims of a law, as `expand` makes them, describe the one factor.

    Returns:
        A prior for `autoencoder` and `Program`.

    Raises:
        ValueError: no factors, a name that is given twice, dims or coords that do not fit the factors.
        TypeError: a law that is no NumPyro distribution.
    """
    if twice := sorted(set(laws or {}) & set(named)):
        raise ValueError(f"factors {', '.join(twice)} are given twice: leave one of them out")
    found = {name: _as_event(name, law) for name, law in {**(laws or {}), **named}.items()}
    if not found:
        raise ValueError("factors needs at least one: write sp.factors(z=dist.Normal(0, 1).expand([3]))")
    own_dims = {name: (names,) if isinstance(names, str) else tuple(names) for name, names in (dims or {}).items()}
    if unknown := sorted(set(own_dims) - set(found)):
        raise ValueError(f"dims name {', '.join(unknown)}, but the factors are {', '.join(found)}")
    for name, law in found.items():
        shape = tuple(law.event_shape)
        names = own_dims.setdefault(name, default_dims(name, shape))
        if len(names) != len(shape):
            raise ValueError(f"factor {name!r} has shape {shape}, dims name {list(names)}: give one name for each dim")
    sizes = {
        dim: size for name, law in found.items() for dim, size in zip(own_dims[name], law.event_shape, strict=True)
    }
    own_coords = {dim: tuple(values) for dim, values in (coords or {}).items()}
    for dim, values in own_coords.items():
        if dim not in sizes:
            raise ValueError(f"coords name the dim {dim!r}, but the factors' dims are {', '.join(sizes) or 'none'}")
        if len(values) != sizes[dim]:
            raise ValueError(f"coords give {len(values)} labels for the dim {dim!r}, which has {sizes[dim]} values")
    return Factors(found, own_dims, own_coords)


def default_dims(name: str, event_shape: tuple[int, ...]) -> tuple[str, ...]:
    """Names of the dims of a site that gives none: `name_axis`, or `name_axis0`, `name_axis1`, … ."""
    if len(event_shape) <= 1:
        return tuple(f"{name}_axis" for _ in event_shape)
    return tuple(f"{name}_axis{i}" for i in range(len(event_shape)))


def _as_event(name: str, law: Any) -> dist.Distribution:
    if not isinstance(law, dist.Distribution):
        raise TypeError(
            f"factor {name!r} must be a NumPyro distribution, got {type(law).__name__}: write "
            f"sp.factors({name}=dist.Normal(0, 1)), or a prior function of your own"
        )
    # All dims describe one observation: none is left for independent copies.
    return law.to_event(len(law.batch_shape)) if law.batch_shape else law


def _law_text(law: dist.Distribution) -> str:
    shape = tuple(law.event_shape)
    return type(unwrapped(law, masks=False)).__name__ + (f"[{'×'.join(map(str, shape))}]" if shape else "")

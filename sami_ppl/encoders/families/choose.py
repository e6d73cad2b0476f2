"""Which family a site of a prior has."""

from collections.abc import Callable, Mapping
from functools import partial

from sami_ppl.encoders.families.base import AbstractFamily
from sami_ppl.encoders.families.categorical import Categorical, PerCategory, RelaxedCategorical
from sami_ppl.encoders.families.directions import Directions
from sami_ppl.encoders.families.gaussian import Diagonal
from sami_ppl.encoders.families.mixture import Mixture
from sami_ppl.priors.sites import Latents, LatentSite


def default_family(site: LatentSite) -> type[AbstractFamily]:
    """The family that suits a site of a prior, given the discrete ones it depends on, unless another is asked for."""
    if site.categories:
        return Categorical
    if site.temperature is not None:
        return RelaxedCategorical
    if site.manifold is not None:
        return Directions
    return Mixture if site.components > 1 else Diagonal


def choose_families(latents: Latents, families: Mapping[str, Callable] | None) -> dict[str, Callable]:
    """The family of every site: the one given, else the one that suits it.

    Where the prior of a continuous site depends on discrete ones, every value of these has a family of its own
    (`PerCategory`). Raises ValueError for a site that the prior has not, and for a family that cannot live on a site's
    support.
    """
    given = dict(families or {})
    names = [site.name for site in latents.sites]
    if unknown := sorted(set(given) - set(names)):
        raise ValueError(f"families names {', '.join(unknown)}, but the prior's sites are {', '.join(names)}")
    chosen = {site.name: given.get(site.name, default_family(site)) for site in latents.sites}
    for site in latents.sites:
        family = chosen[site.name]
        kind = getattr(family, "func", family)
        if site.categories and kind is not Categorical:
            raise ValueError(
                f"prior site {site.name!r} is discrete, with {site.categories} values: leave it out of families, or "
                "give families.Categorical"
            )
        if site.manifold is not None and kind is not Directions:
            raise ValueError(
                f"prior site {site.name!r} lives on a {site.manifold}, where a Gaussian would tear: leave it out of "
                "families, or give families.Directions"
            )
        if site.kinds and not site.categories and kind is not PerCategory:
            sizes = {one.name: one.categories for one in latents.discrete}
            chosen[site.name] = partial(PerCategory, sizes=sizes, family=family)
    return chosen

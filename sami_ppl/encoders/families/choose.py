"""Which family a site of a prior has."""

from collections.abc import Callable, Mapping
from functools import partial

from sami_ppl.encoders.families.base import AbstractFamily
from sami_ppl.encoders.families.categorical import Categorical, PerCategory, RelaxedCategorical
from sami_ppl.encoders.families.directions import Directions
from sami_ppl.encoders.families.gaussian import Diagonal
from sami_ppl.encoders.families.mixture import Mixture
from sami_ppl.priors.latents import Latents
from sami_ppl.priors.sites import Discrete, LatentSite

DEFAULTS = {family.__name__: family for family in (Categorical, RelaxedCategorical, Directions, Mixture, Diagonal)}


def default_family(site: LatentSite) -> type[AbstractFamily]:
    """The family that suits a site of a prior, given the discrete ones it depends on, unless another is asked for."""
    return DEFAULTS[site.family]


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
        made = getattr(family, "func", family)  # of functools.partial
        if site.why_not_gaussian and made is not default_family(site):
            raise ValueError(
                f"prior site {site.name!r} {site.why_not_gaussian}: leave it out of families, or give "
                f"families.{site.family}"
            )
        if site.kinds and not isinstance(site, Discrete) and made is not PerCategory:
            sizes = {one.name: one.categories for one in latents.discrete}
            chosen[site.name] = partial(PerCategory, sizes=sizes, family=family)
    return chosen

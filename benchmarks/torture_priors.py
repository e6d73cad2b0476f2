"""Priors made at random: sites of any law, shape and name, nested, dependent, given twice."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpyro
from numpyro import distributions as dist

from benchmarks.torture_inputs import ODD, pick
from benchmarks.torture_trials import Tally, Wrong
import sami_ppl as sp
from sami_ppl.priors.read import read_prior


def _number(rng: np.random.Generator) -> float:
    return float(
        pick(rng, (0.5, 1.0, 2.0, 1.5, 0.1, 0.0, -1.0, np.nan, np.inf)) if rng.random() < 0.3 else rng.uniform(0.2, 3)
    )


LAWS: dict[str, Callable[[np.random.Generator], Any]] = {
    **{
        name: partial(lambda law, r: law(*(_number(r) for _ in range(2))), getattr(dist, name))
        for name in (
            "Normal",
            "Laplace",
            "Gumbel",
            "Cauchy",
            "LogNormal",
            "Gamma",
            "Beta",
            "InverseGamma",
            "VonMises",
            "Logistic",
            "Weibull",
            "Kumaraswamy",
            "LogUniform",
            "AsymmetricLaplace",
            "BetaBinomial",
            "SineSkewed",
        )
        if hasattr(dist, name)
    },
    **{
        name: partial(lambda law, r: law(_number(r)), getattr(dist, name))
        for name in (
            "Exponential",
            "HalfNormal",
            "HalfCauchy",
            "StudentT",
            "Bernoulli",
            "Poisson",
            "Geometric",
            "Chi2",
            "Delta",
            "RelaxedBernoulli",
            "Dirichlet",
        )
        if hasattr(dist, name)
    },
    "Uniform": lambda r: dist.Uniform(_number(r), _number(r)),
    "Categorical": lambda r: dist.Categorical(logits=r.normal(size=int(r.integers(1, 7)))),
    "CategoricalProbs": lambda r: dist.CategoricalProbs(np.abs(r.normal(size=3))),
    "Multinomial": lambda r: dist.Multinomial(3, np.ones(3) / 3),
    "Dirichlet3": lambda r: dist.Dirichlet(np.ones(3) * _number(r)),
    "MultivariateNormal": lambda r: dist.MultivariateNormal(np.zeros(2), np.eye(2) * _number(r)),
    "LKJCholesky": lambda r: dist.LKJCholesky(3, 1.0),
    "LKJ": lambda r: dist.LKJ(3, 1.0),
    "Wishart": lambda r: dist.Wishart(5, np.eye(3)),
    "GaussianRandomWalk": lambda r: dist.GaussianRandomWalk(0.5, 4),
    "ProjectedNormal": lambda r: dist.ProjectedNormal(r.normal(size=3)),
    "ZeroInflatedPoisson": lambda r: dist.ZeroInflatedPoisson(0.3, 2.0),
    "OrderedLogistic": lambda r: dist.OrderedLogistic(0.0, np.array([-1.0, 1.0])),
    "TruncatedNormal": lambda r: dist.TruncatedNormal(0, 1, low=-1.0, high=_number(r)),
    "MixtureSameFamily": lambda r: dist.MixtureSameFamily(
        dist.Categorical(np.ones(2) / 2), dist.Normal(np.array([-1.0, 1.0]), 1)
    ),
    "ImproperUniform": lambda r: dist.ImproperUniform(dist.constraints.real, (), ()),
    "Transformed": lambda r: dist.TransformedDistribution(dist.Normal(0, 1), dist.transforms.ExpTransform()),
    "Matern": lambda r: sp.Matern(4) if hasattr(sp, "Matern") else dist.Normal(),
    "Masked": lambda r: dist.Normal(0, 1).mask(False),
    "no law": lambda r: pick(r, (None, 3, "Normal", dist.Normal, lambda: 0)),
}


def any_prior(rng: np.random.Generator) -> tuple[str, Any]:
    """One to three sites, with odd shapes and names, some nested, some dependent, some given twice."""
    told, sites = [], []
    for _ in range(int(rng.integers(0, 4))):
        name = pick(rng, ("z", "a", "place")) if rng.random() < 0.6 else pick(rng, ODD)
        law, shape, event = pick(rng, LAWS), pick(rng, ((), (), (2,), (2, 3), (0,), (1,))), bool(rng.random() < 0.8)
        extra = pick(
            rng,
            (
                {},
                {},
                {},
                {"infer": {"event_dims": [pick(rng, ODD)]}},
                {"obs": 0.5},
                {"infer": {"event_dims": "ab"}},
                {"infer": {"coords": {"c": [pick(rng, ODD)] * 2}, "event_dims": ["c"]}},
            ),
        )
        state = int(rng.integers(2**31))
        told.append(f"{name[:20]!r} ~ {law}{list(shape)}{'' if event else ' batch'} {extra}")
        sites.append((name, law, shape, event, extra, state))
    form = pick(rng, ("plain", "plain", "plain", "plate", "nested", "depends", "raises", "returns", "loop", "param"))

    def one(site: Any, loc: Any = 0.0) -> Any:
        name, law, shape, event, extra, state = site
        fn = LAWS[law](np.random.default_rng(state))
        fn = fn.expand(shape) if shape else fn
        return numpyro.sample(name, fn.to_event(len(shape)) if event and shape else fn, **extra)

    def prior() -> Any:
        value = 0.0
        for site in sites:
            if form == "nested":
                with numpyro.handlers.scope(prefix=site[0]):
                    value = one(site)
            elif form == "plate":
                with numpyro.plate("p", 3):
                    value = one(site)
            elif form == "depends":
                value = numpyro.sample(site[0], dist.Normal(np.sum(1.0) * 0 + value, 1.0))
            elif form == "loop":
                value = sum(numpyro.sample(f"{site[0]}{k}", dist.Normal(0, 1)) for k in range(3))
            elif form == "param":
                value = numpyro.sample(site[0], dist.Normal(numpyro.param(site[0] + "w", 0.0), 1.0))
            else:
                value = one(site)
        if form == "raises":
            raise ValueError("prior: a user's own error")
        return value

    return f"{form}: {'; '.join(told)}", prior


def priors(count: int, seed: int, folder: Path) -> Tally:
    """Priors as `read_prior` takes them."""
    tally = Tally("priors")

    def trial(prior: Any) -> None:
        found = read_prior(prior)
        if not found.sites or found.size != sum(site.size for site in found.sites):
            raise Wrong(f"{found.size} axes of {[site.size for site in found.sites]}")
        for site in found.sites:
            if not (
                np.isfinite(site.shift).all() and np.isfinite(site.scale).all() and (np.asarray(site.scale) > 0).all()
            ):
                raise Wrong(f"site {site.name!r} is centred at {site.shift} and scaled by {site.scale}")

    for i in range(count):
        what, prior = any_prior(np.random.default_rng([seed, i]))
        tally.take({"seed": [seed, i], "what": what}, partial(trial, prior), ("prior", "site"), __file__)
    return tally

"""Priors with discrete sites for tests, a batch of observations and the labels of some; the exact mixture of three."""

from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
from numpyro import distributions as dist
import xarray as xr

from sami_ppl import families
from sami_ppl.decoders.exact import LinearMixture
from sami_ppl.diffusion.schedule import VariancePreserving
from sami_ppl.encoders.encoder import FamilyEncoder
from sami_ppl.priors.read import read_prior
from sami_ppl.program.program import Program

KEY = jax.random.key(0)
LOCS = jnp.array([[-1.0, 0.5], [1.0, 0.0], [0.0, -1.5]])
X = np.linspace(-1.5, 1.5, 20, dtype=np.float32).reshape(5, 4)[:, [2, 0, 3, 1]]
LABEL = np.array([-1, 2, 0, -1, 1])


def joint():
    kind = numpyro.sample("kind", dist.Categorical(jnp.array([0.5, 0.3, 0.2])))
    numpyro.sample("z", dist.Normal(LOCS[kind], 0.5).to_event(1))
    numpyro.sample("light", dist.Normal(0.0, 1.0))


def two():
    kind = numpyro.sample("kind", dist.Categorical(jnp.array([0.5, 0.3, 0.2])))
    flip = numpyro.sample("flip", dist.Bernoulli(jnp.array([0.2, 0.7, 0.4])[kind]))
    numpyro.sample("z", dist.Normal(LOCS[kind] * (1 - 2 * flip)[..., None], 0.5).to_event(1))


def labelled(label):
    logits = numpyro.param("weights", jnp.array([0.2, 0.0, -0.3]))
    kind = numpyro.sample("kind", dist.Categorical(logits=logits), obs=label, obs_mask=label >= 0)
    numpyro.sample("z", dist.Normal(LOCS[kind], 0.5).to_event(1))


def dataset(x=X, label=LABEL):
    return xr.Dataset({"x": (("obs", "feature"), x), "label": ("obs", label)})


class Exact(families.AbstractFamily):
    """One of the exact posteriors of the mixture, from features that are x_λ and λ themselves."""

    index: jax.Array
    model: LinearMixture
    what: str = eqx.field(static=True)

    def parameters(self, features):
        x, level = features[:-1], features[-1]
        if self.what == "kind":
            return jax.nn.log_softmax(self.model._log_joint(x, level))
        means, covs = self.model.component_posteriors(x, level)
        if self.what == "part":
            return means[self.index, 0], jnp.sqrt(covs[self.index, 0, 0])
        return jax.nn.log_softmax(self.model._log_joint(x, level)), means, jnp.sqrt(covs[:, :, 0])

    def distribution(self, parameters):
        if self.what == "kind":
            return families.OneHot(parameters)
        if self.what == "part":
            return dist.Normal(*(p[..., None] for p in parameters)).to_event(1)
        return families.DiagonalMixture(*parameters)

    def moments(self, parameters):
        raise NotImplementedError


class Inputs(eqx.Module):
    """Features x_λ and λ: undoes the encoder's scaling, which is by mean 0 and standard deviation 1."""

    schedule: VariancePreserving

    def __call__(self, x, log_snr):
        scale = jnp.sqrt(self.schedule.alpha(log_snr) ** 2 + self.schedule.sigma(log_snr) ** 2)
        return jnp.append(x * scale, log_snr)


def kinds_program():
    """A 1-D mixture of three kinds seen in 2-D: the program with kinds, the marginal program, the exact model."""
    schedule = VariancePreserving(-6.0, 6.0)
    probs, locs, scales = jnp.array([0.5, 0.3, 0.2]), jnp.array([[-1.0], [0.2], [1.5]]), jnp.full((3, 1), 0.4)
    model = LinearMixture(jnp.array([[1.0], [0.5]]), 0.6, schedule, probs=probs, locs=locs, scales=scales)

    def kinds():
        kind = numpyro.sample("kind", dist.Categorical(probs))
        numpyro.sample("z", dist.Normal(locs[kind], scales[kind]).to_event(1))

    def marginal():
        parts = dist.Normal(locs, scales).to_event(1)
        numpyro.sample("z", dist.MixtureSameFamily(dist.Categorical(probs), parts))

    def program(prior, latents, exact):
        # The code is standardised by the prior's spread: the exact families are wrapped to these units.
        network = Inputs(schedule)
        encoder = FamilyEncoder(network, schedule, (2,), latents, families=exact, key=KEY)
        return Program(prior, model.denoiser, encoder)

    def of(what):
        return lambda features, site, **_: Standard(Exact(jnp.zeros((), int), model, what), site)

    joint_latents, marginal_latents = read_prior(kinds), read_prior(marginal)
    with_kinds = program(kinds, joint_latents, {"kind": families.Categorical, "z": partial(
        families.PerCategory, sizes={"kind": 3}, family=of("part"))})  # fmt: skip
    heads = eqx.tree_at(lambda h: h.base.index, with_kinds.encoder.families[1].heads, jnp.arange(3))
    each = eqx.tree_at(lambda f: f.heads, with_kinds.encoder.families[1], heads)
    own = (Exact(jnp.zeros((), int), model, "kind"), each)
    encoder = eqx.tree_at(lambda e: e.families, with_kinds.encoder, own)
    return with_kinds.replace(encoder=encoder), program(marginal, marginal_latents, {"z": of("mixture")}), model


class Standard(families.AbstractFamily):
    """A family in the units of the code: location and scale less the prior's shift, over its scale."""

    base: Exact
    shift: float = eqx.field(static=True)
    scale: float = eqx.field(static=True)

    def __init__(self, base, site):
        self.base, self.shift, self.scale = base, float(site.shift[0]), float(site.scale[0])

    def parameters(self, features):
        *weights, loc, spread = self.base.parameters(features)
        return (*weights, (loc - self.shift) / self.scale, spread / self.scale)

    def distribution(self, parameters):
        return self.base.distribution(parameters)

    def moments(self, parameters):
        return jnp.zeros((3, 1)), jnp.ones((3, 1))

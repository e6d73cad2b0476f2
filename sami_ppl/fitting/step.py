"""One stage as functions of arrays: the first state, a step, a validation. Steps are those of NumPyro's `SVI`.

What is compiled depends on a `Recipe`, which has no weights: JAX's cache keeps recipes alive, not programs, and a
second fit of the same structure, sizes and stage compiles nothing.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache, partial
import itertools
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Key
import numpy as np
import numpyro
from numpyro import handlers
from numpyro.distributions import biject_to
from numpyro.infer import SVI
from numpyro.infer.util import transform_fn
import optax

from sami_ppl._util import parallel
from sami_ppl._util.chunks import chunk_of
from sami_ppl._util.parallel import Devices
from sami_ppl.decoders.training import BOUND, Objective
from sami_ppl.diagnostics.gain import NoiseErrors, noise_errors
from sami_ppl.fitting.accumulate import Accumulated
from sami_ppl.fitting.objective import ScoreELBO, Scores
from sami_ppl.fitting.penalties import Draw, Penalty, weighed
from sami_ppl.fitting.stage import Stage
from sami_ppl.nn.convolution import outside_loops
from sami_ppl.priors.read import Given
from sami_ppl.program.program import NETWORKS, Program

AUGMENT = 7
"""Number of the random stream of augmentation among those of a step."""


class Batch(NamedTuple):
    """Observations, and the variables that the prior takes."""

    x: Any
    given: Given

    def take(self, rows: Any) -> "Batch":
        """Single observations."""
        return jax.tree.map(lambda leaf: leaf[rows], self)

    def steps(self, rows: np.ndarray) -> "list[Step]":
        """Steps on the observations rows[0], rows[1], …"""
        return [(self, some) for some in rows]


Step = tuple[Batch, np.ndarray | None]
"""Observations, and those of them that a step is taken on; None, all."""


class State(NamedTuple):
    """Everything that a run continues from; arrays only. `average` and `best` are parameters as SVI gives them."""

    svi: Any
    average: dict[str, Any]
    best: dict[str, Any]
    best_loss: Array
    waited: Array
    step: Array


@dataclass(frozen=True, eq=False)
class Recipe:
    """What the compiled functions of a stage depend on beside arrays.

    `frame`: the program without arrays. `ends`: steps at which the stage comes to its end, the last one of several
    where it was made longer. `observations`: how many the fit has, where its loss depends on that.
    """

    frame: Program
    stage: Stage
    ends: tuple[int, ...]
    observations: int | None
    devices: Devices | None

    @property
    def total(self) -> int | None:
        """Observations that a batch stands for: only the KL of global sites, once for all of them, depends on it."""
        return self.observations if self.frame.latents.global_sites else None

    def arguments(self, batch: Batch, **more: Any) -> dict[str, Any]:
        """The arguments of model and guide beside the observations."""
        return {"total": self.total, "given": batch.given, **more}

    def weights_at(self, step: Array | int) -> Any:
        """β at a step, of each site."""
        latents = self.frame.latents
        return self.stage.weights_at(step, [site.name for site in (*latents.sites, *latents.global_sites)])

    def sides(self, program: Program, *, trained: bool = True) -> tuple[Callable, Callable]:
        """The model that is fitted, and its guide; `trained`, as the stage trains them."""
        objective = self.stage.objective if trained else BOUND
        if self.stage.target == "marginal":
            return partial(program.marginal_model, objective=objective), program.no_guide
        model, guide = (partial(side, objective=objective) for side in (program.model, program.guide))
        if trained and self.stage.train == ("prior",):
            # p(x | z) does not depend on them: the KL is all there is, and the denoiser is not called.
            model = handlers.block(model, hide=["x"])
        return model, guide

    def loss_at(self, step: Array | int, program: Program) -> ScoreELBO | Accumulated:
        """The loss of a step."""
        stage = self.stage
        loss = ScoreELBO(
            stage.free_bits, stage.capacity_at(step), stage.label_weight, self.penalties(program, stage.objective)
        )
        return loss if stage.accumulate == 1 else Accumulated(loss, stage.accumulate, self.trains, self.devices)

    def trains(self, parameter: str) -> bool:
        """Whether a parameter is trained."""
        return not {*part_of(parameter)}.isdisjoint(self.stage.train)

    def penalties(self, program: Program, objective: Objective) -> dict[str, Any]:
        """The penalties of the stage, as `ScoreELBO` takes them."""

        def of(penalty: Penalty, params: dict[str, Any], scored: Scores, key: Array) -> Array:
            own = program.with_params(params)
            networks = {name: objective.evaluated(getattr(own, name)) for name in NETWORKS}
            own = own.replace(**networks)
            values = {site.name: scored.guide[site.name]["value"] for site in own.latents.sites}
            z, x, given = own.latents.to_code(values), scored.args[0], scored.kwargs.get("given", {})
            return penalty(Draw(x, given, z, own, scored.trace, scored.guide, self.observations or len(x), key))

        return {name: partial(of, weighed(name, penalty)) for name, penalty in self.stage.penalties.items()}

    def svi(self, program: Program, batch: Batch, step: Array | int = 0) -> SVI:
        """NumPyro's SVI as it is at a step."""
        svi = SVI(*self.sides(program), self.optimiser(), self.loss_at(step, program))
        svi.constrain_fn = partial(transform_fn, _transforms(program, batch))  # which it learns in `init` otherwise
        return svi

    def optimiser(self) -> optax.GradientTransformation:
        """Adam with a clipped gradient, for the parts that are trained."""
        stage = self.stage

        def up_and_down(steps: int) -> optax.Schedule:
            warmup = max(1, min(stage.warmup, steps // 2))
            first = stage.learning_rate if steps == 1 else 0.0
            return optax.warmup_cosine_decay_schedule(first, stage.learning_rate, warmup, max(steps, warmup + 1))

        parts = [up_and_down(end - begin) for begin, end in itertools.pairwise((0, *self.ends))]
        rate = parts[0] if len(parts) == 1 else optax.join_schedules(parts, list(self.ends[:-1]))
        adam = optax.adam(rate, b2=0.99)
        if stage.weight_decay:
            adam = optax.adamw(rate, b2=0.99, weight_decay=stage.weight_decay, mask=_decaying)
        return optax.multi_transform(
            {"train": optax.chain(optax.clip_by_global_norm(stage.clip), adam), "freeze": optax.set_to_zero()},
            lambda params: {n: "train" if self.trains(n) else "freeze" for n in params},
        )

    def update(self, program: Program, state: State, batch: Batch) -> tuple[State, Array]:
        """One step of SVI and of the running average of the weights; the program's own weights are not used."""
        if self.stage.augment is not None:
            key = jax.random.fold_in(state.svi.rng_key, AUGMENT)
            batch = batch._replace(x=self.stage.augment(key, batch.x))
        svi = self.svi(program, batch, state.step)
        arguments = self.arguments(batch, beta=self.weights_at(state.step))
        after, loss = svi.update(state.svi, batch.x, **arguments)
        # The average forgets its start faster than later weights, so that short runs are not held back by it.
        decay = jnp.minimum(self.stage.ema, (1.0 + state.step) / (10.0 + state.step))
        average = jax.tree.map(lambda old, new: old + (1 - decay) * (new - old), state.average, svi.get_params(after))
        return state._replace(svi=after, average=average, step=state.step + 1), loss

    def terms(
        self, program: Program, params: dict[str, Any], data: Batch, key: Key[Array, ""]
    ) -> tuple[dict[str, Array], NoiseErrors]:
        """Terms of the bound itself (β = 1, w = 1), penalties, and denoising errors."""
        term_key, error_key = jax.random.split(key)
        model, guide = self.sides(program, trained=False)
        elbo = ScoreELBO(penalties=self.penalties(program, BOUND))
        terms = elbo.terms(term_key, params, partial(model, levels=4), guide, data.x, **self.arguments(data))
        program, guided = program.with_params(params), self.stage.target == "joint"
        return terms, noise_errors(program, data.x, error_key, guided=guided, given=data.given)


@lru_cache(maxsize=64)
def _recipe(structure: Any, leaves: tuple[Any, ...], *settings: Any) -> Recipe:
    """Equal recipes are one object, by which JAX's cache is asked at every step."""
    return Recipe(jax.tree.unflatten(structure, leaves), *settings)


@partial(jax.jit, static_argnums=0, donate_argnums=2)
def compiled_step(
    recipe: Recipe, rest: Program, state: State, data: Batch, rows: Array | np.ndarray | None
) -> tuple[State, Array]:
    """A step on single observations, or all, and its loss; `state` is given away."""
    program = eqx.combine(rest, recipe.frame)
    if recipe.stage.accumulate == 1:
        program = outside_loops(program)
    batch = data if rows is None else data.take(rows)
    batch = jax.tree.map(lambda leaf: parallel.split_rows(leaf, recipe.devices), batch)
    return parallel.keep_placed(recipe.update(program, state, batch), recipe.devices)


@partial(jax.jit, static_argnums=0)
def compiled_terms(recipe: Recipe, rest: Program, params: dict, data: Batch, key: Array) -> Any:
    """`Recipe.terms`."""
    return parallel.keep_whole(recipe.terms(eqx.combine(rest, recipe.frame), params, data, key), recipe.devices)


@partial(jax.jit, static_argnums=0)
def remember_best(devices: Devices | None, state: State, loss: Array | float) -> State:
    """The state after a validation that found this loss."""
    better = loss < state.best_loss
    after = state._replace(
        best=jax.tree.map(partial(jnp.where, better), state.average, state.best),
        best_loss=jnp.where(better, loss, state.best_loss),
        waited=jnp.where(better, 0, state.waited + 1),
    )
    return parallel.keep_placed(after, devices)


def _strong(leaf: Array) -> Array:
    return leaf if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else jnp.asarray(leaf, leaf.dtype)


class Fit:
    """One stage of a program: `init`, `run_block`, `record`. Raises what `Stage.check` raises."""

    def __init__(
        self, program: Program, stage: Stage, *, steps: int | tuple[int, ...], observations: int | None = None
    ):
        """`steps`: how many, or, of a stage that was made longer, the `Recipe.ends`."""
        stage.check(program, observations)
        self.program, self.stage, self.devices = program, stage, parallel.current_devices()
        networks = [eqx.filter(getattr(program, name), eqx.is_inexact_array, inverse=True) for name in NETWORKS]
        bare = eqx.tree_at(lambda program: [getattr(program, name) for name in NETWORKS], program, networks)
        rest, frame = eqx.partition(bare, lambda leaf: isinstance(leaf, jax.Array | np.ndarray))
        self.rest = parallel.replicate(rest, self.devices)
        counted = observations if program.latents.global_sites or stage.penalties else None
        leaves, structure = jax.tree.flatten(frame)
        ends = (steps,) if isinstance(steps, int) else steps
        self.recipe = _recipe(structure, tuple(leaves), stage, ends, counted, self.devices)

    def init(self, key: Key[Array, ""], data: Batch) -> State:
        """The state before the first step."""
        first = data.take(slice(1))
        svi = self.recipe.svi(self.program, first)
        arguments = self.recipe.arguments(first, beta=jnp.asarray(self.stage.beta))
        begun = svi.init(key, first.x, **arguments)
        params = svi.get_params(begun)
        zero = jnp.zeros((), jnp.int32)
        state = State(begun, params, params, jnp.full((), jnp.inf, jnp.float32), zero, zero)
        # Of the types that later states have, and restored ones, to the letter: NumPyro's count of steps is of a weak
        # one, for which the step would be compiled again.
        return jax.tree.map(_strong, state)

    def run_block(self, state: State, steps: Iterable[Step]) -> tuple[State, np.ndarray]:
        """Steps one after another, and their losses; `state` stays whole.

        The host runs ahead of the device and waits for it once, at the end.
        """
        losses, state = [], jax.tree.map(jnp.copy, state)
        for data, rows in steps:
            state, loss = compiled_step(self.recipe, self.rest, state, data, rows)
            losses.append(loss)
        return state, np.stack(jax.device_get(losses))

    def record(self, params: dict, data: Batch, key: Key[Array, ""]) -> dict[str, Any]:
        """What a validation finds, in nats per observation: `bound` is at β = 1, `loss` at the stage's final β.

        Large observations are taken in whole chunks, what is left over is not looked at.
        """
        stage = self.stage
        size = max(min(2, len(data.x)), chunk_of(len(data.x), self.program.event_shape))  # each is shown another's code
        chunks = [data.take(slice(start, start + size)) for start in range(0, len(data.x) - size + 1, size)]
        keys = [key, *(jax.random.fold_in(key, i) for i in range(1, len(chunks)))]
        found = [self._found(params, chunk, own) for chunk, own in zip(chunks, keys, strict=True)]
        terms, errors = jax.tree.map(lambda *leaves: np.mean(leaves, axis=0), *found)
        penalties = {name: float(terms.pop(name)) for name in stage.penalties}
        kl = {name: term for name, term in terms.items() if name != "x"}
        total_kl = sum(float(np.sum(term)) for term in kl.values())
        weighed = sum(stage.beta * stage.site_beta.get(n, 1.0) * float(np.sum(v)) for n, v in kl.items())
        loss = float(terms["x"]) + weighed + sum(penalties.values())
        logged = {"penalties": penalties} if penalties else {}
        # JAX sorts names; people look for them in the order of the prior.
        first = [site.name for site in (*self.program.latents.sites, *self.program.latents.global_sites)]
        kl = {name: kl[name] for name in [*(n for n in first if n in kl), *(n for n in kl if n not in first)]}
        return {"bound": float(terms["x"]) + total_kl, "loss": loss, "kl": kl, **logged, **errors._asdict()}

    def _found(self, params: dict, data: Batch, key: Key[Array, ""]) -> tuple[dict[str, Any], NoiseErrors]:
        return jax.device_get(compiled_terms(self.recipe, self.rest, params, data, key))

    def sites_not_finite(self, state: State, batch: Batch) -> str:
        """The sites whose terms are not finite in the step after `state`."""
        recipe, (_, step_key) = self.recipe, jax.random.split(state.svi.rng_key)
        svi = recipe.svi(self.program, batch, state.step)
        params = svi.get_params(state.svi)
        if not all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(params)):
            return "none (the terms of the step before were finite, their gradient was not)"
        arguments = recipe.arguments(batch, beta=recipe.weights_at(state.step))
        return not_finite(svi.loss.terms(step_key, params, svi.model, svi.guide, batch.x, **arguments))


def part_of(parameter: str) -> tuple[str, ...]:
    """The parts that a parameter is trained with; those of the prior are trained with the encoder too."""
    name = parameter.removesuffix("$params")
    return (name,) if name in NETWORKS else ("encoder", "prior")


def not_finite(terms: dict[str, Any]) -> str:
    """The names of the terms that are NaN or infinite."""
    return ", ".join(repr(name) for name, term in terms.items() if not np.all(np.isfinite(term)))


def _transforms(program: Program, batch: Batch) -> dict[str, Any]:
    """From unconstrained space to those parameters of the prior and of the guide of global sites that are bounded."""
    size, found = len(batch.x), {}
    prior = partial(program.sample_prior, numpyro.plate("obs", size), size, batch.given)
    for run in (prior, program.sample_global_sites):
        seeded = handlers.block(handlers.seed(run, jax.random.key(0)), expose_types=["param"])
        found |= {
            name: biject_to(site["kwargs"]["constraint"])
            for name, site in handlers.trace(seeded).get_trace().items()
            if "constraint" in site["kwargs"]
        }
    return found


HELD = {"own", "matrix", "centre"}
"""Fields of encoders that no gradient reaches: a guide of its own (`OwnGuideEncoder`), axes (`AffineEncoder`)."""
BEHIND = {"base", "frame"}
"""Fields behind which encoders hold another."""


def _decaying(params: dict[str, Any]) -> dict[str, Any]:
    """Which arrays weight decay acts on: matrices and kernels of the networks, but for what is held."""

    def decays(path: tuple, leaf: Array) -> bool:
        names = itertools.dropwhile(BEHIND.__contains__, (getattr(entry, "name", None) for entry in path))
        return leaf.ndim > 1 and next(names, None) not in HELD

    return {
        name: jax.tree_util.tree_map_with_path(decays, tree)
        if name.removesuffix("$params") in NETWORKS
        else jax.tree.map(lambda leaf: False, tree)
        for name, tree in params.items()
    }

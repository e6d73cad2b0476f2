"""A guide that is right for the program: q(z | x) fitted to codes and the samples that the program makes of them.

The encoder that guides the denoiser is fitted with a weight β < 1 of the KL, through its gradient, at all noise levels;
as a posterior it is too narrow. The posterior that is read need not be the same network. Of codes z ~ p(z) and samples
x ~ p(x | z) of the program itself,

    −E log q(z | x)  =  E KL( p(z | x) ‖ q(z | x) ) + const.,

whose least is the program's own posterior, as near as the family of q comes to it: the sleep phase of Dayan et al.
(1995, *The Helmholtz Machine*), neural posterior estimation in simulation-based inference. No data are used and nothing
but the guide changes: guidance, samples and the density p(x | z) stay, and the evidence bound is one for any guide.

A few samples have nothing to do with their code: at high noise the denoiser decided for another place than guidance
asked. One of a hundred such, at twenty standard deviations, would double the width of every Gaussian. So each sample
may be of that kind with a small probability ε, and what is fitted is the mixture (1 − ε) q(z | x) + ε r(z) of the
guide and a reference r of the codes' own mean and spread (Huber's contamination model, 1964). What is read is then q.
Or the guide gets heavy tails for such samples (`sami_ppl.encoders.tails`), which are read with it: its regions are
then right, and the bound is not as good, since the density of the program, other than its sampler, does not have such
samples.
"""

from functools import lru_cache
import math
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key
import numpy as np
import optax

from sami_ppl._util.chunks import by_chunks, chunk_of
from sami_ppl._util.history import History
from sami_ppl._util.keys import check_key
from sami_ppl._util.progress import phase, progress_bar, telling
from sami_ppl._util.tables import readable
from sami_ppl.decoders.twisted import TwistedSampler
from sami_ppl.diagnostics.fitted import not_fitted
from sami_ppl.diffusion.sampler import AbstractSampler
from sami_ppl.encoders.encoder import AbstractEncoder, gaussian
from sami_ppl.encoders.own_guide import OwnGuideEncoder
from sami_ppl.encoders.tails import TailedEncoder
from sami_ppl.fitting.stage import batches
from sami_ppl.posteriors.generate import decode, prior_codes, sampled_values
from sami_ppl.priors.sites import Direction, Discrete
from sami_ppl.program.program import Program
from sami_ppl.program.sequences import frames_of, with_frames

FEWEST = 500
"""Simulations from which a guide can be fitted: a tenth of them says when it is no longer getting better."""
SAMPLES = 10_000
"""Samples that a guide is fitted to by default."""
LOOKS = 20
"""Times that the simulations held out are looked at."""
ROOM = 0.01
"""Probability that a sample is one that a guide without tails need not cover."""
EMA = 0.99
"""Decay of the running average of the weights that is looked at."""


def samples_for(program: Program, history: History) -> int:
    """To how many samples of a program its guide is fitted by default, after a fit: 10,000, or none.

    None where the last stage took fewer than 500 steps, and where the program does not sample with particles
    (`TwistedSampler`): what a guide fitted to samples by guidance alone does to codes of real images is not known.
    """
    steps = history.records[-1]["step"] if history.records else 0
    return SAMPLES if steps >= FEWEST and isinstance(program.sampler, TwistedSampler) else 0


def recalibrated(
    program: Program, history: History, simulations: int | None, *, key: Key[Array, ""], progress: bool = True
) -> Program:
    """The program at the end of a fit: with its guide fitted to so many samples; 0 leaves it, None is `samples_for`."""
    check_key(key)
    simulations = samples_for(program, history) if simulations is None else simulations
    if not simulations:
        return program
    return recalibrate(program, key=key, simulations=simulations, progress=progress).program


@readable
class Recalibration(NamedTuple):
    """The program with a guide of its own, and −E log ((1 − ε) q(z | x) + ε r(z)) of simulations held out, in nats.

    `before` and `after`, with the standard error of their difference, `error`; `step`, of `steps`, whose weights were
    the best. Where no step was better than the guide at hand, that one stays, and `step` is 0.
    """

    program: Program
    before: float
    after: float
    error: float
    step: int
    steps: int


def recalibrate(
    program: Program,
    *,
    key: Key[Array, ""],
    simulations: int = SAMPLES,
    steps: int = 1000,
    batch: int = 256,
    learning_rate: float = 5e-4,
    outliers: float | None = None,
    tails: bool = False,
    sampler: AbstractSampler | None = None,
    progress: bool = True,
) -> Recalibration:
    """Fit the guide to the program's own samples; a tenth of them, held out, chooses when to stop.

    It begins as a copy of the encoder (or as the guide at hand, where there is one), all weights of which are fitted.
    Of a program of sequences the guide of its frames is fitted, from frames by themselves. A prior with global sites is
    drawn at draws of them from their guide, a prior p(z | u) at the u of the program's own observations.

    Args:
        program: a fitted program.
        key: random key.
        simulations: codes drawn from the prior, and a sample of each.
        steps: steps of Adam, whose learning rate falls to zero as a cosine.
        batch: simulations of a step.
        learning_rate: the largest.
        outliers: probability ε that a sample has nothing to do with its code, and that the guide is not to cover it;
            default 0 where it has heavy tails, else .01.
        tails: give a Gaussian guide heavy tails, for regions of the whole code that are right at some nats of the
            bound. Not that of sequences, whose frames are combined by Gaussians.
        sampler: of reverse diffusion; default the program's own. A guide is calibrated for one sampler's images.
        progress: show phases and a bar.

    Returns:
        The program, and what was gained.

    Raises:
        ValueError: networks that were never fitted, fewer than 500 simulations, fewer than 1 step or observation in a
            batch, a probability outside [0, 1), draws of the prior or samples that are not finite.
    """
    check_key(key)
    if parts := not_fitted(program):
        raise ValueError(
            f"the {' and the '.join(parts)} of this program have never been fitted, and their samples say nothing: "
            "program, history = sp.fit(program, data, key=key) first"
        )
    if simulations < FEWEST or steps < 1 or batch < 1 or not 0 <= (outliers or 0.0) < 1:
        raise ValueError(
            f"simulations must be at least {FEWEST}, of which a tenth is held out, steps and batch at least 1, "
            f"outliers in [0, 1); got simulations={simulations}, steps={steps}, batch={batch}, outliers={outliers}"
        )
    if program.of_sequences:
        single = recalibrate(
            frames_of(program), key=key, simulations=simulations, steps=steps, batch=batch,
            learning_rate=learning_rate, outliers=outliers, tails=False, sampler=sampler, progress=progress,
        )  # fmt: skip
        return single._replace(program=with_frames(program, single.program))
    code_key, sample_key, batch_key = jax.random.split(key, 3)
    z = np.asarray(prior_codes(program, simulations, code_key))
    _check_finite(z, "draws of the prior are")
    with telling(progress), phase(f"recalibration: {simulations:,} samples of the program"):
        x = decode(program, z, jax.random.split(sample_key, simulations), sampler=sampler)
    _check_finite(sampled_values(program, x), "samples are")
    cut = simulations // 10
    guide = program.encoder
    base, own = (guide.base, guide.own) if isinstance(guide, OwnGuideEncoder) else (guide, guide)
    tails = tails and gaussian(own)
    share = jnp.float32((0.0 if tails else ROOM) if outliers is None else outliers)
    log_r = _reference(program, z)
    held_out = share, x[:cut], z[:cut], log_r[:cut]
    params, static = eqx.partition(own, eqx.is_inexact_array)
    before = losses = _tested(static, *held_out)(params)
    if tails and not isinstance(own, TailedEncoder):
        params, static = eqx.partition(TailedEncoder(own), eqx.is_inexact_array)
    test = _tested(static, *held_out)
    best, found = params, 0
    seed, every = int(jax.random.randint(batch_key, (), 0, 2**31 - 1)), max(1, steps // LOOKS)
    data = tuple(jnp.asarray(part[cut:]) for part in (x, z, log_r))
    rate, batch = (learning_rate, steps), min(batch, simulations - cut)
    state, average = _optimiser(*rate).init(params), params
    with progress_bar(steps, "recalibration", show=progress, unit="step") as bar:
        for step in range(1, steps + 1):
            rows = batches(seed, simulations - cut, batch, step - 1, 1)[0]
            params, average, state = _update(static, rate, params, average, state, share, data, rows)
            if step % every == 0 or step == steps:
                now = test(average)
                if now.mean() < losses.mean():
                    best, losses, found = average, now, step
                bar.set_postfix_str(
                    f"−log q(z | x) of samples held out {now.mean():.2f} nats (before {before.mean():.2f})"
                )
            bar.update()
    fitted = program.replace(encoder=OwnGuideEncoder(base, eqx.combine(best, static))) if found else program
    error = float(np.std(losses - before, ddof=1) / np.sqrt(cut))
    return Recalibration(fitted, float(before.mean()), float(losses.mean()), error, found, steps)


def _tested(static: Any, share: Array, x: np.ndarray, z: np.ndarray, log_r: np.ndarray) -> Any:
    """A function from weights to the loss of every simulation held out, in nats."""

    def losses(params: Any) -> Float[np.ndarray, " n"]:
        own = lambda x, z, log_r: _losses(static, params, share, x, z, log_r)  # noqa: E731
        return np.asarray(by_chunks(own, chunk_of(1024, x.shape[1:]), x, z, log_r), float)

    return losses


def _reference(program: Program, z: Float[np.ndarray, "n D"]) -> Float[np.ndarray, " n"]:
    """Log density of codes under r: a Gaussian of their own moments, uniform directions, the frequencies of values."""
    plain: list[int] = []
    log_r = np.zeros(len(z))
    for site in program.latents.sites:
        if isinstance(site, Discrete):
            log_r += np.log(np.maximum(z[:, site.code].mean(0), 1 / len(z)))[z[:, site.code].argmax(1)]
        elif isinstance(site, Direction):
            half = site.dimension / 2  # the area of the sphere is 2 π^(d/2) / Γ(d/2)
            log_r += site.size / site.dimension * (math.lgamma(half) - math.log(2) - half * math.log(math.pi))
        else:
            plain += range(site.start, site.start + site.size)
    if plain:
        values = z[:, plain].astype(float)
        covariance = np.atleast_2d(np.cov(values.T)) + 1e-6 * np.eye(len(plain))
        centred = values - values.mean(0)
        squares = np.sum(centred * np.linalg.solve(covariance, centred.T).T, 1)
        log_r -= 0.5 * (squares + np.linalg.slogdet(2 * math.pi * covariance)[1])
    return log_r.astype(np.float32)


def _check_finite(values: np.ndarray, what: str) -> None:
    if not np.all(np.isfinite(values)):
        share = np.mean(~np.isfinite(values.reshape(len(values), -1)).all(1))
        raise ValueError(
            f"{share:.1%} of the {what} not finite: a guide cannot be fitted to them; mend the prior first"
        )


@lru_cache(maxsize=32)
def _optimiser(learning_rate: float, steps: int) -> optax.GradientTransformation:
    warmup = min(100, steps // 5)
    rate = optax.warmup_cosine_decay_schedule(0.0, learning_rate, warmup, max(steps, warmup + 1))
    return optax.chain(optax.clip_by_global_norm(10.0), optax.adam(rate))


@eqx.filter_jit
def _losses(static: Any, params: Any, share: Array, x: Array, z: Array, log_r: Array) -> Array:
    encoder: AbstractEncoder = eqx.combine(params, static)
    log_q = jax.vmap(lambda x, z: jnp.asarray(encoder.law(x).log_prob(z)))(x, z)
    return -jnp.logaddexp(jnp.log1p(-share) + log_q, jnp.log(share) + log_r)


@eqx.filter_jit
def _update(
    static: Any, rate: tuple[float, int], params: Any, average: Any, state: optax.OptState, share: Array,
    data: tuple[Array, ...], rows: Array,
) -> tuple[Any, Any, optax.OptState]:  # fmt: skip
    """One step, and the running average of the weights."""
    batch = tuple(part[rows] for part in data)
    gradient = jax.grad(lambda params: jnp.mean(_losses(static, params, share, *batch)))(params)
    updates, state = _optimiser(*rate).update(gradient, state)
    params = optax.apply_updates(params, updates)
    average = jax.tree.map(lambda old, new: old + (1 - EMA) * (new - old), average, params)
    return params, average, state

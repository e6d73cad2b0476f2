"""A guide that is right for the program: q(z | x) fitted to codes and the samples that the program makes of them.

The encoder that guides the denoiser is fitted with a weight β < 1 of the KL, through its gradient, at all noise levels;
as a posterior it is too narrow. The posterior that is read need not be the same network. Of codes z ~ p(z) and samples
x ~ p(x | z) of the program itself,

    −E log q(z | x)  =  E KL( p(z | x) ‖ q(z | x) ) + const.,

whose least is the program's own posterior, as near as the family of q comes to it: the sleep phase of Dayan et al.
(1995, *The Helmholtz Machine*), neural posterior estimation in simulation-based inference. No data are used and nothing
but the guide changes: guidance, samples and the density p(x | z) stay, and the evidence bound is one for any guide.
"""

from functools import lru_cache
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key
import numpy as np
import optax

from sami_ppl._util.chunks import by_chunks, chunk_of
from sami_ppl._util.keys import check_key
from sami_ppl._util.progress import phase, progress_bar, telling
from sami_ppl._util.tables import readable
from sami_ppl.diagnostics.fitted import not_fitted
from sami_ppl.diffusion.sampler import AbstractSampler
from sami_ppl.encoders.encoder import AbstractEncoder
from sami_ppl.encoders.recalibrated import RecalibratedEncoder
from sami_ppl.fitting.stage import batches
from sami_ppl.posteriors.generate import decode
from sami_ppl.program.program import Program
from sami_ppl.program.sequences import frames_of, with_frames

FEWEST = 500
"""Simulations from which a guide can be fitted: a tenth of them says when it is no longer getting better."""
LOOKS = 20
"""Times that the simulations held out are looked at."""
EMA = 0.99
"""Decay of the running average of the weights that is looked at."""


@readable
class Recalibration(NamedTuple):
    """The program with a guide of its own, and −E log q(z | x) of simulations held out, in nats.

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
    simulations: int = 10_000,
    steps: int = 2000,
    batch: int = 256,
    learning_rate: float = 5e-4,
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
        sampler: of reverse diffusion; default the program's own. A guide is calibrated for one sampler's images.
        progress: show phases and a bar.

    Returns:
        The program, and what was gained.

    Raises:
        ValueError: networks that were never fitted, fewer than 500 simulations, fewer than 1 step or observation in a
            batch, draws of the prior or samples that are not finite.
    """
    check_key(key)
    if parts := not_fitted(program):
        raise ValueError(
            f"the {' and the '.join(parts)} of this program have never been fitted, and their samples say nothing: "
            "program, history = sp.fit(program, data, key=key) first"
        )
    if simulations < FEWEST or steps < 1 or batch < 1:
        raise ValueError(
            f"simulations must be at least {FEWEST}, of which a tenth is held out, steps and batch at least 1; got "
            f"simulations={simulations}, steps={steps}, batch={batch}"
        )
    if program.of_sequences:
        single = recalibrate(
            frames_of(program), key=key, simulations=simulations, steps=steps, batch=batch,
            learning_rate=learning_rate, sampler=sampler, progress=progress,
        )  # fmt: skip
        return single._replace(program=with_frames(program, single.program))
    code_key, sample_key, batch_key = jax.random.split(key, 3)
    z = np.asarray(_codes(program, simulations, code_key))
    _check_finite(z, "draws of the prior are")
    with telling(progress), phase(f"recalibration: {simulations:,} samples of the program"):
        x = decode(program, z, jax.random.split(sample_key, simulations), sampler=sampler)
    _check_finite(x, "samples are")
    cut = simulations // 10
    guide = program.encoder
    base, own = (guide.base, guide.own) if isinstance(guide, RecalibratedEncoder) else (guide, guide)
    params, static = eqx.partition(own, eqx.is_inexact_array)
    test = _tested(static, x[:cut], z[:cut])
    before = losses = test(params)
    best, found = params, 0
    seed, every = int(jax.random.randint(batch_key, (), 0, 2**31 - 1)), max(1, steps // LOOKS)
    observations, codes = jnp.asarray(x[cut:]), jnp.asarray(z[cut:])
    rate, batch = (learning_rate, steps), min(batch, simulations - cut)
    state, average = _optimiser(*rate).init(params), params
    with progress_bar(steps, "recalibration", show=progress, unit="step") as bar:
        for step in range(1, steps + 1):
            rows = batches(seed, len(codes), batch, step - 1, 1)[0]
            params, average, state = _update(static, rate, params, average, state, observations, codes, rows)
            if step % every == 0 or step == steps:
                now = test(average)
                if now.mean() < losses.mean():
                    best, losses, found = average, now, step
                bar.set_postfix_str(
                    f"−log q(z | x) of samples held out {now.mean():.2f} nats (before {before.mean():.2f})"
                )
            bar.update()
    fitted = program.replace(encoder=RecalibratedEncoder(base, eqx.combine(best, static))) if found else program
    error = float(np.std(losses - before, ddof=1) / np.sqrt(cut))
    return Recalibration(fitted, float(before.mean()), float(losses.mean()), error, found, steps)


def _tested(static: Any, x: np.ndarray, z: np.ndarray) -> Any:
    """A function from weights to −log q(z | x) of every simulation held out, in nats."""

    def losses(params: Any) -> Float[np.ndarray, " n"]:
        size = chunk_of(1024, x.shape[1:])
        return np.asarray(by_chunks(lambda x, z: _losses(static, params, x, z), size, x, z), float)

    return losses


def _check_finite(values: np.ndarray, what: str) -> None:
    if not np.all(np.isfinite(values)):
        share = np.mean(~np.isfinite(values.reshape(len(values), -1)).all(1))
        raise ValueError(
            f"{share:.1%} of the {what} not finite: a guide cannot be fitted to them; mend the prior first"
        )


@eqx.filter_jit
def _codes(program: Program, size: int, key: Array) -> Array:
    return program.prior_codes(key, size)


@lru_cache(maxsize=32)
def _optimiser(learning_rate: float, steps: int) -> optax.GradientTransformation:
    warmup = min(100, steps // 5)
    rate = optax.warmup_cosine_decay_schedule(0.0, learning_rate, warmup, max(steps, warmup + 1))
    return optax.chain(optax.clip_by_global_norm(10.0), optax.adam(rate))


@eqx.filter_jit
def _losses(static: Any, params: Any, x: Array, z: Array) -> Array:
    encoder: AbstractEncoder = eqx.combine(params, static)
    return -jax.vmap(lambda x, z: jnp.asarray(encoder.law(x).log_prob(z)))(x, z)


@eqx.filter_jit
def _update(
    static: Any, rate: tuple[float, int], params: Any, average: Any, state: optax.OptState, x: Array, z: Array,
    rows: Array,
) -> tuple[Any, Any, optax.OptState]:  # fmt: skip
    """One step, and the running average of the weights."""
    gradient = jax.grad(lambda params: jnp.mean(_losses(static, params, x[rows], z[rows])))(params)
    updates, state = _optimiser(*rate).update(gradient, state)
    params = optax.apply_updates(params, updates)
    average = jax.tree.map(lambda old, new: old + (1 - EMA) * (new - old), average, params)
    return params, average, state

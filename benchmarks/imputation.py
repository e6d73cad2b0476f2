"""Missing frames of moving disks, under a prior over time and under independent frames: what docs/priors.md reports.

    python benchmarks/imputation.py runs/disks/model --out runs/imputation --seeds 0 1 2

The frames' program is reused as it is, for both priors. For each seed, clips are drawn; the lengthscales are those that
maximise log E_p ∏ψ of the training clips, the only part of the evidence that depends on them while networks are held
(`sp.fit` moves them together with the encoder); and frames of held-out clips are hidden: `scattered`, three of twelve
at random, and `block`, the sixth, seventh and eighth. Of real clips: `benchmarks/video_imputation.py`.
"""

import argparse
import json
from pathlib import Path

import jax
import jax.numpy as jnp
from matplotlib.figure import Figure
import numpy as np
import numpyro
from numpyro import handlers
from numpyro.infer import log_likelihood
import optax

import sami_ppl as sp
from sami_ppl import analyses
from sami_ppl.data import moving_disks
from sami_ppl.distributions.matern import Smoothed

FRAMES, TRAIN, TEST, DRAWS, LEVELS, BLOCK = 12, 400, 48, 4, 16, slice(5, 8)


def over_time(frames, size):
    """A prior of so many factors over time, whose lengthscales are learned."""

    def prior():
        lengthscale = jnp.exp(numpyro.param("log_lengthscale", jnp.full(size, np.log(10.0))))
        numpyro.sample("z", sp.Matern(np.arange(frames), lengthscale))

    return prior


def independent(frames, size):
    """The same factors, of which no frame tells another's."""
    return lambda: numpyro.sample("z", sp.Matern(np.arange(frames), 1e-3, size=size))


PRIORS = {"time": over_time, "independent": independent}


def hide(x, kind, seed):
    """Clips with hidden frames NaN, and which these are; `alternate` is every other frame, both ends seen."""
    hidden = np.zeros(x.shape[:2], bool)
    if kind == "block":
        hidden[:, BLOCK] = True
    elif kind == "alternate":
        hidden[:, 1:-1:2] = True
    else:
        order = np.random.default_rng(seed).random(hidden.shape).argsort(1)
        hidden = order < 3
    return np.where(hidden[:, :, None, None, None], np.nan, x), hidden


def interpolated(x, hidden):
    """Hidden frames (clip, frame, ...) by linear interpolation in time of every number: what needs no model."""
    filled = x.copy()
    for clip, gaps in zip(filled, hidden, strict=True):
        flat, times = clip.reshape(len(clip), -1), np.arange(len(clip))
        for pixel in range(flat.shape[1]):
            flat[gaps, pixel] = np.interp(times[gaps], times[~gaps], flat[~gaps, pixel])
    return filled


def score(program, x, gaps, hidden, key):
    """On hidden frames: bound on E log p(x_t | z_t) in nats a frame; squared errors of the draws and of their mean."""
    tree = program.posterior(gaps, key=key, draws=DRAWS, predictive=DRAWS, levels=0, chunk=TEST)
    z, images = tree["posterior"]["z"].values[0], tree["posterior_predictive"]["x"].values[0]
    model = handlers.substitute(program.model, data=program.params())

    @jax.jit
    def told(z, x):
        return log_likelihood(model, {"z": z}, x, levels=LEVELS)["x"]

    # The same noise for both, so that what is left are the terms of the hidden frames.
    whole, seen = (np.asarray(told(z, jnp.asarray(part))) for part in (x, gaps))
    square = lambda found: float(((found - x) ** 2).mean((-3, -2, -1))[..., hidden].mean())  # noqa: E731
    return {"nats": float(((whole - seen) / hidden.sum(1)).mean()), "mse_mean": square(images.mean(0)),
            "mse_draws": square(images)}, images  # fmt: skip


def fit_lengthscales(program, x, steps=200):
    """The program with the lengthscales that are most likely given the potentials of all frames."""
    centre, precision = jax.jit(jax.vmap(program.encoder.potentials))(jnp.asarray(x))
    log_length = program.prior_params["log_lengthscale"]
    optimiser = optax.adam(optax.cosine_decay_schedule(0.1, steps))

    @jax.jit
    def update(log_length, state):
        def loss(at):
            process = sp.Matern(np.arange(x.shape[1]), jnp.exp(at))
            return -Smoothed(process, centre, precision).log_normaliser.mean()

        change, state = optimiser.update(jax.grad(loss)(log_length), state)
        return log_length + change, state

    state = optimiser.init(log_length)
    for _ in range(steps):
        log_length, state = update(log_length, state)
    return program.replace(prior_params={"log_lengthscale": log_length})


def one_seed(frames, seed):
    data_key, score_key, bound_key = jax.random.split(jax.random.key(seed), 3)
    x = moving_disks(data_key, TRAIN + TEST, frames=FRAMES)["x"].values
    train, test = x[:TRAIN], x[TRAIN:]
    found, pictures = {}, {}
    for name, prior in PRIORS.items():
        program = sp.over_time(frames, prior(FRAMES, frames.latents.size))
        if name == "time":
            program = fit_lengthscales(program, train)
        codes = program.encode(test)[0].reshape(TEST, FRAMES, -1)
        bound = sp.evidence_bound(program, test, key=bound_key, levels=LEVELS, chunk=TEST)
        whole = bound["bound"].values
        found[name] = {
            "bound": float(bound["bound"].mean()), "kl": float(bound["kl"].sum("site").mean()),
            "curvature": float(np.nanmean(analyses.curvature(codes))),
            "lengthscale": np.exp(program.prior_params.get("log_lengthscale", np.log([1e-3]))).tolist(),
        }  # fmt: skip
        for kind in ("scattered", "block"):
            gaps, hidden = hide(test, kind, seed)
            found[name][kind], images = score(program, test, gaps, hidden, score_key)
            # On the same noise; a difference of two bounds, log p(x) and log p of what is seen, and no bound itself.
            rest = sp.evidence_bound(program, gaps, key=bound_key, levels=LEVELS, chunk=TEST)["bound"].values
            found[name][kind]["conditional_nats"] = float(((rest - whole) / hidden.sum(1)).mean())
            pictures[name, kind] = images[:, 0]
    for kind in ("scattered", "block"):
        _, hidden = hide(test, kind, seed)
        filled = interpolated(test, hidden)
        found.setdefault("pixels interpolated", {})[kind] = {
            "mse_mean": float(((filled - test) ** 2).mean((-3, -2, -1))[hidden].mean())
        }
        pictures["pixels", kind] = filled[0]
    pictures["true"] = test[0]
    return found, pictures


def picture(pictures):
    """One clip whose sixth to eighth frames are missing: true, seen, and draws of both posteriors."""
    true = pictures["true"]
    hidden = np.zeros(FRAMES, bool)
    hidden[BLOCK] = True
    rows = {"true": true, "seen": np.where(hidden[:, None, None, None], np.nan, true)}
    for name, label in (("time", "prior over time"), ("independent", "independent frames")):
        draws = pictures[name, "block"]
        rows |= {f"{label}, {what}": draw for what, draw in (("draw 1", draws[0]), ("draw 2", draws[1]))}
    figure = Figure(figsize=(8.0, 4.3))
    panels = figure.subplots(len(rows), FRAMES, gridspec_kw={"wspace": 0.06, "hspace": 0.06})
    for (label, clip), line in zip(rows.items(), panels, strict=True):
        for t, (image, panel) in enumerate(zip(clip, line, strict=True)):
            panel.set(xticks=[], yticks=[], facecolor="#F3E3D7", box_aspect=1)
            for side in panel.spines.values():
                side.set(color="#D55E00" if hidden[t] else "#D0D0D0", linewidth=1.6 if hidden[t] else 0.6)
            if np.isfinite(image).all():
                panel.imshow(image[0], cmap="gray", vmin=-1, vmax=1, interpolation="nearest")
        line[0].set_ylabel(label, rotation=0, ha="right", va="center", fontsize=8)
    for t in range(FRAMES):
        panels[0, t].set_title(str(t + 1), fontsize=8)
    figure.subplots_adjust(left=0.23, right=0.995, top=0.94, bottom=0.01)
    return figure


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("frames", type=Path, help="folder of a saved program of single disks")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    frames = sp.load(arguments.frames)
    for seed in arguments.seeds:
        found, pictures = one_seed(frames, seed)
        (arguments.out / f"seed_{seed}.json").write_text(json.dumps(found, indent=1))
        print(seed, json.dumps(found), flush=True)
        picture(pictures).savefig(arguments.out / f"clip_{seed}.png", dpi=110)

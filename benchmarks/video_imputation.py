"""A prior over time on codes of real video: does it straighten them, does it fill in frames (docs/analyses.md)?

    python -m benchmarks.video_imputation --train bigbuckbunny.mp4 Megamind.avi tree.avi \
        --test bikes.mp4 carphone_pristine.mp4 vtest.avi --out runs/video_time

The videos and the guided program of their stills are those of `benchmarks/video_straightness.py`. On its denoiser
stand programs of clips, whose encoder of frames is fitted on clips of the training videos: under a Matérn process, and
under independent frames, which says what the further steps do by themselves; with the weight of the KL that suits such
data, and with β = 1.

Straightness: posterior means turn less from frame to frame because they are smoothed, whatever was smoothed. The null
is the *kernel*: the mean, over axes, of the weights that the Matérn posterior gives the codes of single frames, applied
to codes of programs that know of no time, to pixels, components and random walks.

Imputation: of clips of the test videos every other frame is hidden, or the sixth to eighth. Errors are squared, of a
pixel in [−1, 1], of the mean of what is predicted: what the noise of a few samples adds to it is taken off.
"""

import time

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
from sklearn.decomposition import PCA

from benchmarks.imputation import fit_lengthscales, hide, independent, interpolated, over_time
from benchmarks.video_straightness import arguments, of_stills, patches, stills_and_clips
import sami_ppl as sp
from sami_ppl import analyses
from sami_ppl.analyses.trajectories import resampled_clips
from sami_ppl.distributions.matern import Smoothed

DRAWS, BATCH, RESAMPLES = 3, 8, 2000
BETAS = {"": None, ", β = 1": 1.0}
KINDS = ("alternate", "block")


def of_clips(frames: sp.Program, prior, clips: np.ndarray, beta: float | None, steps: int, key: jax.Array):
    """The program of clips on one of frames, its encoder fitted; lengthscales begin where they are most likely."""
    program = sp.over_time(frames, prior)
    if program.prior_params:
        program = fit_lengthscales(program, clips)
    stage = sp.Sized(steps=steps, batch=BATCH, validate_every=max(1, steps // 4), beta=beta)
    program, _ = sp.fit(program, clips, sp.EncoderOnly(stage, warm_steps=0, align=False), key=key, progress=False)
    return program


def own_codes(program: sp.Program, clips: np.ndarray) -> np.ndarray:
    """Posterior means (clip, frame, D) of every frame by itself."""
    single, _ = program.single()
    return single.encode(clips.reshape(-1, *clips.shape[2:]))[0].reshape(*clips.shape[:2], -1)


def smoothed_codes(program: sp.Program, clips: np.ndarray) -> np.ndarray:
    """Posterior means (clip, frame, D) under the prior over time."""
    return program.encode(clips)[0].reshape(*clips.shape[:2], -1)


def kernel(program: sp.Program, clips: np.ndarray) -> np.ndarray:
    """Weights (T, T) by which posterior means under the prior over time follow those of single frames, mean over axes.

    A frame's own mean m gives the centre c = (I + Λ⁻¹) m of its potential; Λ is the mean over frames of these clips.
    """
    _, precision = jax.jit(jax.vmap(program.encoder.potentials))(jnp.asarray(clips))
    mean = precision.mean((0, 1))
    shape = (clips.shape[1], len(mean))
    process = sp.Matern(np.arange(shape[0]), jnp.exp(program.prior_params["log_lengthscale"]))
    tiled = jnp.broadcast_to(mean, (*shape, shape[1]))
    follow = jax.jacobian(lambda centre: Smoothed(process, centre, tiled).mean)(jnp.zeros(shape))
    follow = follow @ (jnp.eye(shape[1]) + jnp.linalg.inv(mean))
    return np.asarray(jnp.diagonal(follow, axis1=1, axis2=3).mean(-1))


def straightness(programs: dict, clips: np.ndarray, train: np.ndarray, stills: np.ndarray, seed: int) -> pd.DataFrame:
    """Curvature of every clip, in columns by what runs and how: as it is, smoothed by the kernel, posterior means."""
    rng = np.random.default_rng(seed)
    count, frames = clips.shape[:2]
    size = programs["stills"].latents.size
    flat = clips.reshape(count, frames, -1)
    pca = PCA(size, random_state=0).fit(stills.reshape(len(stills), -1))
    order = rng.permuted(np.tile(np.arange(frames), (count, 1)), axis=1)
    moved = flat[..., rng.permutation(flat.shape[-1])].reshape(clips.shape)
    share = np.linspace(0, 1, frames, dtype=np.float32)[:, None, None, None]
    controls = {
        "frames in random order": np.take_along_axis(clips, order[:, :, None, None, None], 1),
        "pixels in another order": moved,
        "first frame fades to last": (1 - share) * clips[:, :1] + share * clips[:, -1:],
    }
    plain = {
        "pixels": flat - pca.mean_,
        "components": (flat - pca.mean_) @ pca.components_.T,
        "random walk": rng.standard_normal((count, frames, size)).cumsum(1),
        "stills": own_codes(programs["stills"], clips),
    }
    found = {(name, "", "as it is"): analyses.curvature(one) for name, one in plain.items()}
    for beta in BETAS:
        matern = programs[f"Matérn{beta}"]
        weights = kernel(matern, train)
        own = {name: own_codes(programs[f"{name}{beta}"], clips) for name in ("independent", "Matérn")}
        found |= {(name, beta, "as it is"): analyses.curvature(one) for name, one in own.items()}
        found |= {(name, beta, "kernel"): analyses.curvature(weights @ one) for name, one in (plain | own).items()}
        found["Matérn", beta, "posterior"] = analyses.curvature(smoothed_codes(matern, clips))
        for name, one in controls.items():
            found[name, beta, "as it is"] = analyses.curvature(own_codes(matern, one))
            found[name, beta, "posterior"] = analyses.curvature(smoothed_codes(matern, one))
    name = "Matérn, encoder of stills"
    found[name, "", "posterior"] = analyses.curvature(smoothed_codes(programs[name], clips))
    return pd.DataFrame(found)


def gains(turns: pd.DataFrame) -> pd.DataFrame:
    """By how many degrees the prior over time, and the kernel alone, straighten every clip."""
    found = {}
    for beta in BETAS:
        posterior, other = turns["Matérn", beta, "posterior"], turns["independent", beta, "as it is"]
        found |= {
            f"posterior, own codes of independent frames{beta}": other - posterior,
            f"posterior, its own codes{beta}": turns["Matérn", beta, "as it is"] - posterior,
            f"posterior, independent frames smoothed by the kernel{beta}": turns["independent", beta, "kernel"]
            - posterior,
            f"own codes, those of independent frames{beta}": other - turns["Matérn", beta, "as it is"],
            f"kernel, independent frames{beta}": other - turns["independent", beta, "kernel"],
        }
        for name in ("pixels", "components", "random walk"):
            found[f"kernel, {name}{beta}"] = turns[name, "", "as it is"] - turns[name, beta, "kernel"]
    return pd.DataFrame(found)


def squared(images: np.ndarray, true: np.ndarray) -> np.ndarray:
    """Squared errors (n,) of the mean over draws (draw, n, d), summed over d, less what the noise of the draws adds."""
    noise = images.var(0, ddof=1) / len(images) if len(images) > 1 else 0.0
    return ((images.mean(0) - true) ** 2 - noise).sum(-1)


def imputation(programs: dict, clips: np.ndarray, stills: np.ndarray, kind: str, seed: int) -> dict[str, pd.DataFrame]:
    """Squared errors of hidden frames, means for each clip: of pixels, and of what so many components tell of them.

    `codes`: the squared distance of codes to those that the program gives the frame itself, a coordinate.
    """
    gaps, hidden = hide(clips, kind, seed)
    gap_key, draw_key = jax.random.split(jax.random.key(seed))
    flat = clips.reshape(*clips.shape[:2], -1)
    true, rows = flat[hidden], np.nonzero(hidden)[0]
    pca = PCA(programs["stills"].latents.size, random_state=0).fit(stills.reshape(len(stills), -1))
    times, far = np.arange(clips.shape[1]), 2 * clips.shape[1]
    nearest = np.abs(times[:, None] - np.where(hidden[0], far, times)[None]).argmin(1)  # the same for all clips
    linear = interpolated(flat, hidden)[hidden]
    project = lambda x: pca.inverse_transform(pca.transform(x))  # noqa: E731
    images = {
        "pixels": linear[None], "nearest frame": flat[:, nearest][hidden][None],
        "components": project(linear)[None], "own components": project(true)[None],
    }  # fmt: skip
    codes = {}
    for name, program in programs.items():
        if name.startswith("independent"):
            continue
        single, _ = program.single()
        own = own_codes(program, clips)
        every = {f"{name}: own codes": own, f"{name}: codes interpolated": interpolated(own, hidden)}
        if single.encoder is programs["stills"].encoder and name != "stills":
            every = {}  # they are those of the stills' program
        drawn = {what: np.tile(one[hidden], (DRAWS, 1, 1)) for what, one in every.items()}
        if name.startswith("Matérn"):
            law = program.code_law(jnp.asarray(gaps))
            several = np.asarray(law.sample(gap_key, (DRAWS,))).reshape(DRAWS, *own.shape)
            drawn[f"{name}: posterior"] = several[:, hidden]
            every[f"{name}: posterior"] = np.asarray(law.mean).reshape(own.shape)
        codes |= {what: ((one - own)[hidden] ** 2).mean(-1) for what, one in every.items()}
        for what, z in drawn.items():
            made = sp.generate(single, z=z.reshape(-1, z.shape[-1]), key=draw_key)
            images[what] = made.reshape(DRAWS, *true.shape)
    errors = {what: squared(one, true) / true.shape[1] for what, one in images.items()}
    basis = pca.components_.T
    within = {what: squared(one @ basis, true @ basis) / true.shape[1] for what, one in images.items()}
    by_clip = lambda found: pd.DataFrame(found).groupby(rows).mean()  # noqa: E731
    return {"pixels": by_clip(errors), "components": by_clip(within), "codes": by_clip(codes)}


def told(values: pd.DataFrame, videos: np.ndarray, seed: int, beside: str | None = None) -> pd.DataFrame:
    """Means with 95 % intervals over videos and clips, by video and of all; `beside`: as shares of that column's."""
    table = {}
    for name in ("all", *np.unique(videos)):
        chosen = np.arange(len(videos)) if name == "all" else np.flatnonzero(videos == name)
        part, rng = values.values[chosen], np.random.default_rng(seed)
        base = None if beside is None else values[beside].values[chosen]
        rows = resampled_clips(videos[chosen], RESAMPLES, rng)
        mean = lambda at: np.nanmean(part[at], 0) / (1 if base is None else base[at].mean())  # noqa: B023, E731
        low, high = np.quantile([mean(at) for at in rows], [0.025, 0.975], axis=0)
        table |= {(name, "mean"): mean(slice(None)), (name, "low"): low, (name, "high"): high}
    return pd.DataFrame(table, index=values.columns)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--clips", type=int, default=600, help="of each training video")
    parser.add_argument("--clip-steps", type=int, default=400, help="of the encoders on clips")
    parser.add_argument("--hidden", type=int, default=80, help="clips of each test video of which frames are hidden")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    keys = jax.random.split(jax.random.key(options.seed), 6)
    stills, clips, videos = stills_and_clips(options, keys)
    moving = {"length": options.frames, "change": options.change}
    clip_key, fit_key = jax.random.split(keys[4])
    train = np.concatenate(patches(options.train, options.rows, options.side, options.clips, clip_key, **moving))
    train = np.random.default_rng(options.seed).permutation(train)
    frames = of_stills("guided", stills, options, keys)
    time_prior, no_prior = (make(options.frames, options.latents) for make in (over_time, independent))
    programs = {
        "stills": frames,
        "Matérn, encoder of stills": fit_lengthscales(sp.over_time(frames, time_prior), train),
    }
    for name, beta in BETAS.items():
        for kind, prior in {"independent": no_prior, "Matérn": time_prior}.items():
            began = time.perf_counter()
            programs[kind + name] = of_clips(frames, prior, train, beta, options.clip_steps, fit_key)
            print(f"{kind}{name}: {time.perf_counter() - began:.0f} s", flush=True)
    report(programs, stills, train, clips, videos, options)


def report(programs, stills, train, clips, videos, options) -> None:
    """Measure, print and keep."""
    for name, program in programs.items():
        if program.prior_params:
            print(name, "lengthscales", np.exp(program.prior_params["log_lengthscale"]).round(1), flush=True)
    pd.set_option("display.width", 250, "display.max_rows", 200, "display.max_columns", 50)
    turns = straightness(programs, clips, train, stills, options.seed)
    turns.to_csv(options.out / "curvature.csv")
    print("\ndegrees\n", told(turns, videos, options.seed).round(1).to_string(), flush=True)
    print("\ndegrees less\n", told(gains(turns), videos, options.seed).round(1).to_string(), flush=True)
    first = np.concatenate([np.flatnonzero(videos == name)[: options.hidden] for name in np.unique(videos)])
    clips, videos = clips[first], videos[first]
    for kind in KINDS:
        began = time.perf_counter()
        for what, errors in imputation(programs, clips, stills, kind, options.seed).items():
            errors.to_csv(options.out / f"{kind}_{what}.csv")
            print(f"\n{kind}, squared errors of {what}\n", told(errors, videos, options.seed).round(4).to_string())
            if what != "codes":
                shares = told(errors, videos, options.seed, beside="pixels")
                print(f"\n{kind}, {what}, shares of the error of interpolated pixels\n", shares.round(3).to_string())
        print(f"{time.perf_counter() - began:.0f} s", flush=True)


if __name__ == "__main__":
    main()

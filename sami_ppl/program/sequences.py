"""Programs of sequences, from programs of single frames and a prior over time."""

from functools import lru_cache

import numpy as np
import numpyro
from numpyro import distributions as dist
import xarray as xr

from sami_ppl.decoders.guidance import check_guided
from sami_ppl.encoders.frames import FramewiseDenoiser, FramewiseEncoder
from sami_ppl.priors.read import Given, Prior, read_prior
from sami_ppl.priors.sites import Process
from sami_ppl.program.program import Program


def over_time(program: Program, prior: Prior, *, given: Given | None = None) -> Program:
    """The program of sequences whose frames are observations of `program` and whose codes have the prior `prior`.

        def prior():
            lengthscale = jnp.exp(numpyro.param("log_lengthscale", jnp.zeros(3)))
            numpyro.sample("z", sp.Matern(jnp.arange(12.0), lengthscale))

        clips = sp.over_time(program, prior)

    Observations are x (obs, T, *frame); frames that are NaN are missing. Denoiser and encoder are reused as they are:
    frames are independent given their codes, and the guide is q(z) ∝ p(z) ∏_t q(z_t | x_t) / p(z_t), smoothed over time
    (`framewise`). Fitting trains the prior's parameters, and the networks unless they are left out. `given` as for
    `Program`: `times`, for instance, may be a variable of the data.

    Raises ValueError unless the decoder is guided, the frames have the prior N(0, I) and `prior` has one site, a
    `Matern` process over as many factors; TypeError for an encoder of frames that is not Gaussian; and what
    `read_prior` raises.
    """
    if program.of_sequences:
        raise ValueError("program is one of sequences already: give one of single frames, frames_of(program)")
    check_guided(program.denoiser, "a program of sequences")
    if other := [site.name for site in program.latents.sites if not site.standard]:
        raise ValueError(
            f"the frames' prior must be Normal, so that each code has the marginal N(0, 1) of a process, but site "
            f"{other[0]!r} is not a fixed Normal: fit the frames with dist.Normal(0, 1)"
        )
    site = read_prior(prior, given).sites[0]
    frames = site.event_shape[0] if isinstance(site, Process) else 1
    return Program(
        prior, FramewiseDenoiser(program.denoiser, frames), FramewiseEncoder(program.encoder, frames),
        sampler=program.sampler, given=given, event_dims=("time", *program.event_dims),
    )  # fmt: skip


def frames_of(program: Program) -> Program:
    """The program of single frames of one of sequences, with the prior N(0, I).

    Raises ValueError for a program that is not of sequences.
    """
    denoiser, encoder = program.denoiser, program.encoder
    if not isinstance(denoiser, FramewiseDenoiser) or not isinstance(encoder, FramewiseEncoder):
        raise ValueError("program is not one of sequences: make one by over_time(program, prior)")
    site = program.latents.sites[0]
    return Program(
        _independent(site.name, encoder.frame.latent_size, site.dims[1]), denoiser.frame, encoder.frame,
        sampler=program.sampler, event_dims=program.event_dims[1:],
    )  # fmt: skip


def with_frames(program: Program, frames: Program) -> Program:
    """The program of sequences with the networks of a program of its single frames."""
    count = program.event_shape[0]
    return program.replace(
        denoiser=FramewiseDenoiser(frames.denoiser, count), encoder=FramewiseEncoder(frames.encoder, count)
    )


def single_frames(data: xr.Dataset | np.ndarray) -> xr.Dataset | np.ndarray:
    """The frames of sequences as observations by themselves: those that are seen, with their factors and split.

    `data`: a Dataset with x (obs, time, *frame), or an array of that shape; the same comes back, on obs.
    """
    if not isinstance(data, xr.Dataset):
        each = np.asarray(data).reshape(-1, *np.shape(data)[2:])
        return each[~np.isnan(each.reshape(len(each), -1)).any(1)]
    frames = data.stack(frame=("obs", "time"), create_index=False).drop_vars(["obs", "time"], errors="ignore")
    frames = frames.rename(frame="obs").transpose("obs", ...)
    missing = np.isnan(frames["x"].values.reshape(frames.sizes["obs"], -1)).any(1)
    return frames.isel(obs=np.flatnonzero(~missing))


@lru_cache(maxsize=32)
def _independent(name: str, size: int, dim: str) -> Prior:
    def prior() -> None:
        numpyro.sample(name, dist.Normal(0, 1).expand([size]).to_event(1), infer={"event_dims": [dim]})

    return prior

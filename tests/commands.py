"""What tests of the command line share: settings of small runs, as words, and what a refusal looks like."""

SMALL = (
    "observations=60", "resolution=8", "width=8", "depth=1", "posterior_obs=3", "draws=4", "model.log_snr_min=-4",
)  # fmt: skip


FREE = tuple(setting for setting in SMALL if not setting.startswith("resolution"))


def sets(*settings):
    return [part for setting in settings for part in ("--set", setting)]


def stages(*names, steps=2, batch=8):
    return [f"{n}.{k}={v}" for n in names for k, v in {"steps": steps, "batch": batch, "validate_every": 2}.items()]


LATE = (*SMALL, *stages("denoiser", "encoder"), "warm_steps=2")


def refused(result):
    """The message of a command that must end as the user's mistake does."""
    code, out, err = result
    assert code == 2, err
    assert out == ""
    assert "Traceback" not in err
    _, found, message = f"\n{err}".rpartition("\nsami: ")  # after what was being done
    assert found, err
    return f"sami: {message}"

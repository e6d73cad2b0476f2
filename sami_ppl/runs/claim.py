"""The folder of a run: taken by one run alone, given back where it has failed before anything was written."""

from collections.abc import Iterator
from contextlib import contextmanager
import json
import os
from pathlib import Path
import shutil
from typing import Any

from sami_ppl._util.errors import UserError
from sami_ppl._util.files import written_aside
from sami_ppl._util.locks import LOCK, held
from sami_ppl.fitting.checkpoint import CheckpointError
from sami_ppl.runs.reading import LATENTS
from sami_ppl.saving.save import LoadError

AFTER_THE_FIT = ("settings.inference.draws:", "settings.inference.posterior_obs:")
"""Settings that no checkpoint depends on."""
LENGTHS = (".steps", ".epochs")
"""Settings of a stage of which its checkpoints know whether they may change."""


@contextmanager
def claimed(out: Path, description: dict[str, Any], *, resume: bool, upgraded: bool = False) -> Iterator[None]:
    """Take the folder for a run, alone, and give it back where the run fails before it has written anything.

    What fails so early are checks, of settings and data against the program, or of a denoiser to be reused: ValueError
    and LoadError come out as UserError.
    """
    check_writable(out)
    with held(out):
        before = _claim(out, description, resume=resume, upgraded=upgraded)
        try:
            yield
        except Exception as error:
            if before is not None and isinstance(error.__cause__, CheckpointError):  # it is the run that it was
                write_json(out / "config.json", before)
            if {file.name for file in out.iterdir()} <= {"config.json", LATENTS, LOCK}:
                shutil.rmtree(out)
                if isinstance(error, ValueError | LoadError):
                    raise UserError(str(error)) from error
            raise


def check_writable(out: Path) -> None:
    """Raise UserError where a folder could not be made or written to: cheap, to be called before anything long."""
    nearest = next(place for place in (out, *out.absolute().parents) if place.exists())
    if not nearest.is_dir():
        raise UserError(_FOREIGN.format(out) if nearest == out else f"out={out}: {nearest} is no folder")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise UserError(f"out={out}: {nearest} cannot be written to, choose another out=")


_FOREIGN = "out={} exists and holds something else: choose a new folder"


def _claim(out: Path, description: dict[str, Any], *, resume: bool, upgraded: bool) -> dict[str, Any] | None:
    """Take the folder for this run, or say why not; nothing already there is lost. Returns the description it had.

    With `resume`, settings of what comes after the fit may be others than before, and numbers of steps, of which the
    checkpoints say whether they may; with `upgraded`, versions of libraries, which are kept as `upgraded_from`.
    """
    file = out / "config.json"
    plain = json.loads(json.dumps(description))
    if not file.exists():
        if any(found.name != LOCK for found in out.iterdir()):
            raise UserError(_FOREIGN.format(out))
        write_json(file, plain)
        return None
    found = json.loads(file.read_text())
    earlier, before = found.get("upgraded_from", []), {k: v for k, v in found.items() if k != "upgraded_from"}
    different = sorted(d for d in _differences(before, plain) if not d.startswith(AFTER_THE_FIT))
    versions = [d for d in different if d.startswith("versions.")]
    different = [d for d in different if d not in versions and not (resume and d.split(":")[0].endswith(LENGTHS))]
    if different:
        raise UserError(
            f"out={out} holds a run with other settings:\n  " + "\n  ".join(different) + "\nchoose another out="
        )
    if not resume:
        raise UserError(f"out={out} holds this run already: continue it with resume=True or choose another out=")
    if versions and not upgraded:
        raise UserError(
            f"out={out} was begun with other versions:\n  " + "\n  ".join(versions) + "\ngo on with those of now by "
            "upgraded=True, where last digits may come out otherwise, or install those of then"
        )
    if versions:
        earlier = [*earlier, found["versions"]]
    write_json(file, plain | ({"upgraded_from": earlier} if earlier else {}))
    return found


def _differences(found: Any, wanted: Any, path: str = "") -> list[str]:
    if isinstance(found, dict) and isinstance(wanted, dict):
        keys = {**found, **wanted}
        return [d for k in keys for d in _differences(found.get(k), wanted.get(k), f"{path}.{k}" if path else k)]
    return [] if found == wanted else [f"{path}: {found!r} there, {wanted!r} here"]


def write_json(file: Path, content: Any) -> None:
    """Write JSON aside and rename it, so that no half-written file is left."""
    with written_aside(file) as part:
        part.write_text(json.dumps(content, indent=1))

"""Checkpoints of a run: the latest state and the best one, by orbax."""

import itertools
import json
from pathlib import Path
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import preservation_policy as policy

from sami_ppl._util.errors import attempt

LENGTHS = {"steps", "epochs", "ends"}
"""Of a signature: what may differ where a stage that has come to its end is made longer."""


class CheckpointError(RuntimeError):
    """A checkpoint is missing, damaged, or belongs to another run."""


class Checkpoints:
    """The checkpoints of one stage in a folder: the latest and the best by validation loss are kept.

    `signature` says what run they belong to (configuration, seed, sizes); a checkpoint of another signature is
    refused with the difference. Without `resume`, a folder that holds checkpoints is refused: none is overwritten.

    Of a stage, `signature` has its number of `steps`. It may be larger than that of the checkpoint if this is the
    stage's last: `ends` are then the steps at which the stage came and will come to its end, and `extended` is True.
    """

    def __init__(self, folder: Path, signature: dict[str, Any], *, resume: bool = False):
        self.folder, self.signature = Path(folder).absolute(), json.loads(json.dumps(signature, default=str))
        best = policy.BestN(get_metric_fn=lambda metrics: -metrics["loss"], n=1, keep_checkpoints_without_metrics=False)
        # NumPy's best-only policies would delete the latest state, and a resumed run would go back in time.
        options = ocp.CheckpointManagerOptions(
            preservation_policy=policy.AnyPreservationPolicy([policy.LatestN(1), best]),
            best_fn=lambda metrics: -metrics["loss"],
            enable_async_checkpointing=False,
            create=False,
            # Of several processes only the first has checkpoints: no other is waited for.
            multiprocessing_options=ocp.options.MultiprocessingOptions(
                primary_host=jax.process_index(), active_processes={jax.process_index()}
            ),
        )
        self.folder.mkdir(parents=True, exist_ok=True)
        manager, error = attempt(lambda: ocp.CheckpointManager(self.folder, options=options))
        if manager is None:
            raise CheckpointError(_damaged(self.folder, None, error)) from error
        self.manager = manager
        if not resume and self.manager.latest_step() is not None:
            raise CheckpointError(
                f"{self.folder} holds checkpoints already: continue with resume=True, or choose another out="
            )
        self.ends, self.extended = self._ends()
        if self.ends:
            self.signature["ends"] = list(self.ends)

    def _ends(self) -> tuple[tuple[int, ...], bool]:
        steps = self.signature.get("steps")
        if steps is None:
            return (), False
        step, found = self._latest() or (0, {})
        if steps == found.get("steps"):
            return tuple(found["ends"]), False
        extended = steps > step == found.get("steps")
        return ((*found["ends"], steps), True) if extended else ((steps,), False)

    def _latest(self) -> tuple[int, dict[str, Any]] | None:
        """The latest step and its signature, or None where there is none yet. Raises CheckpointError."""
        step = self.manager.latest_step()
        if step is None:
            return None
        found = self._read(step, signature=ocp.args.JsonRestore())
        found = found.get("signature") if isinstance(found, dict) else None
        if not isinstance(found, dict) or ("steps" in found and "ends" not in found):
            raise CheckpointError(_damaged(self.folder, step, ValueError("its signature is not there")))
        return step, found

    def _read(self, step: int, **item: Any) -> Any:
        """One item of a checkpoint. Raises CheckpointError."""
        (name,) = item
        found, error = attempt(lambda: self.manager.restore(step, args=ocp.args.Composite(**item))[name])
        if error is not None:
            raise CheckpointError(_damaged(self.folder, step, error)) from error
        return found

    def save(self, step: int, state: Any, loss: float | None) -> None:
        """Write the state after `step` steps; `loss`, of the held-out data, where they have been looked at.

        Raises CheckpointError where it cannot be written.
        """
        arguments = ocp.args.Composite(
            state=ocp.args.StandardSave(jax.tree.map(_to_host, state)),
            signature=ocp.args.JsonSave({"signature": self.signature}),
        )
        metrics = None if loss is None else {"loss": loss}
        _, error = attempt(lambda: self.manager.save(step, args=arguments, metrics=metrics, force=True))
        if error is not None:
            raise CheckpointError(
                f"the checkpoint of step {step} cannot be written to {self.folder} ({_reason(error)}): make room, or "
                "see that it can be written to, then go on with resume=True"
            )

    def restore(self, like: Any) -> Any | None:
        """The latest state, or None where there is none yet. Raises CheckpointError if it cannot be used."""
        latest = self._latest()
        if latest is None:
            return None
        step, found = latest
        different = {k for k in {*found, *self.signature} if found.get(k) != self.signature.get(k)}
        different -= LENGTHS if self.extended else {"ends"}
        if different:
            lines = [f"  {k}: {found.get(k)!r} there, {self.signature.get(k)!r} here" for k in sorted(different)]
            if "steps" in different:
                lines.append(
                    f"A stage can be made longer, not shorter, once it has come to its end, where its learning rate "
                    f"is zero; this one is at step {step:,}"
                )
            raise CheckpointError(
                f"the checkpoint in {self.folder} belongs to another run:\n" + "\n".join(lines)
                + "\nrepeat the call with the settings of that run, or choose another out="
            )  # fmt: skip
        host = jax.tree.map(_to_host, like)
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, host)
        state = self._read(step, state=ocp.args.StandardRestore(abstract))
        _, error = attempt(lambda: jax.tree.map(_check_same_kind, state, host))
        if error is not None:
            raise CheckpointError(_damaged(self.folder, step, error)) from error
        return jax.tree.map(_from_host, state, like)

    def close(self) -> None:
        """Wait for what is being written."""
        self.manager.close()


# Orbax refuses arrays of one device where there are several processes, and takes them from the host anywhere.
def _to_host(leaf: jax.Array) -> np.ndarray:
    is_key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    return np.asarray(jax.random.key_data(leaf) if is_key else leaf)


def _check_same_kind(found: np.ndarray, wanted: np.ndarray) -> None:
    if found.shape != wanted.shape or found.dtype != wanted.dtype:
        raise ValueError(f"{found.dtype}{list(found.shape)} where {wanted.dtype}{list(wanted.shape)} should be")


def _from_host(leaf: np.ndarray, like: jax.Array) -> jax.Array:
    if jnp.issubdtype(like.dtype, jax.dtypes.prng_key):
        return jax.random.wrap_key_data(jnp.asarray(leaf), impl=jax.random.key_impl(like))
    return jnp.asarray(leaf)


def _reason(error: Exception | None) -> str:
    reason = str(error).strip()
    # Tensorstore says first what it was doing, at length.
    if found := re.search(r"([^:]+) \[os_error_code='\d+'\]", reason):
        return found[1].strip()
    return f"{type(error).__name__}: {reason.splitlines()[0][:200]}" if reason else type(error).__name__


def _damaged(folder: Path, step: int | None, error: Exception | None) -> str:
    what = "checkpoint" if step is None else f"checkpoint of step {step}"
    return (
        f"the {what} in {folder} cannot be read ({_reason(error)}). It is truncated or damaged: remove that folder to "
        "start this stage again, or choose another out="
    )


def check_extension(out: Path, steps: dict[str, int]) -> None:
    """Raise CheckpointError where a stage would be made longer on which a later one was built already.

    `steps`: of every stage by its name, in the order in which they are taken; checkpoints are in `out/checkpoints`.
    """
    folders = {name: Path(out) / "checkpoints" / name for name in steps}
    names = [name for name, folder in folders.items() if folder.exists()]
    for name, later in itertools.pairwise(names):
        if Checkpoints(folders[name], {"steps": steps[name]}, resume=True).extended and any(folders[later].iterdir()):
            raise CheckpointError(
                f"{name} cannot be made longer, {later} has been fitted to it: make {later} longer, or fit into "
                "another out="
            )

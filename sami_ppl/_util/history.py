"""The log of a fit: one record per validation, its line beside a bar, and the optional TensorBoard writer."""

from collections.abc import Iterator, Mapping, Sequence
import contextlib
import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sami_ppl._util.files import written_aside
from sami_ppl._util.tables import as_html, table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LABELLED = 6
"""Axes of a site whose labels a progress bar has room for."""


class History:
    """Records of a fit, one dict per validation, kept in memory and, given a file, as JSON lines in it.

    With the extra `sami_ppl[tensorboard]` installed, every number also goes to TensorBoard events beside the file.
    """

    def __init__(
        self,
        file: Path | None = None,
        *,
        keep: int = 0,
        stage: str = "fit",
        axes: Mapping[str, Sequence[str]] | None = None,
    ):
        """`keep`: step from which the run goes on; records of this stage after it are dropped.

        `axes`: names of the axes of those sites that have labels, which go with the KL of a record.
        """
        self.file, self.stage, self.records, self.axes = file, stage, [], dict(axes or {})
        if file is not None and file.exists():
            records = read_history(file)
            self.records = [r for r in records if r["stage"] != stage or r["step"] <= keep]
            text = "".join(json.dumps(r) + "\n" for r in self.records)
            if text != file.read_text():
                with written_aside(file) as part:
                    part.write_text(text)

    def add(self, record: dict[str, Any]) -> None:
        """Append a record, with arrays as lists."""
        plain = {"stage": self.stage, **{k: _plain(v) for k, v in record.items()}}
        if self.axes and plain.get("kl"):
            plain["axes"] = {site: list(names) for site, names in self.axes.items()}
        self.records.append(plain)
        if self.file is not None:
            with self.file.open("a") as out:
                out.write(json.dumps(plain) + "\n")
            _write_events(self.file.parent / "tensorboard" / self.stage, plain)

    @classmethod
    def joined(cls, histories: "Sequence[History]") -> "History":
        """One log of several stages, in the order in which they were taken."""
        joined = cls(stage=histories[-1].stage)
        joined.file = histories[-1].file
        joined.records = [record for history in histories for record in history.stage_records()]
        return joined

    def __repr__(self) -> str:
        if not self.records:
            return f"History of {self.stage}: no records"
        rows = [("stage", "step", "loss", "bound", "KL", "seconds")]
        for stage in dict.fromkeys(record["stage"] for record in self.records):
            records = [record for record in self.records if record["stage"] == stage]
            best = min(records, key=lambda record: record.get("loss", math.inf))
            # The first, the best and the last, once each.
            kept = [r for r in records if r is records[0] or r is best or r is records[-1]]
            rows += [_row(record) for record in kept]
        return f"History: {len(self.records)} records, nats per observation\n{table(rows)}"

    def _repr_html_(self) -> str:
        return as_html(repr(self))

    def plot(self) -> "Figure":
        """Losses and KL per axis against the step, a panel for each stage, in nats: `sami_ppl.plots.curves`.

        Raises ValueError without records.
        """
        from sami_ppl.plots import curves

        return curves(self.records)

    def stage_records(self) -> list[dict[str, Any]]:
        """The records of this stage."""
        return [r for r in self.records if r["stage"] == self.stage]


def _row(record: dict[str, Any]) -> tuple[str, ...]:
    kl = sum(float(np.sum(value)) for value in (record.get("kl") or {}).values())
    numbers = [f"{record[name]:.1f}" if name in record else "" for name in ("loss", "bound")]
    seconds = f"{record['seconds']:.0f}" if "seconds" in record else ""
    return (record["stage"], f"{record['step']:,}", *numbers, f"{kl:.2f}" if record.get("kl") else "", seconds)


def _write_events(folder: Path, record: dict[str, Any]) -> None:
    try:
        from tensorboardX import SummaryWriter
    except ImportError:
        return
    # The files' names hold the second only: without a suffix, two records within one would overwrite each other.
    with SummaryWriter(str(folder), filename_suffix=f".{record['step']}") as writer:
        for name, value in record.items():
            if name not in ("stage", "step", "log_snr", "axes") and value is not None:
                for label, number in _scalars(name, value):
                    writer.add_scalar(label, number, record["step"])


def _scalars(name: str, value: Any) -> Iterator[tuple[str, float]]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _scalars(f"{name}/{key}", inner)
    elif isinstance(value, list):
        for i, inner in enumerate(value):
            yield from _scalars(f"{name}/{i}", inner)
    else:
        yield name, value


def read_history(file: Path) -> list[dict[str, Any]]:
    """Records from a file of JSON lines; a last line cut short by an interruption is left out."""
    records = []
    for line in file.read_text().splitlines():
        with contextlib.suppress(json.JSONDecodeError):
            records.append(json.loads(line))
    return records


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if value is None or isinstance(value, str | int | float | bool):
        return value
    return np.asarray(value, dtype=float).tolist()


def summary_line(record: dict[str, Any]) -> str:
    """One line for the bar: loss, KL per axis, penalties, and errors without z, with the own, with another's."""
    parts = [f"loss {record['loss']:.1f}", f"bound {record['bound']:.1f}"]
    if record.get("kl"):
        names = record.get("axes", {})
        parts.append("kl " + ", ".join(_site_kl(site, kl, names.get(site, ())) for site, kl in record["kl"].items()))
    parts += [f"penalty {name} {value:.2f}" for name, value in record.get("penalties", {}).items()]
    if record.get("unguided") is not None:
        parts.append(f"error {sum(record['unguided']):.1f}")
    if record.get("own") is not None:
        parts.append(f"with own z {sum(record['own']):.1f}, another's {sum(record['shuffled']):.1f}")
    return " · ".join(parts)


def _site_kl(site: str, kl: Any, names: Sequence[str]) -> str:
    """The KL of a site, with the labels of its axes where it has words for them and the line has room."""
    numbers = [f"{value:.2f}" for value in np.atleast_1d(kl)]
    labels = [name[len(site) + 1 : -1] for name in names]
    words = any(label and not label.replace(",", "").isdigit() for label in labels)
    if words and len(labels) == len(numbers) <= LABELLED:
        numbers = [f"{label} {number}" for label, number in zip(labels, numbers, strict=True)]
    return " ".join([site, *numbers])

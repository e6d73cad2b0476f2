"""A program in words: the lines that `repr(program)` and `program.describe()` print."""

from collections.abc import Sequence
from typing import Any

import equinox as eqx
import jax
from jax.core import Tracer

from sami_ppl._util.tables import as_html, few, table
from sami_ppl.encoders.encoder import AbstractEncoder, AbstractWrapper, DiagonalEncoder, NetworkEncoder
from sami_ppl.nn.masked import unmasked
from sami_ppl.priors.sites import LatentSite

SITES = 8
"""Sites that the short summary lists, at most."""


class Readable(eqx.Module):
    """What a program prints as; `eqx.tree_pformat(program)` gives all layers."""

    def describe(self) -> str:
        """All that is worth reading of a program: its summary, transforms of sites, networks, origin."""
        return f"{self!r}\n\n{details(self)}" if concrete(self) else repr(self)

    def __repr__(self) -> str:
        if not concrete(self):
            return eqx.tree_pformat(self)  # the copies that JAX traces hold no numbers to tell of
        from sami_ppl.diagnostics.fitted import not_fitted  # it builds on programs

        program: Any = self
        return summary(program, not_fitted(program))

    def _repr_html_(self) -> str:
        return as_html(repr(self))


def concrete(program: Any) -> bool:
    """Whether the numbers of a program can be read: not while JAX traces it, and not where only shapes are left."""
    leaves = jax.tree.leaves(program)
    arrays = [leaf for leaf in leaves if eqx.is_array(leaf)]
    return len(arrays) > 0 and not any(isinstance(leaf, Tracer | jax.ShapeDtypeStruct) for leaf in leaves)


def summary(program: Any, not_fitted: Sequence[str]) -> str:
    """At most 20 lines for most programs. `not_fitted`: the networks that have never been trained."""
    latents = program.latents
    listed = [*latents.sites, *latents.global_sites]
    rows = [("site", "law", "shape", "dims", "guide", "axes of z"), *(_row(program, s) for s in listed[:SITES])]
    lines = [f"Program of {_sized(program.event_shape)} ({', '.join(program.event_dims)}), {latents.size} axes of z"]
    lines.append(table(rows, indent="  "))
    if len(listed) > SITES:
        lines.append(f"  … and {len(listed) - SITES} more sites: print(program.describe())")
    facts = [(part, _network(getattr(program, part))) for part in ("denoiser", "encoder")]
    schedule = program.denoiser.schedule
    facts.append(
        ("schedule", f"{type(schedule).__name__}, log-SNR {schedule.log_snr_min:g} to {schedule.log_snr_max:g}")
    )
    facts.append(("sampler", f"{type(program.sampler).__name__}, {program.sampler.evaluations} evaluations"))
    facts.append(("fitted", f"never: {', '.join(not_fitted)}" if not_fitted else "yes"))
    if program.prior_params:
        facts.append(("parameters", "of prior and guide: " + few(list(program.prior_params), 4)))
    if latents.arguments:
        facts.append(("prior takes", few(latents.arguments, 6)))
    return "\n".join([*lines, table(facts, indent="  ")])


def details(program: Any) -> str:
    """What the short summary leaves out: transforms, how the networks see their input, structure, origin."""
    encoder = _innermost(program.encoder)
    lines = ["Sites", _indented(program.latents.describe()), "Networks"]
    for part in ("denoiser", "encoder"):
        network = getattr(program, part)
        lines.append(f"  {part}: {_network(network)}")
        lines += [f"    {name}: {_structure(child)}" for name, child in _children(network)]
    if isinstance(encoder, NetworkEncoder):
        lines.append(f"  the encoder sees noise as {encoder.noise!r}; data mean {encoder.mean:g}, std {encoder.std:g}")
    if isinstance(encoder, DiagonalEncoder):
        lines.append(f"  least scale of the encoder: {encoder.min_scale:g}")
    rows = [
        ("global guide", program.global_guide if isinstance(program.global_guide, str) else "a NumPyro function"),
        ("origin", program.origin.file if program.origin is not None else "built in Python"),
    ]
    return "\n".join([*lines, "Else", table(rows, indent="  ")])


def _row(program: Any, site: LatentSite) -> tuple[str, ...]:
    span = str(site.start) if site.size == 1 else f"{site.start}–{site.start + site.size - 1}"
    is_global = any(site is other for other in program.latents.global_sites)
    guide = program.global_guide if isinstance(program.global_guide, str) else "its own"
    return (
        site.name,
        str(site.law.get("kind", "")),
        _sized(site.event_shape),
        ", ".join(site.dims),
        guide if is_global else program.encoder.family_of(site.name),
        "global" if is_global else span,
    )


def _innermost(encoder: AbstractEncoder) -> AbstractEncoder:
    while isinstance(encoder, AbstractWrapper) or encoder.single is not encoder:
        encoder = encoder.base if isinstance(encoder, AbstractWrapper) else encoder.single
    return encoder


def _network(part: Any) -> str:
    inside = [type(unmasked(child)).__name__ for name, child in _children(part) if name in ("network", "base", "frame")]
    return f"{type(part).__name__}{f' of {inside[0]}' if inside else ''}, {_parameters(part):,} parameters"


def _children(part: Any) -> list[tuple[str, Any]]:
    """Modules that a module holds directly and that have parameters."""
    return [(name, child) for name, child in vars(part).items() if isinstance(child, eqx.Module) and _parameters(child)]


def _structure(module: Any) -> str:
    return f"{type(module).__name__}, {_parameters(module):,} parameters"


def _parameters(part: Any) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(eqx.filter(part, eqx.is_inexact_array)))


def _sized(shape: tuple[int, ...]) -> str:
    return "×".join(map(str, shape)) or "scalar"


def _indented(text: str) -> str:
    return "\n".join("  " + line for line in text.splitlines())

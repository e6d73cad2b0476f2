"""What the law of each site of a NumPyro function depends on, read from the computation itself."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
from numpyro.ops.provenance import eval_provenance

Names = Mapping[str, frozenset[str]]


class Dependence(NamedTuple):
    """Of one site: the names, by kind, on which its distribution depends directly, and those that move its support."""

    law: Names
    support: Names


def dependences(
    trace_of: Callable[[dict[str, dict[str, Any]]], dict[str, Any]], values: Mapping[str, Mapping[str, Any]]
) -> dict[str, Dependence]:
    """The dependence of every site in `values["sites"]`.

    `values`: by kind ("sites" and others), by name. `trace_of` gives the trace of the function with these held at the
    values that it is given. Found by jaxpr, not by trial: a coefficient counts though it is 0 (Wingate et al. 2011,
    *Nonstandard interpretations of probabilistic programs for efficient inference*).
    """

    def laws(**flat: Any) -> dict[str, Any]:
        held = {kind: {name: flat[f"{kind} {name}"] for name in of} for kind, of in values.items()}
        trace = trace_of(held)
        return {n: (_leaves(trace[n]["fn"]), _leaves(trace[n]["fn"].support)) for n in values["sites"]}

    def by_kind(leaves: list[frozenset[str]]) -> Names:
        found = frozenset().union(*leaves)
        return {kind: frozenset(name for name in of if f"{kind} {name}" in found) for kind, of in values.items()}

    found = eval_provenance(laws, **{f"{kind} {name}": v for kind, of in values.items() for name, v in of.items()})
    return {name: Dependence(by_kind(law), by_kind(support)) for name, (law, support) in found.items()}


def _leaves(tree: Any) -> list[Any]:
    try:
        return jax.tree.leaves(tree)
    except NotImplementedError:  # a constraint that has no parameters, or does not name them
        return []

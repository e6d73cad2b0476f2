"""Posteriors as ArviZ DataTrees: of one program, in memory or streamed to a zarr store, and of several side by side."""

from sami_ppl.posteriors.amortised import posterior as posterior
from sami_ppl.posteriors.combine import combine as combine
from sami_ppl.posteriors.tree import save_tree as save_tree

"""Estimates of the evidence log p(x): the bound, tighter bounds, and the density of the probability flow.

They belong to different models unless the networks are exact: the bounds to the one that is trained and sampled by
reverse diffusion, the flow's density to the deterministic sampler. They never share a figure.
"""

from sami_ppl.evidence.elbo import evidence_bound as evidence_bound
from sami_ppl.evidence.elbo import first as first
from sami_ppl.evidence.elbo import importance_proposal as importance_proposal
from sami_ppl.evidence.elbo import mean_and_error as mean_and_error
from sami_ppl.evidence.elbo import summarise as summarise
from sami_ppl.evidence.flow import flow_log_prob as flow_log_prob
from sami_ppl.evidence.iwae import importance_weighted_bound as importance_weighted_bound
from sami_ppl.evidence.pixels import bits_per_dim as bits_per_dim

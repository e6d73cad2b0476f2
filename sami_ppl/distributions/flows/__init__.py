"""Normalising flows of flowjax in programs: learned priors, and posteriors given features.

They need the extra `sami_ppl[flows]`.
"""

from sami_ppl.distributions.flows.coupling import coupling_flow as coupling_flow
from sami_ppl.distributions.flows.distribution import FlowDistribution as FlowDistribution
from sami_ppl.distributions.flows.distribution import flow_distribution as flow_distribution

"""The figures of the SAMI paper for any fitted program: each a function to an `xarray.Dataset`, and its plot.

Each file holds what one subject computes and, beside it, `plot_<name>`, which takes the Dataset and returns a figure:
what a variable means and how it is drawn are read together. The information spectrum is in `diagnostics`.
"""

from sami_ppl.analyses.activity import axis_activity as axis_activity
from sami_ppl.analyses.activity import plot_axis_activity as plot_axis_activity
from sami_ppl.analyses.attributes import attribute_sparsity as attribute_sparsity
from sami_ppl.analyses.attributes import hoyer_sparsity as hoyer_sparsity
from sami_ppl.analyses.attributes import plot_attribute_sparsity as plot_attribute_sparsity
from sami_ppl.analyses.bottleneck import BottleneckComponents as BottleneckComponents
from sami_ppl.analyses.bottleneck import bottleneck_components as bottleneck_components
from sami_ppl.analyses.factors import association as association
from sami_ppl.analyses.factors import factor_grid as factor_grid
from sami_ppl.analyses.factors import plot_association as plot_association
from sami_ppl.analyses.factors import plot_factor_grid as plot_factor_grid
from sami_ppl.analyses.gap import amortisation_gap as amortisation_gap
from sami_ppl.analyses.gap import plot_amortisation_gap as plot_amortisation_gap
from sami_ppl.analyses.geometry import axis_geometry as axis_geometry
from sami_ppl.analyses.geometry import coherence as coherence
from sami_ppl.analyses.geometry import plot_axis_geometry as plot_axis_geometry
from sami_ppl.analyses.geometry import plot_posterior_covariance_spectrum as plot_posterior_covariance_spectrum
from sami_ppl.analyses.geometry import posterior_covariance_spectrum as posterior_covariance_spectrum
from sami_ppl.analyses.geometry import sensitivity as sensitivity
from sami_ppl.analyses.noise import plot_posterior_by_noise as plot_posterior_by_noise
from sami_ppl.analyses.noise import plot_variance_reduction as plot_variance_reduction
from sami_ppl.analyses.noise import posterior_by_noise as posterior_by_noise
from sami_ppl.analyses.noise import variance_reduction as variance_reduction
from sami_ppl.analyses.trajectories import curvature as curvature
from sami_ppl.analyses.trajectories import mean_cosine as mean_cosine
from sami_ppl.analyses.trajectories import plot_straightness as plot_straightness
from sami_ppl.analyses.trajectories import straightness as straightness
from sami_ppl.analyses.trajectories import straightness_table as straightness_table
from sami_ppl.analyses.traversal import conditional_samples as conditional_samples
from sami_ppl.analyses.traversal import interpolate as interpolate
from sami_ppl.analyses.traversal import plot_conditional_samples as plot_conditional_samples
from sami_ppl.analyses.traversal import plot_traversal as plot_traversal
from sami_ppl.analyses.traversal import traverse as traverse

"""Scores of codes against known factors, and distances between samples and data."""

from sami_ppl.metrics.circular import circular_correlation as circular_correlation
from sami_ppl.metrics.circular import largest_jump as largest_jump
from sami_ppl.metrics.correlation import correlation as correlation
from sami_ppl.metrics.disentanglement import DCI as DCI
from sami_ppl.metrics.disentanglement import axis_factor_correlation as axis_factor_correlation
from sami_ppl.metrics.disentanglement import dci as dci
from sami_ppl.metrics.disentanglement import dci_from_importances as dci_from_importances
from sami_ppl.metrics.disentanglement import disentanglement_report as disentanglement_report
from sami_ppl.metrics.disentanglement import forest_r2 as forest_r2
from sami_ppl.metrics.disentanglement import linear_r2 as linear_r2
from sami_ppl.metrics.disentanglement import mig as mig
from sami_ppl.metrics.disentanglement import normalised_information as normalised_information
from sami_ppl.metrics.disentanglement import random_rotation as random_rotation
from sami_ppl.metrics.identifiability import check_variability as check_variability
from sami_ppl.metrics.identifiability import mean_correlation as mean_correlation
from sami_ppl.metrics.samples import Distance as Distance
from sami_ppl.metrics.samples import class_features as class_features
from sami_ppl.metrics.samples import frechet as frechet
from sami_ppl.metrics.samples import mmd as mmd
from sami_ppl.metrics.samples import mmd_test as mmd_test
from sami_ppl.metrics.samples import random_features as random_features

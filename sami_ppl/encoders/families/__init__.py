"""Families of noisy posteriors: what q(z | x_λ, λ) of one site of the prior may look like.

A family is a head on the features of the encoder's network. It lives in the coordinates of the code z, and its log
density can be evaluated at any z and differentiated in x_λ, which guidance needs; draws are differentiable in the
features, which training needs. As noise grows, the exact noisy posterior tends to the prior itself: a family suits a
prior if it can represent that too (see `diagnostics.noise_end_kl`).

| family | for |
|---|---|
| `Diagonal` | independent coordinates (default) |
| `LowRank`, `Full` | coordinates that depend on each other given an observation |
| `Mixture` | several modes: mixture priors (their default), ambiguous observations |
| `Flow` | any shape, from a coupling flow given the features; two coordinates or more |
| `Directions` | angles and unit vectors (their default) |
| `Categorical` | discrete sites (their default) |
| `PerCategory` | sites whose prior depends on a discrete one (their default), a family for every value |
| `RelaxedCategorical` | relaxed categorical sites (their default) |
"""

from sami_ppl.encoders.families.base import AbstractFamily as AbstractFamily
from sami_ppl.encoders.families.base import check_min_scale as check_min_scale
from sami_ppl.encoders.families.base import squashed_scale as squashed_scale
from sami_ppl.encoders.families.base import with_min_scale as with_min_scale
from sami_ppl.encoders.families.categorical import Categorical as Categorical
from sami_ppl.encoders.families.categorical import OneHot as OneHot
from sami_ppl.encoders.families.categorical import PerCategory as PerCategory
from sami_ppl.encoders.families.categorical import RelaxedCategorical as RelaxedCategorical
from sami_ppl.encoders.families.choose import choose_families as choose_families
from sami_ppl.encoders.families.choose import default_family as default_family
from sami_ppl.encoders.families.directions import Directions as Directions
from sami_ppl.encoders.families.directions import ProjectedNormals as ProjectedNormals
from sami_ppl.encoders.families.directions import projected_normal_log_prob as projected_normal_log_prob
from sami_ppl.encoders.families.flow import Flow as Flow
from sami_ppl.encoders.families.gaussian import Diagonal as Diagonal
from sami_ppl.encoders.families.gaussian import Full as Full
from sami_ppl.encoders.families.gaussian import LowRank as LowRank
from sami_ppl.encoders.families.mixture import DiagonalMixture as DiagonalMixture
from sami_ppl.encoders.families.mixture import Mixture as Mixture

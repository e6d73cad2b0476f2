"""Can the amortised posterior be believed? Ranks of simulated codes, held-out observations, true factors."""

from sami_ppl.calibration.checks import describe_checks as describe_checks
from sami_ppl.calibration.checks import flagged as flagged
from sami_ppl.calibration.predictive import predictive_checks as predictive_checks
from sami_ppl.calibration.quick import quick_calibration as quick_calibration
from sami_ppl.calibration.ranks import calibration_table as calibration_table
from sami_ppl.calibration.ranks import describe as describe
from sami_ppl.calibration.ranks import simulation_based_calibration as simulation_based_calibration
from sami_ppl.calibration.recalibrate import recalibrate as recalibrate
from sami_ppl.calibration.recalibrate import recalibrated as recalibrated
from sami_ppl.calibration.recovery import factor_recovery as factor_recovery
from sami_ppl.calibration.typicality import typicality as typicality

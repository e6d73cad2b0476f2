"""Can the amortised posterior be believed? Ranks of simulated codes, true factors, and observations unlike the rest."""

from sami_ppl.calibration.ranks import calibration_table as calibration_table
from sami_ppl.calibration.ranks import describe as describe
from sami_ppl.calibration.ranks import simulation_based_calibration as simulation_based_calibration
from sami_ppl.calibration.recalibrate import recalibrate as recalibrate
from sami_ppl.calibration.recovery import factor_recovery as factor_recovery
from sami_ppl.calibration.typicality import typicality as typicality

"""Is the posterior informative, and can it be trusted?"""

from sami_ppl.diagnostics.clusters import clusters as clusters
from sami_ppl.diagnostics.collapse import CollapseWarning as CollapseWarning
from sami_ppl.diagnostics.collapse import collapse_warning as collapse_warning
from sami_ppl.diagnostics.consistency import consistency as consistency
from sami_ppl.diagnostics.fitted import NotFittedWarning as NotFittedWarning
from sami_ppl.diagnostics.floor import floor_share as floor_share
from sami_ppl.diagnostics.gain import NoiseErrors as NoiseErrors
from sami_ppl.diagnostics.gain import draw_code as draw_code
from sami_ppl.diagnostics.gain import noise_errors as noise_errors
from sami_ppl.diagnostics.information import information_spectrum as information_spectrum
from sami_ppl.diagnostics.noise_end import noise_end_kl as noise_end_kl
from sami_ppl.diagnostics.verdict import fit_warnings as fit_warnings

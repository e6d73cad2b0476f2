"""Refined posteriors of chosen observations, from the amortised one as a start: by NUTS, or by a Gaussian of their own.

Both are under the program's own density, log p(z) + lower bound on log p(x | z), with a noise set that is drawn once:
where they agree with the amortised posterior, the encoder has done its work for that observation.
"""

from sami_ppl.refinement.nuts import nuts as nuts
from sami_ppl.refinement.svi import svi as svi

"""Data sets: procedural ones, small real ones, a user's own files; and the checks every data set passes."""

from sami_ppl.data.augment import augmented as augmented
from sami_ppl.data.balls import lit_balls as lit_balls
from sami_ppl.data.balls import render_balls as render_balls
from sami_ppl.data.bars import bars as bars
from sami_ppl.data.bars import render_bars as render_bars
from sami_ppl.data.causal_disks import causal_disks as causal_disks
from sami_ppl.data.checks import check_data as check_data
from sami_ppl.data.checks import check_shape as check_shape
from sami_ppl.data.checks import labelled as labelled
from sami_ppl.data.checks import split as split
from sami_ppl.data.checks import train_test as train_test
from sami_ppl.data.digits import digits as digits
from sami_ppl.data.disks import disks as disks
from sami_ppl.data.disks import fit_disks as fit_disks
from sami_ppl.data.disks import moving_disks as moving_disks
from sami_ppl.data.disks import render as render
from sami_ppl.data.factors import factor_names as factor_names
from sami_ppl.data.factors import read_factors as read_factors
from sami_ppl.data.factors import real_factors as real_factors
from sami_ppl.data.local import load_data as load_data
from sami_ppl.data.local import open_data as open_data
from sami_ppl.data.local import scale_bytes as scale_bytes
from sami_ppl.data.periodic import unrolled as unrolled
from sami_ppl.data.periodic import unrolled_names as unrolled_names
from sami_ppl.data.ramps import ramps as ramps
from sami_ppl.data.ramps import render_ramps as render_ramps

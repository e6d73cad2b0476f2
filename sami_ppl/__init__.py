"""sami_ppl: score-based autoencoders as probabilistic programs."""

from importlib.metadata import version as _version

from sami_ppl import analyses as analyses
from sami_ppl import families as families
from sami_ppl import plots as plots
from sami_ppl.comparing import compare as compare
from sami_ppl.comparing import held_out_evidence as held_out_evidence
from sami_ppl.decoder import ScoreDecoder as ScoreDecoder
from sami_ppl.denoiser import GaussianDenoiser as GaussianDenoiser
from sami_ppl.denoiser import PreconditionedDenoiser as PreconditionedDenoiser
from sami_ppl.encode import encode as encode
from sami_ppl.encoder import DiagonalEncoder as DiagonalEncoder
from sami_ppl.encoder import FamilyEncoder as FamilyEncoder
from sami_ppl.encoder import RotatedEncoder as RotatedEncoder
from sami_ppl.encoder import encoder_for as encoder_for
from sami_ppl.evaluation import evaluate as evaluate
from sami_ppl.evidence import evidence_bound as evidence_bound
from sami_ppl.evidence import flow_log_prob as flow_log_prob
from sami_ppl.evidence import importance_weighted_bound as importance_weighted_bound
from sami_ppl.exact import LinearGaussian as LinearGaussian
from sami_ppl.exact import LinearMixture as LinearMixture
from sami_ppl.fit import NonFiniteLoss as NonFiniteLoss
from sami_ppl.fit import Stage as Stage
from sami_ppl.fit import fit as fit
from sami_ppl.gauge import align as align
from sami_ppl.generate import decode as decode
from sami_ppl.generate import generate as generate
from sami_ppl.guidance import GuidedDenoiser as GuidedDenoiser
from sami_ppl.io import load as load
from sami_ppl.io import save as save
from sami_ppl.objective import ScoreELBO as ScoreELBO
from sami_ppl.parallel import data_parallel as data_parallel
from sami_ppl.posterior import posterior as posterior
from sami_ppl.prior import read_prior as read_prior
from sami_ppl.program import Program as Program
from sami_ppl.sampler import DDIM as DDIM
from sami_ppl.sampler import Ancestral as Ancestral
from sami_ppl.sampler import DPMSolver as DPMSolver
from sami_ppl.sampler import FromPureNoise as FromPureNoise
from sami_ppl.sampler import Heun as Heun
from sami_ppl.sampler import StochasticDPMSolver as StochasticDPMSolver
from sami_ppl.schedule import VarianceExploding as VarianceExploding
from sami_ppl.schedule import VariancePreserving as VariancePreserving
from sami_ppl.warm_start import warm_start as warm_start

__version__ = _version("sami_ppl")

"""Networks: functions of one noisy observation and its noise level."""

from sami_ppl.nn.embed import AbstractResidual as AbstractResidual
from sami_ppl.nn.embed import CodeEmbedding as CodeEmbedding
from sami_ppl.nn.embed import NoiseEmbedding as NoiseEmbedding
from sami_ppl.nn.mlp import ResidualMLP as ResidualMLP
from sami_ppl.nn.unet import AscendingUNet as AscendingUNet
from sami_ppl.nn.unet import HalfUNet as HalfUNet
from sami_ppl.nn.unet import UNet as UNet

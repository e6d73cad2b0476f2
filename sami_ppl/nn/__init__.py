"""Networks: functions of one noisy observation and its noise level."""

from sami_ppl.nn.embed import AbstractBlock as AbstractBlock
from sami_ppl.nn.embed import AbstractEmbedding as AbstractEmbedding
from sami_ppl.nn.embed import AbstractResidual as AbstractResidual
from sami_ppl.nn.embed import CodeEmbedding as CodeEmbedding
from sami_ppl.nn.embed import NoiseEmbedding as NoiseEmbedding
from sami_ppl.nn.masked import Masked as Masked
from sami_ppl.nn.mlp import ResidualMLP as ResidualMLP
from sami_ppl.nn.transformer import AscendingDiT as AscendingDiT
from sami_ppl.nn.transformer import DiT as DiT
from sami_ppl.nn.transformer import ViT as ViT
from sami_ppl.nn.unet import AscendingUNet as AscendingUNet
from sami_ppl.nn.unet import HalfUNet as HalfUNet
from sami_ppl.nn.unet import UNet as UNet

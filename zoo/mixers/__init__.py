"""Token mixers by name. A new mixer is a class in this folder and a row in this table.

Rows of MIXERS and CROSSES are constructed as row(dim, heads, place, *, options), those of CONVS as row(dim, place, *,
options).
"""

from zoo.layer import Layer
from zoo.mixers.area import Area
from zoo.mixers.attention import Cross, Softmax, Window
from zoo.mixers.compose import Blend, SharedScores
from zoo.mixers.contextual import IRPE, CoCA, CoPE, Disentangled, Shaw, ThresholdRelative
from zoo.mixers.convolved import ConvProjection
from zoo.mixers.deformable import DCNv4, DeformableCross
from zoo.mixers.differential import Differential, Integral
from zoo.mixers.features import DCTFeatures, HashedCodes, LogNormal, RandomFeatures, Taylor
from zoo.mixers.gated import DeltaNet
from zoo.mixers.heads import GroupedQuery, HeadEmbedding, Optimized, Shifted, Subspace, Symmetric
from zoo.mixers.kernelized import (
    Efficient,
    Fourier,
    Galerkin,
    Latte,
    NormAware,
    RankAugmented,
    Separable,
    Soft,
    SparseChannel,
)
from zoo.mixers.latent import Latent, Reduced, Relational
from zoo.mixers.linear import ChannelGroups, LinFusion, SimplifiedLinear
from zoo.mixers.local import Convolution, Depthwise, GatedConv, Identity, Pool, SeparableConv, SwishConvolution
from zoo.mixers.normalizers import NAP, Causal, Entmax, HeadMask, Power, ReLA, Relaxed, Sinkhorn, TopK
from zoo.mixers.relative import Grouped, Local, Relative
from zoo.mixers.routed import MixtureOfAttention, MixtureOfHeads
from zoo.mixers.scores import Additive, AdditiveCross, GaussianKeys, Polar, Signed, Tempered
from zoo.mixers.spectral import FourierTransform
from zoo.mixers.static import Super
from zoo.mixers.tape import Tape
from zoo.mixers.whole import FixedPoint, MultiToken, Selective

MIXERS: dict[str, type[Layer]] = {
    "softmax": Softmax,
    "relative": Relative,
    "grouped": Grouped,
    "window": Window,
    "area": Area,
    "moh": MixtureOfHeads,
    "moa": MixtureOfAttention,
    "power": Power,
    "entmax": Entmax,
    "topk": TopK,
    "nap": NAP,
    "rela": ReLA,
    "sinkhorn": Sinkhorn,
    "relaxed": Relaxed,
    "head_mask": HeadMask,
    "causal": Causal,
    "differential": Differential,
    "dint": Integral,
    "ssa": Tempered,
    "mgk": GaussianKeys,
    "additive": Additive,
    "coda": Signed,
    "polar": Polar,
    "multi_token": MultiToken,
    "selective": Selective,
    "fixed_point": FixedPoint,
    "symmetric": Symmetric,
    "mssa": Subspace,
    "gqa": GroupedQuery,
    "kv_shift": Shifted,
    "head_embedding": HeadEmbedding,
    "optimized": Optimized,
    "super": Super,
    "sagan": Reduced,
    "mla": Latent,
    "relational": Relational,
    "conv_projection": ConvProjection,
    "shaw": Shaw,
    "irpe": IRPE,
    "disentangled": Disentangled,
    "cope": CoPE,
    "coca": CoCA,
    "tra": ThresholdRelative,
    "tape": Tape,
    "shared_scores": SharedScores,
    "blend": Blend,
    "local": Local,
    "sla": SimplifiedLinear,
    "linfusion": LinFusion,
    "efficient": Efficient,
    "latte": Latte,
    "galerkin": Galerkin,
    "fourier": Fourier,
    "separable": Separable,
    "rala": RankAugmented,
    "nala": NormAware,
    "lln": LogNormal,
    "taylor": Taylor,
    "random_features": RandomFeatures,
    "dijiang": DCTFeatures,
    "ecoformer": HashedCodes,
    "soft": Soft,
    "deltanet": DeltaNet,
    "fnet": FourierTransform,
    "dcnv4": DCNv4,
    "pool": Pool,
    "sepconv": SeparableConv,
    "dico": GatedConv,
    "channel": ChannelGroups,
    "sparse_channel": SparseChannel,
    "identity": Identity,
}

CROSSES: dict[str, type[Layer]] = {"softmax": Cross, "additive": AdditiveCross, "deformable": DeformableCross}

CONVS: dict[str, type[Layer]] = {"glu": Convolution, "swish": SwishConvolution, "depthwise": Depthwise}

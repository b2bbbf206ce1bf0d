"""From raw input to tokens, and from one grid to a coarser one, by name.

Rows of STEMS are constructed as row(channels, dim, norm, place, *, options), those of REDUCTIONS as row(inputs, dim,
norm, place, *, options), those of SUBSAMPLINGS as row(mels, dim, *, options).
"""

from torch import nn

from zoo.stems.images import ConvStem, DoubleStem, Reduction
from zoo.stems.speech import DeepSubsampling, DepthwiseSubsampling, FullSubsampling, NormedSubsampling, Subsampling

STEMS: dict[str, type[nn.Module]] = {"conv": ConvStem, "double": DoubleStem}

REDUCTIONS: dict[str, type[nn.Module]] = {"conv": Reduction}

SUBSAMPLINGS: dict[str, type[Subsampling]] = {
    "conv2": NormedSubsampling,
    "conv4": FullSubsampling,
    "depthwise4": DepthwiseSubsampling,
    "depthwise8": DeepSubsampling,
}

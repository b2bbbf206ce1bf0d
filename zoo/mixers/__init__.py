"""What mixes tokens, by name. A new mixer is a class in this folder and a row in this table."""

from zoo.layer import Layer
from zoo.mixers.attention import Cross, Softmax
from zoo.mixers.deformable import DCNv4
from zoo.mixers.linear import ChannelGroups, SimplifiedLinear
from zoo.mixers.local import Convolution, Identity, Pool, SeparableConv, SwishConvolution

MIXERS: dict[str, type[Layer]] = {
    "softmax": Softmax,
    "sla": SimplifiedLinear,
    "dcnv4": DCNv4,
    "pool": Pool,
    "sepconv": SeparableConv,
    "channel": ChannelGroups,
    "identity": Identity,
}

CROSSES: dict[str, type[Layer]] = {"softmax": Cross}

CONVS: dict[str, type[Layer]] = {"glu": Convolution, "swish": SwishConvolution}

"""Token mixers by name. A new mixer is a class in this folder and a row in this table.

Rows of MIXERS and CROSSES are constructed as row(dim, heads, place, *, options), those of CONVS as row(dim, place, *,
options).
"""

from zoo.layer import Layer
from zoo.mixers.area import Area
from zoo.mixers.attention import Cross, Softmax, Window
from zoo.mixers.compose import Blend, SharedScores
from zoo.mixers.contextual import IRPE, CoCA, CoPE, Disentangled, Shaw, ThresholdRelative
from zoo.mixers.deformable import DCNv4, DeformableCross
from zoo.mixers.linear import ChannelGroups, LinFusion, SimplifiedLinear
from zoo.mixers.local import Convolution, Depthwise, GatedConv, Identity, Pool, SeparableConv, SwishConvolution
from zoo.mixers.normalizers import Power
from zoo.mixers.relative import Grouped, Local, Relative

MIXERS: dict[str, type[Layer]] = {
    "softmax": Softmax,
    "relative": Relative,
    "grouped": Grouped,
    "window": Window,
    "area": Area,
    "power": Power,
    "shaw": Shaw,
    "irpe": IRPE,
    "disentangled": Disentangled,
    "cope": CoPE,
    "coca": CoCA,
    "tra": ThresholdRelative,
    "shared_scores": SharedScores,
    "blend": Blend,
    "local": Local,
    "sla": SimplifiedLinear,
    "linfusion": LinFusion,
    "dcnv4": DCNv4,
    "pool": Pool,
    "sepconv": SeparableConv,
    "dico": GatedConv,
    "channel": ChannelGroups,
    "identity": Identity,
}

CROSSES: dict[str, type[Layer]] = {"softmax": Cross, "deformable": DeformableCross}

CONVS: dict[str, type[Layer]] = {"glu": Convolution, "swish": SwishConvolution, "depthwise": Depthwise}

"""From the tokens of the last block to outputs, by name.

Rows of HEADS are constructed as row(dim, classes, norm, place, *, options), those of SPEECH_HEADS as row(dim,
vocabulary, *, options).
"""

from torch import nn

from zoo.heads.images import ConvHead, LinearHead, MLPHead
from zoo.heads.speech import CTCHead, TransducerHead

HEADS: dict[str, type[nn.Module]] = {"linear": LinearHead, "mlp": MLPHead, "conv": ConvHead}

SPEECH_HEADS: dict[str, type[nn.Module]] = {"ctc": CTCHead, "transducer": TransducerHead}

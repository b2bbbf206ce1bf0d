"""From the tokens of a speech encoder to logits over a vocabulary: CTC and RNN-T."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.tensors import like, linear


class CTCHead(nn.Linear):
    """A linear map to the vocabulary, whose last entry is the blank (Graves et al. 2006)."""

    framewise = True  # each token has its own logits, from a linear that is its only reader

    def __init__(self, dim: int, vocabulary: int) -> None:
        super().__init__(dim, vocabulary)
        nn.init.trunc_normal_(self.weight, std=0.02)
        nn.init.zeros_(self.bias)


class TransducerHead(nn.Module):
    """RNN-T (Graves 2012, arXiv:1211.3711): an LSTM reads the tokens emitted so far, and a joint network
    W tanh(A encoded + B predicted) gives the logits of the next one.

    The LSTM has `layers` layers of width `hidden`, and `dropout` on its input. The blank is the last entry of the
    vocabulary. The LSTM reads it at the start; its embedding is zero.
    """

    framewise = False

    def __init__(self, dim: int, vocabulary: int, *, hidden: int = 640, layers: int = 1, dropout: float = 0.0) -> None:
        super().__init__()
        if dropout >= 1.0:
            raise ValueError(f"dropout must be < 1, got {dropout}")
        self.blank = vocabulary - 1
        self.embedding = nn.Embedding(vocabulary, hidden, padding_idx=self.blank)
        self.predictor = nn.LSTM(hidden, hidden, layers, batch_first=True)
        self.encoded, self.predicted = linear(dim, hidden), linear(hidden, hidden, bias=False)
        self.out = linear(hidden, vocabulary)
        self.dropout = nn.Dropout(dropout)

    def start(self, batch: int) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """The predictor's output before any token [B, hidden], and its state."""
        kind = like(self)
        tokens = torch.full((batch,), self.blank, device=kind.device)
        shape = (self.predictor.num_layers, batch, self.predictor.hidden_size)
        zeros = kind.new_zeros(shape)
        return self.predict(tokens, (zeros[0], (zeros, zeros)))

    def predict(
        self, tokens: Tensor, state: tuple[Tensor, tuple[Tensor, Tensor]]
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """The predictor's output after one more token each [B], and its state."""
        said, hidden = self.predictor(self.embedding(tokens[:, None]), state[1])
        return said[:, 0], hidden

    def joint(self, encoded: Tensor, predicted: Tensor) -> Tensor:
        """Logits [..., vocabulary] of encoded [..., dim] and predicted [..., hidden], whose leading sizes broadcast."""
        return self.out(torch.tanh(self.encoded(encoded) + self.predicted(predicted)))

    def forward(self, encoded: Tensor, targets: Tensor) -> Tensor:
        """Logits [B, T, U + 1, vocabulary] for encoded [B, T, dim] and targets [B, U]."""
        read = F.pad(targets, (1, 0), value=self.blank)
        predicted = self.predictor(self.dropout(self.embedding(read)))[0]
        return self.joint(encoded[:, :, None], predicted[:, None])

"""Heads: the tokens of the last stage to logits, or to what the last linear would read where classes = 0."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.channels import grid_mean
from zoo.fusion import fold_in, fold_site, keep, not_affine
from zoo.layer import Context, Fold, linear, make
from zoo.norms import NORMS, BatchNorm, Norm

_ONE = Context(grid=(1,))


class LinearHead(nn.Module):
    """The mean of the normalized tokens, then a linear map; mean_first takes the mean before the norm."""

    def __init__(self, dim: int, classes: int, norm: str, *, mean_first: bool = False) -> None:
        super().__init__()
        self.norm: Norm | None = make(NORMS, norm, dim)
        self.out = linear(dim, classes) if classes else None
        self.mean_first = mean_first

    def forward(self, x: Tensor, context: Context) -> Tensor:
        if self.mean_first:
            x = grid_mean(x, context)[:, None]
            pooled = x[:, 0] if self.norm is None else self.norm(x, _ONE)[:, 0]
        else:
            pooled = grid_mean(x if self.norm is None else self.norm(x, context), context)
        return pooled if self.out is None else self.out(pooled)

    def fold(self) -> list[Fold]:
        return [_fold_norm(self, "norm", self.out)]


class MLPHead(nn.Module):
    """Mean, norm, linear, squared ReLU, norm, linear; `ratio` times as wide inside (MetaFormer baselines, Yu et al.
    2022, arXiv:2210.13452)."""

    def __init__(self, dim: int, classes: int, norm: str, *, ratio: float = 4.0) -> None:
        super().__init__()
        hidden = int(dim * ratio)
        self.norm: Norm | None = make(NORMS, norm, dim)
        self.expand = linear(dim, hidden)
        self.inner: Norm | None = make(NORMS, norm, hidden)
        self.out = linear(hidden, classes) if classes else None

    def forward(self, x: Tensor, context: Context) -> Tensor:
        x = grid_mean(x, context)[:, None]
        x = F.relu(self.expand(x if self.norm is None else self.norm(x, _ONE))).square()
        x = (x if self.inner is None else self.inner(x, _ONE))[:, 0]
        return x if self.out is None else self.out(x)

    def fold(self) -> list[Fold]:
        return [_fold_norm(self, "norm", self.expand), _fold_norm(self, "inner", self.out)]


class ConvHead(nn.Module):
    """Norm, linear, batch normalization and GELU of each token, then the mean and a linear map; norm_first=False leaves
    the first norm away (InternImage, Wang et al. 2023, arXiv:2211.05778)."""

    def __init__(self, dim: int, classes: int, norm: str, *, ratio: float = 1.5, norm_first: bool = True) -> None:
        super().__init__()
        hidden = int(dim * ratio)
        self.norm: Norm | None = make(NORMS, norm, dim) if norm_first else None
        self.expand = linear(dim, hidden, bias=False)
        self.inner: Norm | None = BatchNorm(hidden)
        self.out = linear(hidden, classes) if classes else None

    def forward(self, x: Tensor, context: Context) -> Tensor:
        x = self.expand(x if self.norm is None else self.norm(x, context))
        x = grid_mean(F.gelu(x if self.inner is None else self.inner(x, context)), context)
        return x if self.out is None else self.out(x)

    def fold(self) -> list[Fold]:
        behind = fold_site(self, "inner", self.expand)  # before the norm in front, which then sees the new weights
        return [*behind, *([] if self.norm is None else [_fold_norm(self, "norm", self.expand)])]


def _fold_norm(head: nn.Module, site: str, target: nn.Linear | None) -> Fold:
    norm = getattr(head, site)
    if (affine := norm.affine()) is None:
        return Fold(site, None, not_affine(norm))
    if target is None:
        return keep(head, site, "there is no linear behind it")
    fold_in(target, *affine)
    setattr(head, site, None)
    return Fold(site, "the linear behind it")


HEADS: dict[str, type[nn.Module]] = {"linear": LinearHead, "mlp": MLPHead, "conv": ConvHead}


class CTCHead(nn.Linear):
    """One linear map to the vocabulary, whose last entry is the blank (Graves et al. 2006)."""

    def __init__(self, dim: int, vocabulary: int) -> None:
        super().__init__(dim, vocabulary)
        nn.init.trunc_normal_(self.weight, std=0.02)
        nn.init.zeros_(self.bias)


class TransducerHead(nn.Module):
    """RNN-T (Graves 2012, arXiv:1211.3711): an LSTM reads the tokens that were put out, and a joint network
    W tanh(A encoded + B predicted) gives the logits of the next one.

    The blank is the last of the vocabulary. The LSTM reads it at the start; its embedding is zero.
    """

    def __init__(self, dim: int, vocabulary: int, *, hidden: int = 640, layers: int = 1, dropout: float = 0.0) -> None:
        super().__init__()
        self.blank = vocabulary - 1
        self.embedding = nn.Embedding(vocabulary, hidden, padding_idx=self.blank)
        self.predictor = nn.LSTM(hidden, hidden, layers, batch_first=True)
        self.encoded, self.predicted = linear(dim, hidden), linear(hidden, hidden, bias=False)
        self.out = linear(hidden, vocabulary)
        self.dropout = nn.Dropout(dropout)

    def start(self, batch: int) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """What the predictor says before any token [B, hidden], and its state."""
        tokens = torch.full((batch,), self.blank, device=self.out.weight.device)
        shape = (self.predictor.num_layers, batch, self.predictor.hidden_size)
        zeros = self.out.weight.new_zeros(shape)
        return self.advance(tokens, (zeros[0], (zeros, zeros)))

    def advance(
        self, tokens: Tensor, state: tuple[Tensor, tuple[Tensor, Tensor]]
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """What the predictor says after one more token each [B], and its state."""
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


SPEECH_HEADS: dict[str, type[nn.Module]] = {"ctc": CTCHead, "transducer": TransducerHead}

"""What the tests of speech share: small models, clips in company, a step of training, the tokens of a path."""

import copy
import itertools
from collections.abc import Sequence

import torch
import torch.nn.functional as F

import zoo
from helpers import randomise
from zoo.mixers import MIXERS

LAYOUTS = ["conformer_ctc_s", "squeezeformer_xs", "fastconformer_s"]
TINY = {"dim": 32, "depth": 4, "heads": 2, "mels": 20, "vocabulary": 11, "dropout": 0.0}
ALONG_TIME = [name for name, row in MIXERS.items() if 1 in row.dimensions and not row.causal]
PADDINGS = ["symmetric", "right", "causal"]


def tiny(name: str, **choices) -> torch.nn.Module:
    return randomise(zoo.create_model(name, **(TINY | choices))).eval()


MILLIONS = {"conformer_s": 8.7, "conformer_m": 27.4, "conformer_l": 115.2}
MILLIONS |= {"conformer_ctc_s": 8.7, "conformer_ctc_m": 27.4, "conformer_ctc_l": 121.5}
MILLIONS |= {"squeezeformer_xs": 9.0, "squeezeformer_s": 18.6, "squeezeformer_sm": 28.2}
MILLIONS |= {"squeezeformer_m": 55.6, "squeezeformer_ml": 125.0, "squeezeformer_l": 236.3}
MILLIONS |= {"fastconformer_s": 12.6, "fastconformer_m": 26.2, "fastconformer_l": 108.8}

NAMES = list(MILLIONS)


def in_company(clips: list[torch.Tensor], frames: int, size: float = 100.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Clips [T, mels] in one batch with a clip of that many frames; padding and that clip hold large values."""
    batch = size * torch.randn(len(clips) + 1, frames, clips[0].shape[1]).to(clips[0])
    for row, clip in zip(batch, clips, strict=False):
        row[: len(clip)] = clip
    return batch, torch.tensor([*map(len, clips), frames])


def trained(model: torch.nn.Module, batch: torch.Tensor, lengths: torch.Tensor) -> tuple[list, torch.Tensor, dict]:
    """Real frames and the CTC loss, gradients, and buffers, after a step in training."""
    model = copy.deepcopy(model).train()
    targets = torch.arange(5 * len(lengths)).view(-1, 5) % 10
    logits, real = model(batch, lengths)
    chances = logits.log_softmax(-1).transpose(0, 1)
    loss = F.ctc_loss(chances, targets, real, torch.full_like(real, 5), blank=10)
    loss.backward()
    rows = [row[:length] for row, length in zip(logits, real, strict=True)]
    gradients = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
    return [*rows, loss], gradients, dict(model.named_buffers())


def real_mask(x: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    return torch.arange(x.shape[1]) < lengths[:, None]


def collapse(path: Sequence[int], blank: int) -> tuple[int, ...]:
    return tuple(token for token, _ in itertools.groupby(path) if token != blank)

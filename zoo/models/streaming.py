"""A stream: features in pieces of any size to logits, chunk by chunk, in constant memory."""

from typing import Any

import torch
from torch import Tensor

from zoo.layer import Chunks
from zoo.tensors import check_floats, like


class Stream:
    """Runs a speech model with chunks on one or several utterances as they arrive; all of a batch end together.

    The logits are those of `model(features)` as a whole (Noroozi et al. 2024, arXiv:2312.17279). A chunk of c tokens is
    computed when its last token's frame is there: frame stride * c of each chunk, less stride - 1 in the first.
    """

    def __init__(self, model: Any, batch: int, visible: Chunks | None) -> None:
        if visible is None:
            raise ValueError("this model cannot stream; its config has no chunk")
        if model.training:
            raise ValueError("streaming is for inference; call model.eval() first")
        self.model, self.visible = model, visible
        self.size = model.config.stride * visible.chunk
        self.cache: dict[str, Tensor] = model.state(batch, visible)
        kind = like(model)
        ahead = model.config.stride - 1  # frames before the first one that its tokens' windows reach into
        self.waiting = kind.new_zeros(batch, ahead, model.config.mels)
        self.real = torch.zeros(batch, ahead, dtype=torch.bool, device=kind.device)
        self.frames = self.given = 0  # received features, and returned tokens
        self.finished = False

    @torch.no_grad()
    def push(self, features: Tensor) -> Tensor:
        """The logits [B, n, vocabulary] that the next features [B, any, mels] complete; n may be 0."""
        if self.finished:
            raise ValueError("this stream has ended; start another with model.stream()")
        if features.ndim != 3 or (features.shape[0], features.shape[2]) != (len(self.waiting), self.waiting.shape[2]):
            wanted = f"[{len(self.waiting)}, any, {self.waiting.shape[2]}]"
            raise ValueError(f"features must be {wanted}, got {list(features.shape)}")
        check_floats(features, "features")
        self.frames += features.shape[1]
        self.waiting = torch.cat([self.waiting, features.type_as(self.waiting)], 1)
        self.real = torch.cat([self.real, self.real.new_ones(features.shape[:2])], 1)
        whole = self.waiting.shape[1] // self.size * self.size
        chunks = [slice(start, start + self.size) for start in range(0, whole, self.size)]
        made = [self.model.step(self.waiting[:, c], self.real[:, c], self.cache, self.visible) for c in chunks]
        self.waiting, self.real = self.waiting[:, whole:].clone(), self.real[:, whole:].clone()
        self.given += sum(part.shape[1] for part in made)
        return torch.cat(made, 1) if made else self.nothing()

    @torch.no_grad()
    def finish(self) -> Tensor:
        """The logits of the remaining features; the stream has then ended."""
        if self.finished:
            raise ValueError("this stream has ended; start another with model.stream()")
        self.finished = True
        left = self.model.tokens(self.frames) - self.given
        if left == 0:
            return self.nothing()
        missing = self.size - self.waiting.shape[1]
        part = torch.nn.functional.pad(self.waiting, (0, 0, 0, missing))
        real = torch.nn.functional.pad(self.real, (0, missing))
        self.given += left
        return self.model.step(part, real, self.cache, self.visible)[:, :left]

    def nothing(self) -> Tensor:
        return self.waiting.new_zeros(len(self.waiting), 0, self.model.config.outputs)

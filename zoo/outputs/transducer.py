"""RNN-T: greedy search."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor


class Transducer(Protocol):
    """The head of an RNN-T: a predictor over the tokens so far and a joint of it with a frame.

    A state is `(g, hidden)`: the predictor's output [B, P] and whatever it remembers, tensors [..., B, size]
    in tuples.
    """

    def start(self, batch: int, /) -> Any:
        """The state before any token."""
        ...

    def predict(self, tokens: Tensor, state: Any, /) -> Any:
        """The state after one more token per clip, tokens [B]."""
        ...

    def joint(self, encoded: Tensor, g: Tensor, /) -> Tensor:
        """Logits [B, V] of encoder tokens [B, dim] and g [B, P]; the last index is the blank."""
        ...


@torch.no_grad()
def transducer_greedy(head: Transducer, encoded: Tensor, lengths: Tensor, most: int = 10) -> list[list[int]]:
    """RNN-T greedy search (Graves, arXiv 1211.3711): at each frame the likeliest token until that is blank.

    Each clip goes through its own frames at its own pace; the rest of the batch changes nothing.

    Args:
        head: the predictor and the joint, see `Transducer`.
        encoded: [B, T, dim], the encoder's tokens.
        lengths: [B], the valid frames of each clip.
        most: tokens that one frame may give.

    Returns:
        The tokens of each clip.

    Raises:
        ValueError: `most` is below 1.
    """
    found, _ = transducer_search(head, encoded, lengths, head.start(len(encoded)), most)
    return [[token for token, _ in each] for each in found]


@torch.no_grad()
def transducer_search(
    head: Transducer, encoded: Tensor, lengths: Tensor, state: Any, most: int = 10
) -> tuple[list[list[tuple[int, int]]], Any]:
    """`transducer_greedy` that starts from a state, for encoder tokens that come in parts.

    Returns:
        The tokens of each clip with the frame that gave them, and the state after the last of them.
    """
    if most < 1:
        raise ValueError(f"most must be >= 1 token per frame, got {most}")
    batch = encoded.shape[0]
    rows = torch.arange(batch, device=encoded.device)
    lengths = lengths.to(encoded.device)
    frame, given = torch.zeros_like(rows), torch.zeros_like(rows)
    found: list[list[tuple[int, int]]] = [[] for _ in range(batch)]
    while bool((active := frame < lengths).any()):
        logits = head.joint(encoded[rows, frame.clamp(max=encoded.shape[1] - 1)], state[0])
        best = logits.argmax(-1)
        emits = active & (best != logits.shape[-1] - 1)
        if bool(emits.any()):
            advanced = head.predict(torch.where(emits, best, 0), state)
            state = _where(emits, advanced, state)
            emitted = torch.stack([rows, best, frame], 1)[emits]
            for row, token, at in emitted.tolist():
                found[row].append((token, at))
        given = torch.where(emits, given + 1, 0)
        moves = ~emits | (given >= most)
        frame, given = frame + moves.long(), torch.where(moves, 0, given)
    return found, state


def _where(chosen: Tensor, new: Any, old: Any) -> Any:
    """The new state of the clips that are chosen, the old of the others."""
    if isinstance(new, Tensor):
        return torch.where(chosen[:, None], new, old)
    return tuple(_where(chosen, *pair) for pair in zip(new, old, strict=True))

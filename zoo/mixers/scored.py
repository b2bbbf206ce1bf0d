"""The frame of attention with explicit weights: scores, weights, sums of values, for some queries at a time."""

from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from zoo.layer import Context, Order
from zoo.mixers.projected import Attention, rotate, visible_keys
from zoo.tensors import compiling, mixing_precision, overwritable

LEAST_ROWS = 32
SCORES_AT_ONCE = {"cpu": 3 * 2**18}
"""Scores that are in memory at one time, by the type of device; 2**26 on others. Chunks are of equal size, and have at
least half of LEAST_ROWS queries if there are as many."""


class Room:
    """Memory that the scores of all chunks of queries use in turn. It is allocated for the first chunk, the largest."""

    def __init__(self) -> None:
        self.memory: Tensor | None = None
        self.free = True  # for the first products of a chunk

    def take(self, query: Tensor, key: Tensor) -> Tensor | None:
        """Memory for query [B, H, n, d] @ key [B, H, d, M]; None if it is in use or does not fit."""
        if not self.free or query.dtype != key.dtype or query.shape[:2] != key.shape[:2]:
            return None
        shape = (*query.shape[:-1], key.shape[-1])
        if self.memory is None:
            self.memory = query.new_empty(shape)
        fits = all(wanted <= size for wanted, size in zip(shape, self.memory.shape, strict=True))
        if not fits or self.memory.dtype != query.dtype:
            return None
        self.free = False
        return self.memory[tuple(slice(size) for size in shape)]


class Pairs(NamedTuple):
    """Some queries, which follow each other, and the keys that they are compared with."""

    start: int  # the place of the first of these queries among the tokens
    before: int  # keys of a stream that come before the first token
    allowed: Tensor | None  # [1 or B, 1, 1 or n, M], True where the query sees the key; None if all are seen
    context: Context
    room: "Room | None" = None

    def products(self, query: Tensor, key: Tensor) -> Tensor:
        """query [B, H, n, d] and key [B, H, M, d] -> q k^T, [B, H, n, M]."""
        key = key.transpose(-1, -2)
        out = None if self.room is None else self.room.take(query, key)
        return query @ key if out is None else torch.matmul(query, key, out=out)

    def masked(self, scores: Tensor, fill: float = -torch.inf) -> Tensor:
        """Scores [B, H, n, M] with `fill` where a query does not see the key."""
        return scores if self.allowed is None else scores.masked_fill(~self.allowed, fill)

    def seen(self, scores: Tensor) -> Tensor:
        """How many keys each query sees: [1 or B, 1, 1 or n, 1], in the dtype of the scores."""
        if self.allowed is None:
            return scores.new_full((1, 1, 1, 1), scores.shape[-1])
        return self.allowed.sum(-1, keepdim=True).to(scores.dtype)

    def bias(self, scores: Tensor) -> Tensor | None:
        """The bias of the Context for scores [..., n, M], [1 or B, heads, n, M] in their dtype; None if there is
        none."""
        rule = self.context.bias
        return None if rule is None else rule.between(*self.places(scores)).to(scores.dtype)

    def places(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        """The places of the n queries and of the M keys among the keys: [n] and [M]."""
        queries, keys = scores.shape[-2:]
        first = self.before + self.start
        device = scores.device
        return torch.arange(first, first + queries, device=device), torch.arange(keys, device=device)


def softmax(scores: Tensor) -> Tensor:
    """Softmax over keys, in place where `overwritable`."""
    return torch.softmax(scores, -1, out=scores) if overwritable() else scores.softmax(-1)


ALL = slice(0, None)


def scores_at_once(device: torch.device) -> int:
    """How many scores are in memory at one time."""
    return SCORES_AT_ONCE.get(device.type, 2**26)


def chunks_of(number: int, scores: int, device: torch.device) -> list[slice]:
    """The queries that are compared with all keys at one time: in inference some of the `number`, so that memory grows
    linearly with the number of tokens, and in training and in a compiled or exported program `ALL`. `scores` is how
    many one query has, in all samples and heads."""
    if compiling() or torch.is_grad_enabled():
        return [ALL]  # a range would fix a program to one number
    rows = max(LEAST_ROWS, scores_at_once(device) // max(1, scores))
    rows = -(-number // max(1, -(-number // rows)))  # equal chunks, so that memory is reused
    return [slice(start, min(start + rows, number)) for start in range(0, number, rows)]


class Scored(Attention):
    """The base of attention with explicit weights. Softmax attention if nothing is overridden.

    A subclass overrides `scores`, from queries and keys, `weights`, from scores, or `collect`, from weights and values.
    In inference they see some queries at a time and all keys, so that memory grows linearly with the number of tokens.
    In training, and in a compiled or exported program, they see all queries at once; always so with `quadratic`, for
    weights that depend on other queries. `headwise` says that the three methods treat all heads alike, without
    parameters of single heads: inference may then compare one head at a time, which is faster. The scores of later
    chunks overwrite those before: clone what you keep. A query that sees no key is treated as if it saw all of them. A
    `causal` class keeps the Order without being asked.
    """

    reads = Attention.reads | {"rotary", "bias"}
    headwise: ClassVar[bool] = False

    def scores(self, query: Tensor, key: Tensor, pairs: Pairs) -> Tensor:
        """query [B, H, n, d] and key [B, H, M, d] -> [B, H, n, M]."""
        return self.biased(pairs.products(query * query.shape[-1] ** -0.5, key), pairs)

    def weights(self, scores: Tensor, pairs: Pairs) -> Tensor:
        """scores [B, H, n, M] -> [B, H, n, M]."""
        return softmax(pairs.masked(scores))

    def collect(self, weights: Tensor, value: Tensor, pairs: Pairs) -> Tensor:
        """weights [B, H, n, M] and value [B, H, M, e] -> [B, H, n, e]."""
        return weights @ value

    def turned(self, x: Tensor, rotary: Tensor | None) -> Tensor:
        """Queries or keys [B, N, H, d] with rotary positions, if the class reads them."""
        return rotate(x, rotary) if "rotary" in type(self).reads else x

    @staticmethod
    def biased(scores: Tensor, pairs: Pairs) -> Tensor:
        """Scores [B, H, n, M] with the bias of the Context, if there is one."""
        bias = pairs.bias(scores)
        return scores if bias is None else scores + bias

    def mix(self, query: Tensor, key: Tensor, value: Tensor, context: Context) -> Tensor:
        number, new = query.shape[1], key.shape[1]
        context = context._replace(order=Order(context.prefix)) if self.causal else context
        key, value, real = self.stored(key, value, context)
        query, key = self.turned(query, context.rotary), self.turned(key, context.rotary)
        query, key, value = (part.transpose(1, 2).contiguous() for part in (query, key, value))
        groups = self.groups(number, query, key, context)
        chunks = self.chunks(number, query[:, groups[0]], key)
        whole, noted, y = len(groups) == len(chunks) == 1, [], None
        room = None if whole or context.notes is not None or mixing_precision(query) else Room()
        for rows in chunks:
            seen = self.allowance(real, number, key, context, rows)
            pairs = Pairs(rows.start, key.shape[2] - new, seen, context, room)
            for heads in groups:
                if room is not None:
                    room.free = True
                weights = self.weights(self.scores(query[:, heads, rows], key[:, heads], pairs), pairs)
                part = self.collect(weights, value[:, heads], pairs)
                if y is None:  # once for all: small tensors between large ones would keep glibc from reusing those
                    total = query.shape[1] if len(groups) > 1 else part.shape[1]
                    y = part if whole else part.new_empty(len(part), total, number, part.shape[3])
                if y is not part:
                    y[:, heads, rows] = part
                if context.notes is not None:
                    noted.append(weights.detach())
        if noted:
            count = len(groups)
            by_chunk = [torch.cat(noted[start : start + count], 1) for start in range(0, len(noted), count)]
            self.note(context, "weights", torch.cat(by_chunk, 2))
        assert y is not None
        return y.transpose(1, 2)

    def groups(self, number: int, query: Tensor, key: Tensor, context: Context) -> list[slice]:
        """The heads that are compared at one time: in inference, with `headwise`, as many as keep the scores of all
        queries in the processor's cache, or one."""
        alike = self.headwise and key.shape[1] == query.shape[1] and context.bias is None
        if not alike or compiling() or torch.is_grad_enabled():
            return [ALL]
        size = max(1, scores_at_once(query.device) // max(1, len(query) * number * key.shape[2]))
        return [slice(start, start + size) for start in range(0, query.shape[1], size)]

    def allowance(
        self, real: Tensor | None, number: int, key: Tensor, context: Context, rows: slice = ALL
    ) -> Tensor | None:
        """Which of the real keys [B, M] some rows of the queries see, [1 or B, 1, 1 or n, M]; None for all."""
        seen = visible_keys(real, number, key.shape[2], key.device, context, rows)
        if seen is None:
            return None
        seen = seen[:, None] if seen.ndim == 2 else seen
        return (seen | ~seen.any(-1, keepdim=True))[:, None]

    def chunks(self, number: int, query: Tensor, key: Tensor) -> list[slice]:
        """`chunks_of` the queries [B, H, N, d] and keys [B, H, M, d]; all where weights depend on other queries."""
        scores = query.shape[0] * query.shape[1] * key.shape[2]
        return [ALL] if self.quadratic else chunks_of(number, scores, query.device)

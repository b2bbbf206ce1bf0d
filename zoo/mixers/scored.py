"""The frame of attention with explicit weights: scores, weights, sums of values, for some queries at a time."""

import itertools
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from zoo.layer import Context, Order
from zoo.mixers.projected import Attention, rotate, visible_keys
from zoo.tensors import compiling, overwritable

LEAST_ROWS = 32
SCORES_AT_ONCE = {"cpu": 3 * 2**18}
"""Scores that are in memory at one time, by the type of device; 2**26 on others. Chunks are of equal size, and have at
least half of LEAST_ROWS queries if there are as many."""


class Pairs(NamedTuple):
    """Some queries, which follow each other, and the keys that they are compared with."""

    start: int  # the place of the first of these queries among the tokens
    before: int  # keys of a stream that come before the first token
    allowed: Tensor | None  # [1 or B, 1, 1 or n, M], True where the query sees the key; None if all are seen
    context: Context
    room: list[Tensor] | None = None  # memory for the products of these queries, for the first that asks

    def products(self, query: Tensor, key: Tensor) -> Tensor:
        """query [B, H, n, d] and key [B, H, M, d] -> q k^T, [B, H, n, M]."""
        key = key.transpose(-1, -2)
        if self.room and self.room[0].shape == (*query.shape[:-1], key.shape[-1]):
            return torch.matmul(query, key, out=self.room.pop())
        return query @ key

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
    parameters of single heads: inference may then compare one head at a time, which is faster. A query that sees no key
    is treated as if it saw all of them. A `causal` class keeps the Order without being asked.
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
        room = self.room(groups, chunks, query, key, context)
        noted, y = [], None
        for heads, rows in itertools.product(groups, chunks):
            some, keys = query[:, heads, rows], key[:, heads]
            seen = self.allowance(real, number, key, context, rows)
            free = None if room is None else [room[:, : some.shape[1], : some.shape[2]]]
            pairs = Pairs(rows.start, key.shape[2] - new, seen, context, free)
            weights = self.weights(self.scores(some, keys, pairs), pairs)
            part = self.collect(weights, value[:, heads], pairs)
            if y is None:  # once for all: small tensors between large ones would keep glibc from reusing those
                total = query.shape[1] if len(groups) > 1 else part.shape[1]
                whole = len(groups) == len(chunks) == 1
                y = part if whole else part.new_empty(len(part), total, number, part.shape[3])
            if y is not part:
                y[:, heads, rows] = part
            if context.notes is not None:
                noted.append(weights.detach())
        if noted:
            by_group = [torch.cat(noted[start : start + len(chunks)], 2) for start in range(0, len(noted), len(chunks))]
            self.note(context, "weights", torch.cat(by_group, 1))
        assert y is not None
        return y.transpose(1, 2)

    def groups(self, number: int, query: Tensor, key: Tensor, context: Context) -> list[slice]:
        """The heads that are compared at one time: in inference, with `headwise`, as many as keep the scores of all
        queries in the processor's cache, or one."""
        if not self.headwise or compiling() or torch.is_grad_enabled() or context.bias is not None:
            return [ALL]
        size = max(1, scores_at_once(query.device) // max(1, len(query) * number * key.shape[2]))
        return [slice(start, start + size) for start in range(0, query.shape[1], size)]

    @staticmethod
    def room(groups: list[slice], chunks: list[slice], query: Tensor, key: Tensor, context: Context) -> Tensor | None:
        """Memory for the scores of each chunk in turn, so that the system need not give it again and again; None where
        scores are kept, or mixed precision chooses their dtype."""
        alike = query.shape[:2] == key.shape[:2] and query.dtype == key.dtype
        mixed = torch.is_autocast_enabled(query.device.type)
        if len(groups) == len(chunks) == 1 or not alike or context.notes is not None or mixed:
            return None
        heads, rows = query[:, groups[0]].shape[1], chunks[0].stop or query.shape[2]
        return query.new_empty(len(query), heads, rows, key.shape[2])

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

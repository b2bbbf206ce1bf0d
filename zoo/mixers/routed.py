"""Softmax attention whose heads a router chooses or weighs for each token."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.kernels.routing import (
    Grouped,
    Routes,
    apart,
    balance_loss,
    every_expert,
    grouped,
    logits_of,
    route,
    spread,
    to_slots,
    z_loss,
)
from zoo.layer import ANYWHERE, Context, Place, Site
from zoo.mixers.attention import DotProduct, Softmax
from zoo.tensors import linear
from zoo.text import unknown

WAYS = ("topk", "leave_one_out")
Z = 0.1  # the weight of the z-loss beside the balance loss, which a task multiplies by 0.01 unless told otherwise


class MixtureOfHeads(Softmax):
    """Softmax attention whose heads are weighed for each token: `shared` heads are always on, and the `top` of the
    others by a router (MoH, Jin et al. 2024, arXiv:2410.11842).

    The weights of S shared heads are S a softmax(W_s x), those of the chosen ones top b softmax(W_r x) over themselves
    alone, with (a, b) = 2 softmax(W_h x); all are 1 where the router has no preference. top=0 chooses three quarters of
    the heads that are not shared, and one of two. All heads are computed. Fewer than all others add a balance loss in
    training (see `zoo.kernels.routing.balance_loss`), from which alone the router learns to choose with top=1.

    how='leave_one_out' is a mixture of h experts, each of which lacks one of the h heads: head i is weighed by
    h / (h - 1) (1 - g_i), with g = softmax(W x) (MAE, Peng et al. 2020, arXiv:2005.06537, who compute g once for a
    sequence and train it in turns with the experts). It takes neither shared nor top.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        place: Place = ANYWHERE,
        *,
        shared: int = 1,
        top: int = 0,
        how: str = "topk",
    ) -> None:
        super().__init__(dim, heads, place)
        if how not in WAYS:
            raise ValueError(unknown("how", how, WAYS))
        if heads < 2:
            raise ValueError(f"a mixture of heads needs at least 2 heads, got {heads}")
        if how == "leave_one_out" and (shared, top) != (1, 0):
            raise ValueError(f"how='leave_one_out' takes neither shared nor top, got shared={shared} and top={top}")
        if shared > heads or top > heads - shared:
            raise ValueError(f"shared and top must be at most the {heads} heads together, got {shared} and {top}")
        self.how, self.shared, self.others = how, shared, heads - shared
        self.top = top or min((3 * self.others + 2) // 4, max(1, self.others - 1))
        if how == "leave_one_out":
            self.shared, self.others, self.top = 0, heads, heads
        # A softmax over one head is always 1.
        self.rows = [self.shared, self.others, 2 if self.shared and self.others else 0]
        self.rows = [rows if rows > 1 else 0 for rows in self.rows]
        self.router = linear(dim, sum(self.rows), bias=False)
        self.reports_loss = self.top < self.others

    def forward(self, x: Tensor, context: Context) -> Tensor:
        y = self.mix(*self.project(x, context), context)
        y = (y * self.gates(x, context)[..., None].to(y.dtype)).flatten(2)
        return self.out(y if self.inner is None else self.inner(y, context))

    def gates(self, x: Tensor, context: Context) -> Tensor:
        """The weights of all heads, [B, N, H]."""
        logits = logits_of(self.router, x if context.code is None else x + context.code)
        if self.how == "leave_one_out":
            return self.heads / (self.heads - 1) * (1 - logits.softmax(-1))
        always, others, kinds = logits.split(self.rows, -1)
        parts = [self.shared * always.softmax(-1) if self.rows[0] else logits.new_ones(*x.shape[:2], self.shared)]
        parts.append(self.chosen(others, context) if self.rows[1] else logits.new_ones(*x.shape[:2], self.others))
        if self.rows[2]:
            share = 2 * kinds.softmax(-1)
            parts = [part * share[..., which : which + 1] for which, part in enumerate(parts)]
        return torch.cat(parts, -1)

    def chosen(self, logits: Tensor, context: Context) -> Tensor:
        """The weights of the heads that are not shared, [B, N, others], 0 for those that are not chosen."""
        routes = route(logits, self.top)
        if self.wants_loss(context):
            self.add_loss(context, balance_loss(routes, context.mask))
        gates = self.top * routes.gates / routes.gates.sum(-1, keepdim=True)
        return spread(gates[..., None], routes.experts, self.others)[..., 0]

    def inputs(self) -> list[nn.Linear] | str:
        return [self.qkv, self.router]


class MixtureOfAttention(DotProduct):
    """sum_e g_e W_e softmax(q_e k^T / sqrt(d)) v over the `top` of `experts` heads, which a router chooses for each
    token; heads have queries and outputs of their own, and share one head of keys and values (MoA, Zhang et al. 2022,
    arXiv:2210.05144).

    The weights g are the probabilities p = softmax(R x), divided by their sum over the chosen heads, which gets no
    gradient. top=experts uses all of them with soft weights (BAM, Zhang et al. 2024, arXiv:2408.08274, where their keys
    and values are shared). head_dim=0 means dim / heads; `heads` has no other effect. In training the layer adds a
    balance loss, and 0.1 of a z-loss (see `zoo.kernels.routing`).
    """

    reads = DotProduct.reads - {"bias"}

    def __init__(
        self, dim: int, heads: int, place: Place = ANYWHERE, *, experts: int = 8, top: int = 4, head_dim: int = 0
    ) -> None:
        super().__init__(dim, experts, self.head_width_of(dim, heads, head_dim=head_dim), 1)
        if top > experts:
            raise ValueError(f"top must be at most the {experts} experts, got {top}")
        self.top = top
        self.router = linear(dim, experts, bias=False)
        self.reports_loss = top < experts

    @classmethod
    def sites_of(cls, dim: int, heads: int, **options: Any) -> dict[str, Site]:
        width = cls.head_width_of(dim, heads, **options)
        return dict.fromkeys(("query", "key", "value"), Site(width))

    def forward(self, x: Tensor, context: Context) -> Tensor:
        coded = x if context.code is None else x + context.code
        logits = logits_of(self.router, coded)
        routes = route(logits, self.top, context.mask)
        if self.wants_loss(context):
            self.add_loss(context, balance_loss(routes, context.mask) + Z * z_loss(logits, context.mask))
        found = None
        if self.top < self.heads and not every_expert(self.qkv, self.out):
            found = grouped(routes.experts, self.heads, context.mask)
        last = sum(self.widths[:2])
        key, value = self.projected(coded, self.widths[0], last), self.projected(x, last, last + self.head_dim)
        query, key, value = self.split(self.queries(coded, routes, found), key, value, context)
        y = self.mix(query, key, value, context)
        gates = routes.gates / routes.gates.sum(-1, keepdim=True).detach().clamp(min=1e-12)
        return self.combined(y * gates[..., None].to(y.dtype), routes, found)

    def projected(self, x: Tensor, first: int, last: int) -> Tensor:
        """Some of the channels of the projection, [B, N, last - first]."""
        if callable(self.qkv.weight):  # quantized
            return self.qkv(x)[..., first:last]
        bias = self.qkv.bias
        return F.linear(x, self.qkv.weight[first:last], None if bias is None else bias[first:last])

    def queries(self, x: Tensor, routes: Routes, found: Grouped | None) -> Tensor:
        """The queries of each token's heads, [B, N, top * d]."""
        width = self.widths[0]
        if found is None:
            every = self.projected(x, 0, width).unflatten(-1, (self.heads, self.head_dim))
            chosen = routes.experts[..., None].expand(-1, -1, -1, self.head_dim)
            return every.gather(2, chosen).flatten(2)
        weights, bias = self.qkv.weight[:width].unflatten(0, (self.heads, -1)), self.qkv.bias
        biases = None if bias is None else bias[:width].unflatten(0, (self.heads, -1))
        rows = x.flatten(0, 1)[found.slots // self.top]
        return to_slots(apart(rows, weights, biases, found.sizes), found, routes.experts.shape).flatten(2)

    def mix(self, query: Tensor, key: Tensor, value: Tensor, context: Context) -> Tensor:
        return super().mix(query, key, value, context._replace(bias=None))  # heads are experts here

    def combined(self, y: Tensor, routes: Routes, found: Grouped | None) -> Tensor:
        """The sum of the outputs of each token's heads, of y [B, N, top, d]."""
        if found is None:
            return self.out(spread(y, routes.experts, self.heads).flatten(2))
        weights = self.out.weight.unflatten(1, (self.heads, -1)).movedim(1, 0)
        rows = apart(y.flatten(0, 2)[found.slots], weights, None, found.sizes)
        total = to_slots(rows, found, routes.experts.shape).sum(2)
        return total + self.out.bias.to(total.dtype)

    def inputs(self) -> list[nn.Linear] | str:
        return [self.qkv, self.router]

"""Attention whose scores become weights by something other than softmax."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from zoo.layer import ANYWHERE, Context, Order, Place
from zoo.mixers.projected import rotate
from zoo.mixers.scored import ALL, Pairs, Scored, softmax
from zoo.norms import LayerNorm, Norm, RMSNorm
from zoo.tensors import single
from zoo.text import unknown

OUTPUT_NORMS: dict[str, type[Norm] | None] = {"rmsnorm": RMSNorm, "layernorm": LayerNorm, "none": None}
SCALES = ("none", "length")


class Power(Scored):
    """s^power / sum_j s_j^power in place of softmax, s = q k^T / sqrt(d), for an even power (Power-Softmax, Zimerman et
    al. 2024, arXiv:2410.09457). It has no exponential, so that an encrypted model can compute it."""

    headwise = True

    def __init__(self, dim: int, heads: int, place: Place = ANYWHERE, *, power: int = 2) -> None:
        super().__init__(dim, heads)
        if power % 2:
            raise ValueError(f"power must be even, got {power}")
        self.power = power

    def weights(self, scores: Tensor, pairs: Pairs) -> Tensor:
        scores = pairs.masked(scores, 0.0)
        largest = scores.detach().abs().amax(-1, keepdim=True).clamp(min=1e-6)
        powers = (scores / largest) ** self.power
        return powers / powers.sum(-1, keepdim=True).clamp(min=1e-6)


class Entmax(Scored):
    """max(0, (alpha - 1) s_j - tau)^(1 / (alpha - 1)) in place of softmax, where tau makes a query's weights sum to 1;
    many of them are exactly 0 (alpha-entmax, Peters et al. 2019, arXiv:1905.05702).

    alpha is 1, which is softmax, or from 1.01 to 2, which is sparsemax (Martins and Astudillo 2016, arXiv:1602.02068).
    tau is exact, by sorting, for 1.5 and 2, and by bisection for others. learned=True learns an alpha for each head,
    1 + sigmoid(a) and at least 1.01, which starts at `alpha` (Correia et al. 2019, arXiv:1909.00015; for speech Zhao et
    al. 2022, arXiv:2209.15176).
    """

    def __init__(
        self, dim: int, heads: int, place: Place = ANYWHERE, *, alpha: float = 1.5, learned: bool = False
    ) -> None:
        super().__init__(dim, heads)
        if alpha != 1.0 and not 1.01 <= alpha <= 2.0:
            raise ValueError(f"alpha must be 1, or from 1.01 to 2, got {alpha}")
        if learned and not 1.01 <= alpha < 2.0:
            raise ValueError(f"a learned alpha must start from 1.01 to below 2, got {alpha}")
        self.alpha = alpha
        start = math.log((alpha - 1) / (2 - alpha)) if learned else 0.0
        self.sparsity = nn.Parameter(torch.full((heads,), start)) if learned else None

    def weights(self, scores: Tensor, pairs: Pairs) -> Tensor:
        if self.sparsity is not None:
            alpha = (1 + single(self.sparsity).sigmoid()).clamp(min=1.01)[:, None, None]
            return entmax(pairs.masked(scores), alpha).to(scores.dtype)
        if self.alpha == 1.0:
            return super().weights(scores, pairs)
        return entmax(pairs.masked(scores), self.alpha).to(scores.dtype)


def entmax(scores: Tensor, alpha: float | Tensor) -> Tensor:
    """alpha-entmax over the last axis, in at least single precision; -inf gets no weight. alpha is from 1.01 to 2.

    tau is found without a graph. A Newton step from it changes nothing but gives it the gradient of the implicit
    function tau(scores, alpha).
    """
    power = 1 / (alpha - 1)
    scores = single(scores)
    # What is 1000 below the largest score has no weight for any alpha, and finite scores keep the gradient of alpha so.
    z = (alpha - 1) * (scores - scores.detach().amax(-1, keepdim=True)).clamp(min=-1000.0)
    with torch.no_grad():
        if isinstance(alpha, float) and alpha in (1.5, 2.0):
            tau = sorted_threshold(z, alpha)
        else:
            tau = newton_step(z, bisected_threshold(z, power), power)
    return (z - newton_step(z, tau, power)).clamp(min=0.0) ** power


def newton_step(z: Tensor, tau: Tensor, power: float | Tensor) -> Tensor:
    """A tau nearer to that at which max(0, z - tau)^power sums to 1 over the last axis."""
    excess = (z - tau).clamp(min=0.0)
    fixed = excess.detach()
    slope = torch.where(fixed > 0, power * fixed ** (power - 1), 0.0).sum(-1, keepdim=True)
    return tau + ((excess**power).sum(-1, keepdim=True) - 1) / slope


def sorted_threshold(z: Tensor, alpha: float) -> Tensor:
    """The tau at which max(0, z - tau)^(1 / (alpha - 1)) sums to 1 over the last axis, for alpha 1.5 or 2."""
    ordered = z.sort(-1, descending=True).values
    count = torch.arange(1, z.shape[-1] + 1, device=z.device, dtype=z.dtype)
    mean = ordered.cumsum(-1) / count
    if alpha == 2.0:
        taus = mean - 1 / count
        inside = ordered > taus
    else:
        spread = ordered.square().cumsum(-1) / count - mean.square()
        taus = mean - (1 / count - spread).clamp(min=0.0).sqrt()
        inside = ordered >= taus
    return taus.gather(-1, inside.sum(-1, keepdim=True) - 1)


def bisected_threshold(z: Tensor, power: float | Tensor) -> Tensor:
    """The tau at which max(0, z - tau)^power sums to 1 over the last axis, for z whose largest is 0."""
    tau, width = torch.full_like(z[..., :1], -1.0), 1.0
    for _ in range(30):
        width /= 2
        mass = ((z - tau - width).clamp(min=0.0) ** power).sum(-1, keepdim=True)
        tau = torch.where(mass >= 1, tau + width, tau)
    return tau


class NAP(Scored):
    """gain (s_j - mean) / sqrt(variance + 1e-6) + shift in place of softmax, with the mean and variance of a query's
    scores (normalized attention pooling, Richter and Wattenhofer 2020, arXiv:2005.09561).

    Each head learns its gain and its shift, which start at 1 and 0. Weights may be negative, and do not shrink with the
    number of keys; the paper has LayerNorm before the output linear, as placement='sub' does.
    """

    def __init__(self, dim: int, heads: int, place: Place = ANYWHERE) -> None:
        super().__init__(dim, heads)
        self.gain = nn.Parameter(torch.ones(heads))
        self.shift = nn.Parameter(torch.zeros(heads))

    def weights(self, scores: Tensor, pairs: Pairs) -> Tensor:
        values = single(scores)
        number = pairs.seen(values)
        centred = values - pairs.masked(values, 0.0).sum(-1, keepdim=True) / number
        centred = pairs.masked(centred, 0.0)
        variance = centred.square().sum(-1, keepdim=True) / number
        standard = centred * torch.rsqrt(variance + 1e-6)
        return pairs.masked(self.gain[:, None, None] * standard + self.shift[:, None, None], 0.0).to(scores.dtype)


class ReLA(Scored):
    """norm(z) * sigmoid(g * z), z = relu(q k^T / sqrt(d)) v, a norm in place of softmax; g is a vector that starts at 0
    (rectified linear attention, Zhang et al. 2021, arXiv:2104.07012).

    norm is over the channels of all heads: `rmsnorm`, `layernorm` (Zhou et al. 2023, arXiv:2309.10713) or `none`.
    gate=True adds the sigmoid, False omits it; by default only `rmsnorm` has it. scale='length' divides the weights by
    sqrt(n / 2), for n keys that the query sees, as in ReLUFormer, which has norm='none' (Shen et al. 2023,
    arXiv:2302.06461); its loss is not here.
    """

    headwise = True

    def __init__(
        self,
        dim: int,
        heads: int,
        place: Place = ANYWHERE,
        *,
        norm: str = "rmsnorm",
        gate: bool | None = None,
        scale: str = "none",
    ) -> None:
        super().__init__(dim, heads)
        if norm not in OUTPUT_NORMS:
            raise ValueError(unknown("norm", norm, OUTPUT_NORMS))
        if scale not in SCALES:
            raise ValueError(unknown("scale", scale, SCALES))
        if gate not in (None, True, False):
            raise ValueError(f"gate must be True, False or None, got {gate!r}")
        width, row = heads * self.value_dim, OUTPUT_NORMS[norm]
        self.output_norm = None if row is None else row(width, place)
        gated = norm == "rmsnorm" if gate is None else gate
        self.gate = nn.Parameter(torch.zeros(width)) if gated else None
        self.by_length = scale == "length"

    def weights(self, scores: Tensor, pairs: Pairs) -> Tensor:
        weights = pairs.masked(scores, 0.0).relu()
        if self.by_length:
            weights = weights * (2 / pairs.seen(single(scores))).sqrt().to(scores.dtype)
        return weights

    def mix(self, query: Tensor, key: Tensor, value: Tensor, context: Context) -> Tensor:
        z = super().mix(query, key, value, context).flatten(2)
        y = z if self.output_norm is None else self.output_norm(z, context)
        if self.gate is not None:
            y = (y * (self.gate * z).sigmoid()).to(z.dtype)
        return y.unflatten(-1, (self.heads, -1))


class Sinkhorn(Scored):
    """exp(s_ij + u_i + v_j), scaled in turn so that the weights of each query and those of each key sum to 1: nearly a
    doubly stochastic map (Sinkformer, Sander et al. 2021, arXiv:2110.11773).

    steps counts both kinds of scaling. It is odd, since queries come first and last; steps=1 is softmax. Padded queries
    do not count in the sums of keys. Later queries do, so there are no chunks along time and no causal models.
    """

    reads = Scored.reads - {"visible", "order"}

    def __init__(self, dim: int, heads: int, place: Place = ANYWHERE, *, steps: int = 3) -> None:
        super().__init__(dim, heads)
        if steps % 2 == 0:
            raise ValueError(f"steps must be odd, got {steps}")
        self.steps = steps

    def mix(self, query: Tensor, key: Tensor, value: Tensor, context: Context) -> Tensor:
        potentials = self.potentials(query, key, context).permute(0, 3, 1, 2)
        return super().mix(query, torch.cat([key, potentials.to(key.dtype)], -1), value, context)

    def turned(self, x: Tensor, rotary: Tensor | None) -> Tensor:
        width = self.head_dim
        return torch.cat([rotate(x[..., :width], rotary), x[..., width:]], -1)

    def scores(self, query: Tensor, key: Tensor, pairs: Pairs) -> Tensor:
        """Scores plus the potentials, which are the last channel of the keys."""
        scores = super().scores(query, key[..., :-1], pairs)
        return scores + key[..., None, :, -1].to(scores.dtype)

    def potentials(self, query: Tensor, key: Tensor, context: Context) -> Tensor:
        """The logarithms v of what scales the keys, [B, H, 1, M]; some queries at a time in inference."""
        query, key = (self.turned(part, context.rotary).transpose(1, 2).contiguous() for part in (query, key))
        number, allowed, unreal = query.shape[2], self.allowance(context.mask, query.shape[2], key, context), None
        if context.mask is not None:
            unreal = ~(context.mask | ~context.mask.any(-1, keepdim=True))
        potential = single(query.new_zeros(*query.shape[:2], 1, number))
        chunks = self.chunks(number, query, key)
        for _ in range(self.steps // 2):
            total = torch.full_like(potential, -1e30)
            for part in chunks:
                pairs = Pairs(part.start, 0, allowed, context)
                logarithms = (pairs.masked(super().scores(query[:, :, part], key, pairs)) + potential).log_softmax(-1)
                if unreal is not None:
                    left_out = unreal[:, None, part, None] | unreal[:, None, None]
                    logarithms = logarithms.masked_fill(left_out, -1e30)
                total = torch.logaddexp(total, logarithms.logsumexp(-2, keepdim=True))
            potential = potential - total
            if unreal is not None:
                potential = potential.masked_fill(unreal[:, None, None], 0.0)
        return potential


class TopK(Scored):
    """softmax over the k largest scores of each query; other keys get no weight. k of at least the number of keys is
    softmax attention (Gupta et al. 2021, arXiv:2106.06899; AxFormer and IceFormer choose keys so in trained models).
    On images k must be at most the number of tokens at the config's size, or 32."""

    headwise = True

    def __init__(self, dim: int, heads: int, place: Place = ANYWHERE, *, k: int = 32) -> None:
        super().__init__(dim, heads)
        most = max(32, math.prod(place.grid) + place.prefix)
        if place.axes == 2 and place.grid and k > most:
            raise ValueError(f"k must be at most {most}, as there are few tokens, got {k}")
        self.k = k

    def weights(self, scores: Tensor, pairs: Pairs) -> Tensor:
        scores = pairs.masked(scores)
        largest, places = scores.topk(min(self.k, scores.shape[-1]), -1, sorted=False)
        weights = softmax(largest)  # in mixed precision of another dtype than the scores
        return weights.new_zeros(scores.shape).scatter(-1, places, weights).to(scores.dtype)


class HeadMask(Scored):
    """Softmax attention that in training masks each head with the probability `rate`, but never all of them, and
    scales the others by heads / (heads left) (HeadMask, Sun et al. 2020, arXiv:2009.09672). All samples of a batch have
    the same heads. The paper also masks the most important heads; here they are drawn at random."""

    headwise = True

    def __init__(self, dim: int, heads: int, place: Place = ANYWHERE, *, rate: float = 0.1) -> None:
        super().__init__(dim, heads)
        if rate >= 1.0:
            raise ValueError(f"rate must be below 1, got {rate}")
        self.rate = rate

    def mix(self, query: Tensor, key: Tensor, value: Tensor, context: Context) -> Tensor:
        y = super().mix(query, key, value, context)
        if not self.training or self.rate == 0.0:
            return y
        kept = torch.rand(self.heads, device=y.device) >= self.rate
        kept = (kept | ~kept.any()).to(y.dtype)
        return y * (kept * self.heads / kept.sum())[:, None]


class Relaxed(Scored):
    """Softmax attention whose weights in training are (1 - rate) softmax(s) + rate / n, for the n keys that the query
    sees (relaxed attention, Lohrenz et al. 2022, arXiv:2209.09735)."""

    headwise = True

    def __init__(self, dim: int, heads: int, place: Place = ANYWHERE, *, rate: float = 0.1) -> None:
        super().__init__(dim, heads)
        if rate > 1.0:
            raise ValueError(f"rate must be at most 1, got {rate}")
        self.rate = rate

    def weights(self, scores: Tensor, pairs: Pairs) -> Tensor:
        weights = super().weights(scores, pairs)
        if not self.training or self.rate == 0.0:
            return weights
        share = (self.rate / pairs.seen(single(scores))).to(scores.dtype)
        return pairs.masked((1 - self.rate) * weights + share, 0.0)


class Causal(Scored):
    """softmax(q k^T / sqrt(d) + bias) * mask, where the mask becomes causal over training, line by line on an image
    (iLLaMA, Wang et al. 2024, arXiv:2404.06773). It needs a ViT with causal=True.

    The mask is 1 for a token itself and those before it, and `blend` for later ones. Prefix tokens see all tokens, and
    no other token sees them, as if they came last. The blend falls linearly from 1 to 0 until the share `until` of
    training; until=0 is causal from the start. `zoo.advance` sets it, and it never rises again. As published, the mask
    comes after softmax: weights do not sum to 1, and later tokens still count in the sum inside softmax.
    normalized=True divides by the sum of what the mask leaves, so that in the end no token depends on later ones.
    """

    reads = Scored.reads - {"visible"}
    causal = True
    blend: Tensor

    def __init__(
        self, dim: int, heads: int, place: Place = ANYWHERE, *, until: float = 0.5, normalized: bool = False
    ) -> None:
        super().__init__(dim, heads)
        if until > 1.0:
            raise ValueError(f"until must be at most 1, got {until}")
        self.until, self.normalized = until, normalized
        self.share = 1.0 if until > 0 else 0.0  # the blend, known without asking the device
        self.register_buffer("blend", torch.tensor(self.share))
        self.register_load_state_dict_post_hook(Causal.note_share)

    def note_share(self, incompatible_keys: Any) -> None:
        self.share = 1.0 if self.blend.is_meta else self.blend.item()

    @property
    def finished(self) -> bool:
        """Whether the blend is 0."""
        return self.share == 0.0

    def advance(self, progress: float) -> None:
        if self.until > 0:
            self.share = min(self.share, max(0.0, (self.until - progress) / self.until))
            self.blend.fill_(self.share)

    def allowance(
        self, real: Tensor | None, number: int, key: Tensor, context: Context, rows: slice = ALL
    ) -> Tensor | None:
        # The order is applied to the weights.
        return super().allowance(real, number, key, context._replace(order=None), rows)

    def weights(self, scores: Tensor, pairs: Pairs) -> Tensor:
        earlier = Order(pairs.context.prefix).allow(*pairs.places(scores))
        if self.normalized:  # the mask goes into softmax as its logarithm, finite for rows of later tokens alone
            lowered = single(self.blend).log().clamp(min=torch.finfo(scores.dtype).min / 2)
            return super().weights(scores + torch.where(earlier, 0.0, lowered).to(scores.dtype), pairs)
        return super().weights(scores, pairs) * torch.where(earlier, 1.0, self.blend).to(scores.dtype)

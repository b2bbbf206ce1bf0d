"""The Block: layouts, placements, modulation, stochastic depth, masks, prefix tokens, checkpointing."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from block_cases import (
    BASE,
    CONFORMER,
    DECODER,
    DIFFUSION,
    LAYOUTS,
    LINE,
    PARALLEL,
    SQUEEZEFORMER,
    check_dropout,
    context_of,
    grid_of,
)
from helpers import padded, position, randomise, relative
from zoo.block import Block, Residual
from zoo.choices import PLACEMENTS, BlockConfig
from zoo.ffns import ACTIVATIONS, FFNS
from zoo.layer import Context, advance
from zoo.models.base import drop_rates, run
from zoo.norms import BatchNorm


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_trains_and_ignores_padding(name):
    config = LAYOUTS[name]
    block = randomise(Block(config))
    small, large = grid_of(config, 5), grid_of(config, 6 if config.place.axes == 2 else 9)
    near, far = context_of(config, small), context_of(config, large, [small, small])
    x = torch.randn(2, near.grid[0] * (near.grid[1] if config.place.axes == 2 else 1), 32)
    wide = padded(x, near, large)
    real = far.mask
    for training in (True, False):  # training first, so that inference has statistics
        block.train(training)
        wanted, got = block(x, near), block(wide, far)
        assert wanted.shape == x.shape
        assert relative(got[real].view(wanted.shape), wanted) < 1e-5
    block.train()
    (block(x, near) * torch.randn(32)).square().sum().backward()
    missing = [key for key, parameter in block.named_parameters() if parameter.grad is None]
    assert not missing


def test_order_inside_a_residual():
    """x + factor * layer_scale * channel(branch(before(x))), written out."""
    config = BlockConfig(**BASE, layout=("half", "mixer"), layer_scale=0.5, channel="eca")
    block = randomise(Block(config)).eval()
    x, context = torch.randn(2, 12, 32), Context(grid=(3, 4))
    wanted = x
    for step, factor in zip(block.steps, (0.5, 1.0), strict=True):
        y = step.channel(step.branch(step.before(wanted, context), context), context)
        wanted = wanted + factor * step.layer_scale * y
    assert relative(block(x, context), wanted) < 1e-6


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_placements(placement):
    """Each placement against its formula, written out for both branches."""
    config = BlockConfig(**BASE, placement=placement)
    mixer, ffn = randomise(Block(config)).eval().steps
    x, context = torch.randn(2, 12, 32), Context(grid=(3, 4))
    norms = [name for name, layer in Block(config).named_modules() if type(layer).__name__ == "LayerNorm"]
    attend, feed = mixer.branch, ffn.branch

    def norm(layer, y):
        return F.layer_norm(y, (y.shape[-1],), layer.weight, layer.bias, 1e-6)

    def attention(y, head_norms=False, inner=None):
        q, k, v = attend.qkv(y).unflatten(-1, (3, 2, 16)).unbind(2)
        if head_norms:
            q, k, v = norm(attend.query, q), norm(attend.key, k), norm(attend.value, v)
        q, k, v = (part.transpose(1, 2) for part in (q, k, v))
        scores = (q @ k.transpose(-1, -2) / 4).softmax(-1)
        mixed = (scores @ v).transpose(1, 2)
        mixed = mixed * attend.inner.weight[:, None] if inner == "heads" else mixed
        mixed = mixed.flatten(2)
        return attend.out(norm(attend.inner, mixed) if inner == "norm" else mixed)

    def feeding(y, inner=False):
        hidden = F.gelu(feed.expand(y))
        return feed.out(norm(feed.inner, hidden) if inner else hidden)

    if placement == "pre":
        y = x + attention(norm(mixer.before, x))
        wanted, count = y + feeding(norm(ffn.before, y)), 2
    elif placement == "post":
        y = norm(mixer.total, x + attention(x))
        wanted, count = norm(ffn.total, y + feeding(y)), 2
    elif placement == "peri":
        y = x + norm(mixer.after, attention(norm(mixer.before, x)))
        wanted, count = y + norm(ffn.after, feeding(norm(ffn.before, y))), 4
    elif placement == "res_post":
        y = x + norm(mixer.after, attention(x))
        wanted, count = y + norm(ffn.after, feeding(y)), 2
    elif placement == "res_scale":
        y = mixer.shortcut * x + attention(norm(mixer.before, x))
        wanted, count = ffn.shortcut * y + feeding(norm(ffn.before, y)), 2
    elif placement == "sub":
        y = x + attention(norm(mixer.before, x), inner="norm")
        wanted, count = y + feeding(norm(ffn.before, y), inner=True), 4
    elif placement == "sub_ffn":
        y = x + attention(norm(mixer.before, x))
        wanted, count = y + feeding(norm(ffn.before, y), inner=True), 3
    elif placement == "hybrid":
        y = x + attention(x, head_norms=True)
        stream = norm(ffn.before, y)
        wanted, count = stream + feeding(stream), 4
    elif placement == "crate":
        y = x + attention(norm(mixer.before, x))
        stream = norm(ffn.before, y)
        wanted, count = stream + feeding(stream), 2
    elif placement == "normformer":
        y = x + norm(mixer.after, attention(norm(mixer.before, x), inner="heads"))
        wanted, count = y + feeding(norm(ffn.before, y), inner=True), 4
    else:
        assert placement == "scaled"
        y = norm(mixer.total, x + attention(x * mixer.before.weight + mixer.before.bias))
        wanted, count = norm(ffn.total, y + feeding(y * ffn.before.weight + ffn.before.bias)), 2
    assert relative(ffn(mixer(x, context), context), wanted) < 1e-5
    assert len(norms) == count


def test_modulation_starts_as_the_identity_and_then_acts():
    block = Block(DIFFUSION)
    x, context = torch.randn(2, 12, 32), context_of(DIFFUSION, (3, 4))
    assert torch.equal(block(x, context), x)
    randomise(block)
    step = block.steps[1]
    shift, scale, gate = F.linear(F.silu(context.cond), step.modulation.weight, step.modulation.bias).chunk(3, -1)
    wanted = x + gate * step.branch(step.before(x, context) * (1 + scale) + shift, context)
    assert relative(step(x, context), wanted) < 1e-6
    by_token = context._replace(cond=context.cond.expand(-1, 12, -1))
    assert relative(block(x, by_token), block(x, context)) < 1e-6
    with pytest.raises(ValueError, match="cond"):
        block(x, Context(grid=(3, 4)))


def test_cross_attention_needs_and_uses_its_memory():
    block = randomise(Block(DECODER)).eval()
    x, context = torch.randn(2, 5, 32), context_of(DECODER, (5,))
    y = block(x, context)
    memory = context.memory
    hidden = memory.tokens.clone()
    hidden[1, 4:] = 9.0  # masked there
    assert relative(block(x, context._replace(memory=memory._replace(tokens=hidden))), y) < 1e-6
    hidden[0, 4:] = 9.0  # real here
    assert relative(block(x, context._replace(memory=memory._replace(tokens=hidden)))[:1], y[:1]) > 1e-3
    code = memory._replace(code=torch.randn(1, 6, 32))
    assert relative(block(x, context._replace(memory=code)), y) > 1e-3
    assert relative(block(x, context._replace(code=2 * context.code)), y) > 1e-3
    with pytest.raises(ValueError, match="memory"):
        block(x, context._replace(memory=None))


def test_parallel_branches_share_one_norm():
    step = randomise(Block(PARALLEL)).eval().steps[0]
    x, context = torch.randn(2, 12, 32), Context(grid=(3, 4))
    y = step.before(x, context)
    wanted = x + step.branch.branches[0](y, context) + step.branch.branches[1](y, context)
    assert relative(step(x, context), wanted) < 1e-6


def test_stochastic_depth_drops_whole_samples_at_a_rate_that_grows_with_depth():
    config = BlockConfig(**BASE, layout=("ffn",))
    rates = [Block(config, rate).steps[0].drop for rate in drop_rates(0.4, 5)]
    assert rates == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4])
    step = Block(config, 0.4).steps[0]
    x, context = torch.randn(1, 6, 32).expand(4000, -1, -1), Context(grid=(2, 3))
    moved = step(x, context) - x
    kept = moved.abs().amax((1, 2)) > 0
    assert abs(kept.float().mean().item() - 0.6) < 0.03
    full = step.eval()(x[:1], context) - x[:1]
    assert relative(moved[kept], full.expand(int(kept.sum()), -1, -1) / 0.6) < 1e-4


def test_dropout_drops_single_values_of_a_branch():
    step = randomise(Block(BlockConfig(**BASE, layout=("ffn",), dropout=0.3))).double().steps[0]
    x, context = torch.randn(8, 12, 32, dtype=torch.float64), Context(grid=(3, 4))
    got = step(x, context) - x
    check_dropout(got, step.eval()(x, context) - x, 0.3)


def test_mlp_drops_what_its_second_linear_reads():
    ffn, seen = randomise(FFNS["mlp"](32, dropout=0.3)), []
    ffn.out.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    x = torch.randn(8, 12, 32)
    for training in (True, False):
        ffn.train(training)(x, Context(grid=(3, 4)))
    check_dropout(*seen, 0.3)


@pytest.mark.parametrize("norm", ["batchnorm", "prepbn"])
def test_checkpointing_changes_no_value_and_moves_statistics_once(norm):
    config = BlockConfig(**LINE, norm=norm, layout=CONFORMER.layout, mixer="sla")
    outcomes, calls = [], {False: 0, True: 0}
    for checkpointing in (False, True):
        torch.manual_seed(1)
        blocks = torch.nn.ModuleList(Block(config, rate) for rate in drop_rates(0.5, 2))
        advance(blocks, 0.4)
        for block in blocks:
            block.register_forward_pre_hook(lambda *_, on=checkpointing: calls.update({on: calls[on] + 1}))
        torch.manual_seed(2)
        x = torch.randn(2, 9, 32, requires_grad=True)
        mask = torch.arange(9)[None] < torch.tensor([[9], [5]])
        run(blocks, x, Context(grid=(9,), mask=mask), checkpointing).square().sum().backward()
        outcomes.append([x.grad] + [parameter.grad for parameter in blocks.parameters()] + list(blocks.buffers()))
    assert all(torch.equal(one, other) for one, other in zip(*outcomes, strict=True))
    assert calls == {False: 2, True: 4}


@pytest.mark.parametrize("gate", ["glu", "swish"])
def test_the_convolution_branch_is_its_formula(gate):
    """Linear, gate, depthwise convolution, batch norm, swish, linear."""
    step = Block(BlockConfig(**LINE, layout=("conv",), conv=f"{gate}(kernel=7)")).steps[0]
    branch = randomise(step.branch).eval()
    x = torch.randn(2, 11, 32)
    y = branch.expand(x)
    y = y[..., :32] * torch.sigmoid(y[..., 32:]) if gate == "glu" else y * torch.sigmoid(y)
    y = F.conv1d(y.transpose(1, 2), branch.conv.weight, branch.conv.bias, padding=3, groups=y.shape[-1])
    norm = branch.norm
    y = F.batch_norm(y, norm.running_mean, norm.running_var, norm.weight, norm.bias).transpose(1, 2)
    assert relative(branch(x, Context(grid=(11,))), branch.out(y * torch.sigmoid(y))) < 1e-5


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_are_what_they_are_called(name):
    theirs = {"gelu": nn.GELU(), "gelu_tanh": nn.GELU("tanh"), "relu": nn.ReLU(), "silu": nn.SiLU()}
    theirs = (theirs | {"quick_gelu": lambda x: x / (1 + (-1.702 * x).exp())})[name]
    ffn = randomise(FFNS["mlp"](32, activation=name))
    x = torch.randn(2, 5, 32)
    assert relative(ffn(x, Context(grid=(5,))), ffn.out(theirs(ffn.expand(x)))) < 1e-6


@pytest.mark.parametrize("base", ["sincos", "rope", "cpe", "learned"])
def test_positions_break_the_symmetry_of_attention(base):
    """Without a position, exchanging tokens exchanges outputs; with one it does not."""
    block = randomise(Block(BlockConfig(**BASE))).eval()
    x = torch.randn(1, 12, 32)
    order = torch.randperm(12)

    def outcome(tokens, name):
        layer = randomise(position(name, 32, 16, (3, 4)), seed=5)
        context = layer.place(Context(grid=(3, 4)))
        return block(layer(tokens, context), context)

    assert relative(outcome(x[:, order], "none"), outcome(x, "none")[:, order]) < 1e-5
    assert relative(outcome(x[:, order], base), outcome(x, base)[:, order]) > 1e-3


def test_a_filled_or_missing_site_is_refused():
    with pytest.raises(ValueError, match="needs the site 'inner'"):
        Block(BlockConfig(**BASE, mixer="pool", placement="sub"))
    with pytest.raises(ValueError, match="needs the site 'query'; mixer .* has: value, inner"):
        Block(BlockConfig(**BASE, mixer="softmax(qk_norm='layernorm')", placement="hybrid"))
    with pytest.raises(ValueError, match="scales heads"):
        Block(BlockConfig(**BASE, mixer="sepconv", placement="normformer"))
    with pytest.raises(ValueError, match="share one norm"):
        Block(BlockConfig(**BASE, layout=("mixer+ffn",), placement="hybrid"))


def test_batch_statistics_are_found_in_every_family_layout():
    config = dataclasses.replace(SQUEEZEFORMER, norm="batchnorm")
    assert sum(isinstance(module, BatchNorm) for module in Block(config).modules()) == 5
    assert all(isinstance(step, Residual) for step in Block(config).steps)

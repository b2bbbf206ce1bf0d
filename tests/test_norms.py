"""Normalizations: the progressive blend, running statistics, ranks."""

import copy
import os

import pytest
import torch
import torch.multiprocessing
from torch import nn

from helpers import randomise, relative
from zoo import advance, refresh_statistics
from zoo.layer import Context
from zoo.norms import NORMS, BatchNorm, LayerNorm, PRepBN, RepBN
from zoo.spec import make

CONTEXT = Context(grid=(12,))


def prepbn(**options) -> PRepBN:
    return randomise(PRepBN(8, **options))  # pyright: ignore[reportReturnType]


@pytest.mark.parametrize(
    "options,progress,blend",
    [
        ({}, 0.0, 1.0),
        ({}, 0.4, 0.5),
        ({}, 0.8, 0.0),
        ({}, 1.0, 0.0),
        ({"until": 1.0}, 0.99, 0.01),
        ({"until": 0.6, "warmup": 0.2}, 0.2, 1.0),
        ({"until": 0.6, "warmup": 0.2}, 0.5, 0.25),
    ],
)
def test_the_blend_follows_progress(options, progress, blend):
    norm = prepbn(**options)
    advance(norm, progress)
    assert norm.blend.item() == pytest.approx(blend)
    assert norm.finished == (blend == 0.0)


def test_options_out_of_order_are_refused():
    with pytest.raises(ValueError, match="warmup"):
        PRepBN(8, until=0.2, warmup=0.3)
    with pytest.raises(ValueError, match="from 0 to 1, got"):
        advance(PRepBN(8), 1.5)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("progress", [0.0, 0.3, 1.0])
def test_both_modes_compute_the_blend(training, progress):
    """blend * LN(x) + (1 - blend) * (BN(x) + alpha x), against torch's own layers."""
    norm = prepbn().train(training)
    advance(norm, progress)
    batch, layer = nn.BatchNorm1d(8).train(training), nn.LayerNorm(8, eps=1e-6)
    state = norm.state_dict()
    batch.load_state_dict({k: v for k, v in state.items() if k in batch.state_dict()}, strict=False)
    layer.load_state_dict({k.split(".")[1]: v for k, v in state.items() if k.startswith("layernorm")})
    x = torch.randn(3, 12, 8)
    share = max(0.0, 1 - progress / 0.8)
    plain = batch(x.flatten(0, 1)).view(3, 12, 8) + norm.alpha * x
    assert relative(norm(x, CONTEXT), share * layer(x) + (1 - share) * plain) < 1e-5
    assert relative(norm.running_mean, batch.running_mean) < 1e-5
    assert relative(norm.running_var, batch.running_var) < 1e-5


def test_the_finished_flag_skips_work_and_changes_no_value():
    norm = prepbn().train()
    advance(norm, 1.0)
    slow = copy.deepcopy(norm)
    slow.share = 1e-30
    x = torch.randn(3, 12, 8)
    assert torch.equal(norm(x, CONTEXT), slow(x, CONTEXT))
    norm(x, CONTEXT).sum().backward()
    assert all(parameter.grad is not None for parameter in norm.parameters()), "DDP would wait for them"
    called = []
    norm.layernorm.register_forward_hook(lambda *_: called.append(1))
    norm(x, CONTEXT)
    assert not called


def test_a_loaded_norm_knows_that_it_has_finished():
    done, other = prepbn(), prepbn()
    advance(done, 1.0)
    other.load_state_dict(done.state_dict())
    assert other.finished
    other.load_state_dict(prepbn().state_dict())
    assert not other.finished


def test_the_blend_never_rises_again():
    """Further training of a finished norm starts from what it computed."""
    norm = prepbn().eval()
    advance(norm, 1.0)
    x = torch.randn(2, 12, 8)
    wanted = norm(x, CONTEXT)
    advance(norm, 0.0)
    assert norm.finished and torch.equal(norm(x, CONTEXT), wanted)


def test_forward_does_not_count():
    norm = prepbn().train()
    advance(norm, 0.3)
    blend = norm.blend.clone()
    for _ in range(3):
        norm(torch.randn(2, 12, 8), CONTEXT)
    assert torch.equal(norm.blend, blend)


@pytest.mark.parametrize("masked", [False, True])
def test_large_means_keep_their_variance(masked):
    """Squares are centred first: a mean of 10^4 leaves a variance of 1 intact in fp32."""
    norm = BatchNorm(8).train()
    x = 1e4 + torch.randn(4, 500, 8)
    mask = torch.ones(4, 500, dtype=torch.bool) if masked else None
    y = norm(x, Context(grid=(500,), mask=mask))
    assert (y.std((0, 1)) - 1).abs().max() < 1e-2


def test_refreshed_statistics_are_plain_averages_and_the_weights_stand_still():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.drop, self.second = BatchNorm(8), nn.Dropout(0.5), RepBN(8)

        def forward(self, x):
            return self.second(self.drop(self.first(x, CONTEXT)), CONTEXT)

    net = randomise(Net()).train()
    net.second.eval()
    modes = [module.training for module in net.modules()]
    before = {key: value.clone() for key, value in net.named_parameters()}
    batches = [torch.randn(4, 12, 8) * scale for scale in (1.0, 2.0, 3.0)]
    assert refresh_statistics(net, batches) == 3
    assert [module.training for module in net.modules()] == modes
    assert net.first.momentum == net.second.momentum == 0.1
    assert all(torch.equal(value, before[key]) for key, value in net.named_parameters())
    second = []  # what the second norm saw: without dropout, normalised by each batch's own statistics
    for batch in batches:
        own = (batch - batch.mean((0, 1))) / (batch.var((0, 1), correction=0) + net.first.eps).sqrt()
        second.append(own * net.first.weight + net.first.bias)
    for norm, seen in ((net.first, batches), (net.second, second)):
        means, variances = (torch.stack([fn(each, (0, 1)) for each in seen]) for fn in (torch.mean, torch.var))
        assert relative(norm.running_mean, means.mean(0)) < 1e-4
        assert relative(norm.running_var, variances.mean(0)) < 1e-4


def _rank(rank: int, folder: str, name: str, sizes: list[int]) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=len(sizes))
    norm, x, mask, weight = torch.load(f"{folder}/input.pt", weights_only=False)
    start = sum(sizes[:rank])
    part = slice(start, start + sizes[rank])
    own = x[part].clone().requires_grad_()
    y = norm(own, Context(grid=(x.shape[1],), mask=mask[part]))
    (y * weight * mask[part, :, None]).square().sum().backward()
    gradients = {key: parameter.grad for key, parameter in norm.named_parameters()}
    torch.save((own.grad, gradients, dict(norm.named_buffers())), f"{folder}/rank{rank}.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    os._exit(0)  # gloo's threads can abort an interpreter that shuts down, after all is computed and written


@pytest.mark.slow
@pytest.mark.parametrize("name", ["batchnorm", "prepbn"])
def test_ranks_share_statistics_and_gradients(name, tmp_path):
    """Two ranks equal one process with the whole batch; the second rank has no real token at all."""
    norm = randomise(NORMS[name](8)).train()
    advance(norm, 0.4)
    x = 2 + torch.randn(5, 7, 8)
    mask = torch.arange(7)[None] < torch.tensor([7, 3, 5, 0, 0])[:, None]
    weight = torch.randn(8)
    torch.save((norm, x, mask, weight), tmp_path / "input.pt")
    torch.multiprocessing.spawn(_rank, (str(tmp_path), name, [3, 2]), nprocs=2)  # pyright: ignore
    whole = x.clone().requires_grad_()
    y = norm(whole, Context(grid=(7,), mask=mask))
    (y * weight * mask[..., None]).square().sum().backward()
    parts = [torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in range(2)]
    real = mask[..., None]
    assert relative(torch.cat([part[0] for part in parts]) * real, whole.grad * real) < 1e-5
    for key, parameter in norm.named_parameters():
        assert relative(sum(part[1][key] for part in parts), parameter.grad) < 1e-4, key
    for key, buffer in norm.named_buffers():
        assert relative(parts[0][2][key], buffer) < 1e-5 and torch.equal(parts[0][2][key], parts[1][2][key])


def test_dyt_is_a_scaled_tanh():
    norm = randomise(NORMS["dyt"](8))
    x = torch.randn(2, 12, 8)
    assert relative(norm(x, CONTEXT), norm.weight * torch.tanh(norm.alpha * x) + norm.bias) < 1e-6


@pytest.mark.parametrize(("batch", "masked"), [(0, False), (0, True), (2, True)])
def test_a_batch_without_a_real_token_leaves_statistics_alone(batch, masked):
    norm = BatchNorm(8).train()
    mask = torch.zeros(batch, 5, dtype=torch.bool) if masked else None
    norm(torch.randn(batch, 5, 8), Context(grid=(5,), mask=mask))
    assert torch.equal(norm.running_mean, torch.zeros(8)) and torch.equal(norm.running_var, torch.ones(8))


def test_layernorm_without_affine_has_no_parameters():
    norm = LayerNorm(8, affine=False, eps=1e-3)
    assert not list(norm.parameters())
    x = torch.randn(2, 12, 8)
    assert relative(norm(x, CONTEXT), nn.LayerNorm(8, eps=1e-3, elementwise_affine=False)(x)) < 1e-6


@pytest.mark.parametrize("name", ["batchnorm", "repbn", "prepbn"])
@pytest.mark.parametrize("shape", [(4, 7, 6), (2, 1, 6), (3, 5, 2, 6)])
def test_training_without_a_mask_is_training_with_all_tokens_real(name, shape):
    """Two kernels, one function: outputs, gradients and running statistics."""
    outcomes = []
    for mask in (None, torch.ones(shape[:2], dtype=torch.bool)):
        norm = randomise(make(NORMS, name, 6)).double().train()
        advance(norm, 0.3)
        x = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3)).requires_grad_()
        y = norm(x, Context(grid=(shape[1],), mask=mask))
        (y * torch.arange(y.numel()).view(shape).cos()).sum().backward()
        outcomes.append([y, x.grad, *(p.grad for p in norm.parameters()), *norm.buffers()])
    assert len(outcomes[0]) >= 6
    for one, other in zip(*outcomes, strict=True):
        assert torch.allclose(one, other, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("heads", [(), (2,)])
def test_groupnorm_is_torchs(groups, heads):
    norm = randomise(make(NORMS, f"groupnorm(groups={groups})", 6)).double()
    x = torch.randn(2, 5, *heads, 6, dtype=torch.float64)
    moved = x.movedim(-1, 1)
    wanted = torch.nn.functional.group_norm(moved, groups, norm.weight, norm.bias, 1e-5).movedim(1, -1)
    assert torch.allclose(norm(x, Context(grid=(5,))), wanted, rtol=1e-9, atol=1e-12)
    masked = norm(x, Context(grid=(5,), mask=torch.ones(2, 5, dtype=torch.bool)))
    assert torch.allclose(masked, wanted, rtol=1e-9, atol=1e-12)


def test_a_bias_can_be_left_away():
    norm = make(NORMS, "layernorm(bias=False)", 6)
    assert norm.bias is None and norm.weight is not None
    with pytest.raises(ValueError, match="groups must divide 6 channels, got 4"):
        make(NORMS, "groupnorm(groups=4)", 6)


@pytest.mark.parametrize("name", ["rmsnorm", "rmsnorm(affine=False)", "rmsnorm(bias=True)", "crmsnorm"])
def test_tokens_in_bf16_are_normalized_in_the_precision_of_the_weights(name):
    """In mixed precision, of which PyTorch would warn."""
    norm = randomise(make(NORMS, name, 6))
    x = torch.randn(2, 5, 6).bfloat16()
    y, wanted = norm(x, CONTEXT), norm(x.float(), CONTEXT)
    assert relative(y.float(), wanted) < (0.01 if y.dtype == torch.bfloat16 else 1e-6)

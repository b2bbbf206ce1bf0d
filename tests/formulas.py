"""What the tests of formulas share: sizes, random weights and tokens in fp64, and a comparison with gradients."""

import math

import torch
from torch import Tensor, nn

from zoo.layer import Context

EXACT = 1e-10  # fp64
SINGLE = 1e-5  # where a table is fp32 by contract
DIM, HEADS = 32, 4
GRID = Context(grid=(5, 6))
REAL = torch.tensor([[True] * 30, [True] * 12 + [False] * 18, [True] + [False] * 29])


def scattered(module: nn.Module) -> nn.Module:
    """The module in fp64 and eval mode, every parameter random."""
    for parameter in module.double().eval().parameters():
        nn.init.normal_(parameter, std=0.4)
    return module


def tokens(context: Context = GRID, batch: int = 3, dim: int = DIM) -> Tensor:
    rows = context.prefix + math.prod(context.grid)
    return torch.randn(batch, rows, dim, dtype=torch.float64, requires_grad=True)


def copied(module: nn.Module, weights: dict[str, Tensor]) -> nn.Module:
    """The module in fp64 and eval mode with these weights, all of them."""
    module = module.double().eval()
    module.load_state_dict(
        {name: weights[name].detach().reshape(each.shape) for name, each in module.state_dict().items()}
    )
    assert set(weights) == set(module.state_dict())
    return module


def renamed(module: nn.Module, **names: str) -> dict[str, Tensor]:
    """The state of a module, first parts of its names replaced and those of names without a match kept."""
    state = {}
    for name, value in module.state_dict().items():
        for theirs, ours in names.items():
            if name.startswith(f"{theirs}."):
                name = f"{ours}.{name.removeprefix(f'{theirs}.')}"
                break
        state[name] = value
    return state


def check(got: Tensor, wanted: Tensor, leaves: tuple[Tensor, ...] = (), tolerance: float = EXACT) -> None:
    """Outputs are the same, and so are the gradients of a random projection of them on the leaves."""
    assert got.shape == wanted.shape
    assert (got - wanted).abs().max() <= tolerance * wanted.abs().max()
    if not leaves:
        return
    seed = torch.randn_like(wanted)
    ours = torch.autograd.grad((got * seed).sum(), leaves, retain_graph=True)
    theirs = torch.autograd.grad((wanted * seed).sum(), leaves, retain_graph=True)
    for mine, other in zip(ours, theirs, strict=True):
        assert other.abs().max() > 0
        assert (mine - other).abs().max() <= tolerance * other.abs().max()

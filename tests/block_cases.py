"""What the tests of blocks share: the layouts of all families, and contexts to run them in."""

import torch

from helpers import rectangle, relative
from zoo.choices import BlockConfig
from zoo.layer import Context, Memory, Place

BASE = {"dim": 32, "heads": 2}
LINE = BASE | {"place": Place(axes=1)}
CONFORMER = BlockConfig(**LINE, layout=("half", "mixer", "conv", "half", "norm"), ffn="mlp(activation='silu')")
SQUEEZEFORMER = BlockConfig(**LINE, layout=("mixer", "ffn", "conv", "ffn"), conv="swish", placement="scaled")
DECODER = BlockConfig(
    **LINE, layout=("mixer", "cross", "ffn"), placement="post", writes=frozenset({"mask", "code", "memory"})
)
DIFFUSION = BlockConfig(
    **BASE, modulation="adaln", norm="layernorm(affine=False, eps=1e-6)", writes=frozenset({"mask", "cond"})
)
PARALLEL = BlockConfig(**BASE, layout=("mixer+ffn",), mixer="softmax(qk_norm='layernorm')")
LAYOUTS = {
    "vit": BlockConfig(**BASE),
    "conformer": CONFORMER,
    "squeezeformer": SQUEEZEFORMER,
    "decoder": DECODER,
    "diffusion": DIFFUSION,
    "parallel": PARALLEL,
    "macaron": BlockConfig(**BASE, layout=("half", "mixer", "half"), layer_scale=0.1, channel="se"),
}


def context_of(config: BlockConfig, grid: tuple[int, ...], extents=None, batch: int = 2) -> Context:
    mask = None if extents is None else torch.stack([rectangle(grid, extent) for extent in extents])
    context = Context(grid=grid, mask=mask)
    generator = torch.Generator().manual_seed(3)
    if config.modulation != "none":
        context = context._replace(cond=torch.randn(batch, 1, 32, generator=generator))
    if "memory" in config.writes:
        memory = Memory(
            torch.randn(batch, 6, 32, generator=generator), torch.arange(6)[None] < torch.tensor([[6], [4]])
        )
        context = context._replace(memory=memory)
    if "code" in config.writes:
        context = context._replace(code=torch.randn(1, 40, 32, generator=generator)[:, : torch.tensor(grid).prod()])
    return context


def check_dropout(got: torch.Tensor, whole: torch.Tensor, rate: float) -> None:
    """Single values of the whole are missing at that rate, and the others are scaled up."""
    kept = got != 0
    assert abs(kept.double().mean().item() - (1 - rate)) < 0.04
    assert kept.any(1).all() and kept.any(2).all()  # neither channels nor tokens as a whole
    assert relative(got[kept], whole[kept] / (1 - rate)) < 1e-6


def grid_of(config: BlockConfig, size: int) -> tuple[int, ...]:
    return (size,) if config.place.axes == 1 else (size, size - 2)

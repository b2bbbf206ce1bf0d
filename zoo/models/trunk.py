"""Image models as trunks of detectors: maps at the strides 8, 16 and 32, without norm and head behind them."""

import math
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from zoo.layer import Context
from zoo.models.base import Model
from zoo.models.pyramid import Pyramid
from zoo.models.vit import ViT
from zoo.spec import parse
from zoo.stems.images import coarsened
from zoo.tensors import to_tokens

STRIDES = (8, 16, 32)
TIMM = "timm:"


class Trunk(nn.Module):
    """An image model by name: a preset of the zoo, `"flash_internimage_t(depth=(1, 1, 3, 1))"`, or `"timm:NAME"`.

    forward(images [B, C, H, W], mask [B, H, W] | None) -> tokens [B, N, D] and Context of each stride. The sides of the
    images are multiples of 32, and masked pixels are 0.
    """

    def __init__(self, name: str, channels: int, image: int, make: Callable[..., nn.Module]) -> None:
        super().__init__()
        self.name, self.layers = name, list[int]()
        self.adapter: Adapter | None = None
        if name.startswith(TIMM):
            self.model: Any = Convolutional(name.removeprefix(TIMM), channels)
        else:
            word, options = parse(name)
            self.model = make(word, **{"channels": channels, "image": image, "classes": 0} | dict(options))
        self.channels: list[int] = []
        if isinstance(self.model, ViT):
            self.model.norm = self.model.head = self.model.head_distilled = None
            depth, dim = self.model.config.depth, self.model.config.dim
            self.layers = [math.ceil(depth * share) - 1 for share in (1 / 3, 2 / 3, 1)]
            self.adapter = Adapter(dim, self.model.config.patch)
            self.channels = [dim] * 3
            return
        if isinstance(self.model, Pyramid):
            self.model.head = None  # pyright: ignore[reportAttributeAccessIssue]
        elif isinstance(self.model, Model):
            raise ValueError(f"trunk '{name}' is not an image model with maps; choose a ViT or a pyramid")
        strides = list(self.model.strides)
        if missing := [stride for stride in STRIDES if stride not in strides]:
            raise ValueError(f"trunk '{name}' has the strides {strides}, but a detector needs stride {missing[0]}")
        self.layers = [strides.index(stride) for stride in STRIDES]
        self.channels = [self.model.channels[layer] for layer in self.layers]

    def forward(self, images: Tensor, mask: Tensor | None) -> list[tuple[Tensor, Context]]:
        maps = self.model.features(images, self.layers, mask)
        contexts = []
        for stride in STRIDES:
            grid = (images.shape[2] // stride, images.shape[3] // stride)
            contexts.append(Context(grid=grid, mask=coarsened(mask, stride)))
        if self.adapter is not None:
            maps = self.adapter(maps, mask)
        return [(to_tokens(each), context) for each, context in zip(maps, contexts, strict=True)]


def convolutional(name: str, channels: int, **options: Any) -> nn.Module:
    """A model of timm that gives maps; ValueError if there is none of that name."""
    import timm

    try:
        return timm.create_model(name, features_only=True, in_chans=channels, **options)
    except (RuntimeError, AttributeError, TypeError, AssertionError) as error:
        raise ValueError(f"timm has no trunk '{name}' with maps: {str(error).splitlines()[0]}") from None


class Adapter(nn.Module):
    """Maps of a plain ViT at one stride, from three depths, as maps of the strides 8, 16 and 32: finer ones by a
    transposed convolution, coarser ones by a strided one (as in ViTDet, Li et al. 2022, arXiv:2203.16527)."""

    def __init__(self, dim: int, patch: int) -> None:
        super().__init__()
        self.patch = patch
        steps: list[nn.Module] = []
        for stride in STRIDES:
            finer, coarser = patch // stride, stride // patch
            if patch == stride:
                steps.append(nn.Conv2d(dim, dim, 1))
            elif finer * stride == patch:
                steps.append(nn.ConvTranspose2d(dim, dim, finer, finer))
            elif coarser * patch == stride:
                steps.append(nn.Conv2d(dim, dim, coarser, coarser))
            else:
                raise ValueError(f"a trunk of patch {patch} does not fit the strides {STRIDES}; choose 8, 16 or 32")
        self.steps = nn.ModuleList(steps)

    def forward(self, maps: Sequence[Tensor], mask: Tensor | None) -> list[Tensor]:
        if mask is not None:
            real = coarsened(mask, self.patch)
            assert real is not None
            real = real.view(len(real), 1, *maps[0].shape[2:])
            maps = [each.masked_fill(~real, 0.0) for each in maps]
        return [step(each) for step, each in zip(self.steps, maps, strict=True)]


class Convolutional(nn.Module):
    """A convolutional model of timm. With a mask, the input of each of its convolutions and pools is zero outside the
    images, so that padding changes nothing at inference."""

    def __init__(self, name: str, channels: int) -> None:
        super().__init__()
        self.net: Any = convolutional(name, channels)
        info = self.net.feature_info
        self.strides, self.channels = list(info.reduction()), list(info.channels())
        windows = (nn.Conv2d, nn.MaxPool2d, nn.AvgPool2d)
        for module in self.net.modules():
            kernel = getattr(module, "kernel_size", 1)
            if isinstance(module, windows) and kernel not in (1, (1, 1)):
                module.register_forward_pre_hook(self._zero)
        self.masks: dict[tuple[int, int], Tensor] | None = None

    def features(self, images: Tensor, layers: Sequence[int], mask: Tensor | None) -> list[Tensor]:
        """The maps of the given layers."""
        if mask is not None:
            self.masks = {}
            for stride in (2, 4, 8, 16, 32):
                grid = (images.shape[2] // stride, images.shape[3] // stride)
                real = coarsened(mask, stride)
                assert real is not None
                self.masks[grid] = ~real.view(len(real), 1, *grid)
        try:
            maps = self.net(images)
        finally:
            self.masks = None
        return [maps[layer] for layer in layers]

    def _zero(self, module: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor] | None:
        if self.masks is None or (outside := self.masks.get((inputs[0].shape[2], inputs[0].shape[3]))) is None:
            return None
        return (inputs[0].masked_fill(outside, 0.0),)

"""Image models as trunks of detectors: maps of some strides, without norm and head behind them."""

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from zoo.layer import Context
from zoo.models.convolutional import TIMM, Convolutional
from zoo.models.pyramid import Pyramid, PyramidConfig
from zoo.models.vit import ViT, ViTConfig
from zoo.spec import parse
from zoo.stems.images import coarsened
from zoo.tensors import to_tokens
from zoo.text import unknown


class Trunk(nn.Module):
    """An image model by name: a preset of the zoo, `"flash_internimage_t(depth=(1, 1, 3, 1))"`, or `"timm:NAME"`.

    forward(images [B, C, H, W], mask [B, H, W] | None) -> tokens [B, N, D] and Context of each stride. With a mask, the
    sides of the images are multiples of the largest stride, and masked pixels are 0.

    Args:
        name: the image model.
        channels: channels of the images.
        image: side of the images in pixels, for weights that depend on it.
        strides: those of the maps; () for the last map alone.
        frozen: whether norms with running statistics stay as they are in training.
    """

    def __init__(
        self, name: str, channels: int, image: int, strides: tuple[int, ...] = (8, 16, 32), frozen: bool = False
    ) -> None:
        super().__init__()
        from zoo.models import PRESETS, create_model

        self.name, self.frozen, self.layers = name, frozen, list[int]()
        self.adapter: Adapter | None = None
        if name.startswith(TIMM):
            self.model: Any = Convolutional(name.removeprefix(TIMM), channels)
        else:
            word, options = parse(name)
            images = [each for each, preset in PRESETS.items() if isinstance(preset, ViTConfig | PyramidConfig)]
            if word not in images:
                raise ValueError(f"trunk: {unknown('image model', word, [*images, 'timm:NAME'])}")
            try:
                given: dict[str, Any] = {"channels": channels, "image": image, "classes": 0} | dict(options)
                self.model = create_model(word, **given)
            except ValueError as error:
                raise ValueError(f"trunk: {error}") from None
        if isinstance(self.model, ViT):
            self.model.norm = self.model.head = self.model.head_distilled = self.model.pooler = None
        elif isinstance(self.model, Pyramid):
            self.model.head = None  # pyright: ignore[reportAttributeAccessIssue]
        own = list(self.model.strides)
        if not strides:
            self.layers = [len(own) - 1]
        elif isinstance(self.model, ViT):
            shares = [(number + 1) / len(strides) for number in range(len(strides))]
            self.layers = [math.ceil(self.model.config.depth * share) - 1 for share in shares]
            self.adapter = Adapter(self.model.config.dim, self.model.config.patch, strides)
        elif missing := [stride for stride in strides if stride not in own]:
            raise ValueError(f"trunk '{name}' has the strides {own}, but the detector needs stride {missing[0]}")
        elif strides[-1] != own[-1]:  # the layers behind it would never learn
            raise ValueError(f"strides must end with {own[-1]}, the last of trunk '{name}', got {strides}")
        else:
            self.layers = [len(own) - 1 - own[::-1].index(stride) for stride in strides]
        self.strides = strides or (own[-1],)
        self.channels: list[int] = [self.model.channels[layer] for layer in self.layers]
        self.train(self.training)

    def train(self, mode: bool = True) -> "Trunk":
        super().train(mode)
        if self.frozen:
            for module in self.modules():
                if hasattr(module, "running_var"):
                    module.eval().requires_grad_(False)
        return self

    def forward(self, images: Tensor, mask: Tensor | None) -> list[tuple[Tensor, Context]]:
        maps = self.model.features(images, self.layers, mask)
        if self.adapter is not None:
            maps = self.adapter(maps, mask)
        contexts = [
            Context(grid=(each.shape[2], each.shape[3]), mask=coarsened(mask, stride))
            for each, stride in zip(maps, self.strides, strict=True)
        ]
        return [(to_tokens(each), context) for each, context in zip(maps, contexts, strict=True)]


class Adapter(nn.Module):
    """Maps of a plain ViT at one stride, from several depths, as maps of these strides: finer ones by a transposed
    convolution, coarser ones by a strided one (as in ViTDet, Li et al. 2022, arXiv:2203.16527)."""

    def __init__(self, dim: int, patch: int, strides: tuple[int, ...]) -> None:
        super().__init__()
        self.patch = patch
        steps: list[nn.Module] = []
        for stride in strides:
            finer, coarser = patch // stride, stride // patch
            if patch == stride:
                steps.append(nn.Conv2d(dim, dim, 1))
            elif finer * stride == patch:
                steps.append(nn.ConvTranspose2d(dim, dim, finer, finer))
            elif coarser * patch == stride:
                steps.append(nn.Conv2d(dim, dim, coarser, coarser))
            else:
                raise ValueError(f"a trunk of patch {patch} does not fit the strides {strides}; choose one of these")
        self.steps = nn.ModuleList(steps)

    def forward(self, maps: Sequence[Tensor], mask: Tensor | None) -> list[Tensor]:
        if mask is not None:
            real = coarsened(mask, self.patch)
            assert real is not None
            real = real.view(real.shape[0], 1, *maps[0].shape[2:])
            maps = [each.masked_fill(~real, 0.0) for each in maps]
        return [step(each) for step, each in zip(self.steps, maps, strict=True)]

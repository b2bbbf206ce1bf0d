"""Image models as trunks of detectors: maps at the strides 8, 16 and 32, without norm and head behind them."""

import itertools
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from zoo.fusion import fold_out
from zoo.layer import Context, Fold
from zoo.models.pyramid import Pyramid, PyramidConfig
from zoo.models.vit import ViT, ViTConfig
from zoo.spec import parse
from zoo.stems.images import coarsened
from zoo.tensors import compiling, to_tokens
from zoo.text import one_line

STRIDES = (8, 16, 32)
TIMM = "timm:"


class Trunk(nn.Module):
    """An image model by name: a preset of the zoo, `"flash_internimage_t(depth=(1, 1, 3, 1))"`, or `"timm:NAME"`.

    forward(images [B, C, H, W], mask [B, H, W] | None) -> tokens [B, N, D] and Context of each stride. The sides of the
    images are multiples of 32, and masked pixels are 0.
    """

    def __init__(self, name: str, channels: int, image: int) -> None:
        super().__init__()
        from zoo.models import PRESETS, create_model

        self.name, self.layers = name, list[int]()
        self.adapter: Adapter | None = None
        if name.startswith(TIMM):
            self.model: Any = Convolutional(name.removeprefix(TIMM), channels)
        else:
            word, options = parse(name)
            if word in PRESETS and not isinstance(PRESETS[word], ViTConfig | PyramidConfig):
                raise ValueError(f"trunk '{name}' is not an image model with maps; choose a ViT or a pyramid")
            try:
                self.model = create_model(word, **{"channels": channels, "image": image, "classes": 0} | dict(options))
            except ValueError as error:
                raise ValueError(f"trunk: {error}") from None
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

    if not timm.is_model(name):
        raise ValueError(f"timm has no model '{name}'; timm.list_models() lists the names")
    try:
        return timm.create_model(name, features_only=True, in_chans=channels, **options)
    except (RuntimeError, AttributeError, TypeError, AssertionError) as error:
        raise ValueError(f"timm gives no maps of '{name}': {one_line(error)}") from None


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
            real = real.view(real.shape[0], 1, *maps[0].shape[2:])
            maps = [each.masked_fill(~real, 0.0) for each in maps]
        return [step(each) for step, each in zip(self.steps, maps, strict=True)]


class Convolutional(nn.Module):
    """A convolutional model of timm. With a mask, all that reads windows of a map reads zeros outside the images, so
    that padding changes nothing at inference. `checkpointing` recomputes all activations in the backward pass."""

    checkpointing = False

    def __init__(self, name: str, channels: int) -> None:
        super().__init__()
        self.net: Any = convolutional(name, channels)
        info = self.net.feature_info
        self.strides, self.channels = list(info.reduction()), list(info.channels())
        self.outside: dict[int, Tensor] | None = None
        try:
            scales = self._trial(channels)
        except (ValueError, RuntimeError, AssertionError, IndexError):
            raise ValueError(
                f"trunk 'timm:{name}' does not keep padding away from the image, as attention, squeeze-excite, norms"
                " over whole maps and pools beyond the edge do not; choose a plain convolutional one, such as resnet18d"
            ) from None
        for module, scale in scales.items():
            module.register_forward_pre_hook(partial(self._zero, *scale))

    @torch.no_grad()
    def _trial(self, channels: int) -> dict[nn.Module, tuple[int, int]]:
        """The stride of the map that each convolution or pool reads, and how many rows and columns of zeros the model
        itself has put behind that map. ValueError if anything else reads more than one place of a map: NaN outside an
        image, put back behind each of them, would get into it."""
        sides, real, scales = (64, 96), (20, 30), {}

        def scale_of(x: Tensor) -> tuple[int, int]:
            for stride, behind in itertools.product((1, 2, 4, 8, 16, 32), (0, 1)):
                if tuple(x.shape[2:]) == tuple(side // stride + behind for side in sides):
                    return stride, behind
            raise ValueError("the sides of a map are not those of the image divided by a stride")

        def masked(x: Tensor, value: float) -> Tensor:
            stride, x = scale_of(x)[0], x.clone()
            x[:, :, -(-real[0] // stride) :] = value
            x[:, :, :, -(-real[1] // stride) :] = value
            return x

        def before(module: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
            scale = scale_of(inputs[0])
            if scales.setdefault(module, scale) != scale:
                raise ValueError("a module reads maps of several strides")
            return (masked(inputs[0], 0.0),)

        def behind(module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor:
            if not isinstance(module, nn.Conv2d) and _reach(module, inputs[0], output) > 0:
                raise ValueError("a pool differs at the edge of a map and in front of zeros")
            return masked(output, math.nan)

        hooks = []
        for module in self.net.modules():
            kernel = getattr(module, "kernel_size", 1)
            if not isinstance(module, (nn.Conv2d, nn.MaxPool2d, nn.AvgPool2d)) or kernel in (1, (1, 1)):
                continue
            hooks += [module.register_forward_pre_hook(before), module.register_forward_hook(behind)]
        was, some = self.net.training, next(self.net.parameters())
        maps = self.net.eval()(masked(some.new_ones(1, channels, *sides), math.nan))
        self.net.train(was)
        for hook in hooks:
            hook.remove()
        for each, stride, width in zip(maps, self.strides, self.channels, strict=True):
            if each.shape != (1, width, sides[0] // stride, sides[1] // stride):
                raise ValueError("a map has another shape than timm states")
            if not each.is_meta and not masked(each, 0.0).isfinite().all():
                raise ValueError("the image sees what is outside of it")
        return scales

    def fold(self) -> list[Fold]:
        """Folds batch norms into convolutions, where timm's code is known to put the one right behind the other."""
        report = []
        for path, norm, conv in list(self._pairs()):
            scale = norm.weight / (norm.running_var + norm.eps).sqrt()
            fold_out(conv, scale, norm.bias - norm.running_mean * scale)
            self.net.set_submodule(path, nn.Identity())
            report.append(Fold(f"net.{path}", "the convolution in front of it"))
        return report

    def _pairs(self) -> Iterator[tuple[str, Any, nn.Conv2d]]:
        """Batch norms, and the convolutions that only they read."""
        from timm.models.hgnet import ConvBNAct
        from timm.models.resnet import BasicBlock, Bottleneck

        resnet = any(isinstance(module, BasicBlock | Bottleneck) for module in self.net.modules())
        for path, parent in self.net.named_modules():
            parts = list(parent.named_children())
            if isinstance(parent, nn.Sequential):
                pairs = list(itertools.pairwise(parts))
            elif isinstance(parent, ConvBNAct):
                pairs = [(("conv", parent.conv), ("bn", parent.bn))]
            elif isinstance(parent, BasicBlock | Bottleneck) or (parent is self.net and resnet):
                found = dict(parts)
                pairs = [((f"conv{n}", found.get(f"conv{n}")), (f"bn{n}", found.get(f"bn{n}"))) for n in (1, 2, 3)]
            else:
                continue
            for (_, conv), (name, norm) in pairs:
                conv = conv[-1] if isinstance(conv, nn.Sequential) else conv
                if isinstance(conv, nn.Conv2d) and type(norm) is nn.BatchNorm2d:
                    yield f"{path}.{name}".removeprefix("."), norm, conv

    def features(self, images: Tensor, layers: Sequence[int], mask: Tensor | None) -> list[Tensor]:
        """The maps of the given layers."""
        if self.checkpointing and self.training and torch.is_grad_enabled():
            watch = {} if compiling() else {"context_fn": lambda: (nullcontext(), self._recomputing())}
            maps: Any = checkpoint(self._maps, images, mask, use_reentrant=False, **watch)  # pyright: ignore
        else:
            maps = self._maps(images, mask)
        return [maps[layer] for layer in layers]

    def _maps(self, images: Tensor, mask: Tensor | None) -> list[Tensor]:
        if mask is not None:
            self.outside = {}
            for stride in (1, 2, 4, 8, 16, 32):
                real = coarsened(mask, stride)
                assert real is not None
                self.outside[stride] = ~real.view(real.shape[0], 1, mask.shape[1] // stride, mask.shape[2] // stride)
        try:
            return self.net(images)
        finally:
            self.outside = None

    @contextmanager
    def _recomputing(self) -> Iterator[None]:
        """While the net runs a second time, running statistics do not change."""
        norms: Any = [each for each in self.net.modules() if isinstance(each, nn.BatchNorm2d)]
        before = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
        for norm in norms:
            norm.momentum, norm.num_batches_tracked = 0.0, None
        try:
            yield
        finally:
            for norm, (momentum, number) in zip(norms, before, strict=True):
                norm.momentum, norm.num_batches_tracked = momentum, number

    def _zero(self, stride: int, behind: int, module: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor] | None:
        if self.outside is None:
            return None
        outside = F.pad(self.outside[stride], (0, behind, 0, behind), value=True) if behind else self.outside[stride]
        return (inputs[0].masked_fill(outside, 0.0),)


def _reach(pool: Any, x: Tensor, y: Tensor) -> int:
    """How many places beyond the right edge of its map x a pool reads for y, which are not zeros to it."""
    size, step, margin = (
        max(each) if isinstance(each, tuple) else each for each in (pool.kernel_size, pool.stride, pool.padding)
    )
    return (y.shape[3] - 1) * step + size - margin - x.shape[3]

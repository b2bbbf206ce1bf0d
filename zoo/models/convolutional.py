"""Convolutional models of timm as trunks of detectors, whose results do not depend on padding."""

import itertools
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any, TypeGuard, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from zoo.fusion import fold_out
from zoo.layer import Fold
from zoo.norms import statistics, world_size
from zoo.spec import parse
from zoo.stems.images import coarsened
from zoo.tensors import compiling, exporting, to_map, to_tokens
from zoo.text import one_line, unknown

TIMM = "timm:"
OPTIONS = ("output_stride", "shortcut")


def convolutional(spec: str, channels: int, **options: Any) -> nn.Module:
    """A model of timm that gives maps, `resnet50` or `resnet50(output_stride=16)`; ValueError if there is none.

    output_stride, 8 or 16, dilates the last stages instead of striding them. shortcut=True, for a resnet with basic
    blocks, puts a 1 x 1 convolution and a norm into the shortcut of its first block, as in RT-DETR's R18 and R34.
    """
    import timm

    name, given = spec.partition("(")[0], dict(parse("trunk" + spec[spec.find("(") :])[1]) if "(" in spec else {}
    if not timm.is_model(name):
        raise ValueError(f"timm has no model '{name}'; timm.list_models() lists the names")
    if wrong := [option for option in given if option not in OPTIONS]:
        raise ValueError(f"trunk 'timm:{spec}': {unknown('option', wrong[0], OPTIONS)}")
    stride, shortcut = given.get("output_stride", 32), given.get("shortcut", False)
    if stride not in (8, 16, 32) or not isinstance(shortcut, bool):
        raise ValueError(f"trunk 'timm:{spec}': output_stride must be 8, 16 or 32, and shortcut true or false")
    options |= {"output_stride": stride} if stride != 32 else {}
    try:
        net = timm.create_model(name, features_only=True, in_chans=channels, **options)
    except (RuntimeError, AttributeError, TypeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"timm gives no maps of '{spec}': {one_line(error)}") from None
    if shortcut:
        _add_shortcut(net, spec)
    return net


def _add_shortcut(net: Any, spec: str) -> None:
    from timm.models.resnet import BasicBlock

    first = net.layer1[0] if isinstance(getattr(net, "layer1", None), nn.Sequential) else None
    if not isinstance(first, BasicBlock) or first.downsample is not None:
        raise ValueError(f"trunk 'timm:{spec}': shortcut is for resnets with basic blocks, such as resnet18d")
    inputs, width = first.conv1.in_channels, first.conv2.out_channels
    first.downsample = nn.Sequential(nn.Conv2d(inputs, width, 1, bias=False), nn.BatchNorm2d(width))


class MaskedBatchNorm(nn.BatchNorm2d):
    """Batch norm that takes its statistics, in training, from the places inside the images alone, of all ranks. It has
    the dropout and the activation of timm's BatchNormAct2d.

    outside holds, by stride, the places of a map that are padding; it is empty where there is none.
    """

    def __init__(self, norm: nn.BatchNorm2d, outside: dict[int, Tensor], stride: int) -> None:
        super().__init__(norm.num_features, norm.eps, norm.momentum)
        self.drop, self.act = (getattr(norm, part, None) for part in ("drop", "act"))
        self.load_state_dict(norm.state_dict(), assign=True)
        self.outside, self.stride = outside, stride

    def forward(self, input: Tensor) -> Tensor:
        # Ranks exchange their statistics all or none, whether or not their own batch has padding.
        if not self.training or not self.outside and world_size() == 1:
            return self.behind(super().forward(input))
        tokens = to_tokens(input)
        real = ~self.outside[self.stride].flatten(1) if self.outside else None
        mean, variance, number = statistics(tokens, real)
        self._track(mean.detach(), (variance * number / (number - 1).clamp(min=1)).detach(), number > 0)
        scale = self.weight * torch.rsqrt(variance + self.eps)
        tokens = torch.addcmul(self.bias - scale * mean, tokens, scale).to(input.dtype)
        return self.behind(to_map(tokens, (input.shape[2], input.shape[3])))

    def behind(self, x: Tensor) -> Tensor:
        """The dropout and the activation of a map."""
        x = x if self.drop is None else self.drop(x)
        return x if self.act is None else self.act(x)

    @torch.no_grad()
    def _track(self, mean: Tensor, variance: Tensor, any_real: Tensor) -> None:
        assert self.momentum is not None and self.running_mean is not None and self.running_var is not None
        rate = self.momentum * any_real.to(self.running_var.dtype)
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), rate)
        self.running_var.lerp_(variance.to(self.running_var.dtype), rate)
        if self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)


class Convolutional(nn.Module):
    """A convolutional model of timm. With a mask, all that reads windows of a map reads zeros outside the images, and
    batch norms (BatchNorm2d of PyTorch, BatchNormAct2d of timm) read the inside alone, so that padding changes nothing.
    Other norms with running statistics are refused in training with a mask. `checkpointing` recomputes all activations
    in the backward pass."""

    checkpointing = False

    def __init__(self, name: str, channels: int) -> None:
        super().__init__()
        self.name, self.net = name, cast(Any, convolutional(name, channels))
        info = self.net.feature_info
        self.strides, self.channels = list(info.reduction()), list(info.channels())
        self.outside: dict[int, Tensor] = {}  # the places of padding by stride, while a forward with a mask runs
        try:
            scales = self._trial(channels)
        except (ValueError, RuntimeError, AssertionError, IndexError):
            raise ValueError(
                f"trunk 'timm:{name}' does not keep padding away from the image, as attention, squeeze-excite, norms"
                " over whole maps and pools beyond the edge do not; choose a plain convolutional one, such as resnet18d"
            ) from None
        for path, module in list(self.net.named_modules()):
            if module in scales and _is_batch_norm(module):
                self.net.set_submodule(path, MaskedBatchNorm(module, self.outside, scales[module][0]))  # pyright: ignore
            elif module in scales:
                module.register_forward_pre_hook(partial(self._zero, *scales[module]))
        # Norms that learn statistics in other ways than batch norms of these classes; frozen ones have no momentum.
        learning = [each for each in self.net.named_modules() if hasattr(each[1], "running_var")]
        self.others = [
            each for each in learning if hasattr(each[1], "momentum") and type(each[1]) is not MaskedBatchNorm
        ]
        self.net.to(memory_format=torch.channels_last)  # as tokens lie in memory, and quicker on a CPU

    @torch.no_grad()
    def _trial(self, channels: int) -> dict[nn.Module, tuple[int, int]]:
        """The stride of the map that each convolution, pool and batch norm reads, and how many rows and columns of
        zeros the model itself has put behind that map. ValueError if anything else reads more than one place of a map:
        NaN outside an image, put back behind each of them, would get into it."""
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
            return inputs if _is_batch_norm(module) else (masked(inputs[0], 0.0),)

        def behind(module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor:
            if not isinstance(module, nn.Conv2d) and _reach(module, inputs[0], output) > 0:
                raise ValueError("a pool differs at the edge of a map and in front of zeros")
            return masked(output, math.nan)

        hooks = []
        for module in self.net.modules():
            kernel = getattr(module, "kernel_size", 1)
            if _is_batch_norm(module):
                hooks.append(module.register_forward_pre_hook(before))
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
            rest = [each for each in (norm.drop, norm.act) if each is not None]
            self.net.set_submodule(path, nn.Sequential(*rest) if rest else nn.Identity())
            report.append(Fold(f"net.{path}", "the convolution in front of it"))
        return report

    def _pairs(self) -> Iterator[tuple[str, Any, nn.Conv2d]]:
        """Batch norms, and the convolutions that only they read."""
        from timm.layers.conv_bn_act import ConvNormAct
        from timm.models.hgnet import ConvBNAct
        from timm.models.resnet import BasicBlock, Bottleneck

        resnet = any(isinstance(module, BasicBlock | Bottleneck) for module in self.net.modules())
        for path, parent in self.net.named_modules():
            parts = list(parent.named_children())
            if isinstance(parent, nn.Sequential):
                pairs = list(itertools.pairwise(parts))
            elif isinstance(parent, ConvBNAct | ConvNormAct):
                pairs = [(("conv", parent.conv), ("bn", parent.bn))]
            elif isinstance(parent, BasicBlock | Bottleneck) or (parent is self.net and resnet):
                found = dict(parts)
                pairs = [((f"conv{n}", found.get(f"conv{n}")), (f"bn{n}", found.get(f"bn{n}"))) for n in (1, 2, 3)]
            else:
                continue
            for (_, conv), (name, norm) in pairs:
                conv = conv[-1] if isinstance(conv, nn.Sequential) else conv
                if isinstance(conv, nn.Conv2d) and isinstance(norm, MaskedBatchNorm):
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
            if mixing := [path for path, norm in self.others if norm.training]:
                raise ValueError(
                    f"trunk 'timm:{self.name}' cannot be trained on images with padding: its norm '{mixing[0]}' would "
                    "learn from it; set trunk_norm to frozen, or data.fit to stretch"
                )
            for stride in (each for each in (1, 2, 4, 8, 16, 32) if each <= max(self.strides)):
                real = coarsened(mask, stride)
                assert real is not None
                self.outside[stride] = ~real.view(real.shape[0], 1, mask.shape[1] // stride, mask.shape[2] // stride)
        if not exporting():
            images = images.contiguous(memory_format=torch.channels_last)
        try:
            return self.net(images)
        finally:
            self.outside.clear()

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
        if not self.outside:
            return None
        outside = F.pad(self.outside[stride], (0, behind, 0, behind), value=True) if behind else self.outside[stride]
        return (inputs[0].masked_fill(outside, 0.0),)


def _is_batch_norm(module: nn.Module) -> TypeGuard[nn.BatchNorm2d]:
    """Whether a batch norm can be replaced by a MaskedBatchNorm."""
    from timm.layers.norm_act import BatchNormAct2d

    if type(module) not in (nn.BatchNorm2d, BatchNormAct2d):
        return False
    return bool(module.affine and module.track_running_stats)


def _reach(pool: Any, x: Tensor, y: Tensor) -> int:
    """How many places beyond the right edge of its map x a pool reads for y, which are not zeros to it."""
    size, step, margin = (
        max(each) if isinstance(each, tuple) else each for each in (pool.kernel_size, pool.stride, pool.padding)
    )
    return (y.shape[3] - 1) * step + size - margin - x.shape[3]

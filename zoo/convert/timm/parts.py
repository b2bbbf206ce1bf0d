"""What the conversions of timm's families share: checks of modules and tensors, and the filling of our models."""

import math
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from zoo.norms import NORMS
from zoo.positions import make_anchors
from zoo.spec import make, options_of
from zoo.tensors import shapes_alone
from zoo.text import one_line

SUPPORTED = (
    "from_timm takes a VisionTransformer, VisionTransformerDistilled, Eva, MetaFormer or DaVit of timm, or the state "
    "dict of one"
)


TABLE = "learned(antialias=True)"
"""The position of models with a table alone."""


class Facts(NamedTuple):
    """The facts of a vision transformer that the shapes of its tensors do not show."""

    heads: int
    pool: str  # timm's global_pool: token, avg or map
    norm: str
    activation: str
    fc_norm: bool  # the final norm comes after the pooling
    qk_norm: bool
    placement: str
    layer_scale: float | None
    image: int
    position: str


def one(what: str, values: list[Any]) -> Any:
    """The value that all have in common; ValueError if they differ."""
    if len(set(values)) != 1:
        raise ValueError(f"from_timm needs a model with one {what} throughout, got {sorted(set(values))}")
    return values[0]


def spelled(name: str, options: Iterable[str]) -> str:
    """A name with its options as `make` reads it."""
    options = ", ".join(options)
    return f"{name}({options})" if options else name


def norm_of(layer: Any, *options: str) -> str:
    """A timm norm as a row of our table with its options, `options` first; "none" for no norm."""
    if type(layer) is nn.Identity:
        return "none"
    kinds = {nn.GroupNorm: "groupnorm", nn.LayerNorm: "layernorm"}
    name = next((name for kind, name in kinds.items() if isinstance(layer, kind)), "rmsnorm")
    eps = [] if layer.eps == options_of(NORMS[name])["eps"] else [f"eps={layer.eps!r}"]
    return spelled(name, [*options, *([] if layer.weight is not None else ["affine=False"]), *eps])


def activation_of(layer: nn.Module) -> str:
    """The name of a timm activation in our feed-forward layers."""
    if isinstance(layer, nn.GELU) and layer.approximate == "tanh":
        return "gelu_tanh"
    names = {
        "GELU": "gelu",
        "GELUTanh": "gelu_tanh",
        "ReLU": "relu",
        "StarReLU": "star_relu",
        "QuickGELU": "quick_gelu",
    }
    return names.get(type(layer).__name__, "silu")


def placement_of(attention: bool, mlp: bool) -> str:
    """The placement of the norms of a block with norms before its branches, and inside of them as given."""
    if attention and not mlp:
        raise ValueError("from_timm does not support a norm inside attention without one inside mlp")
    return "sub" if attention else "sub_ffn" if mlp else "pre"


def with_width(
    table: Mapping[str, type], name: str, usual: float, hidden: int, options: list[str], *arguments: Any
) -> str:
    """The name of a row of the table with the ratio that makes it `hidden` wide inside, and options; ValueError if
    no ratio gives it. `usual` is the ratio without an option; arguments are the row's, its dim first."""
    ratio = hidden / arguments[0]
    near = (math.nextafter(ratio, 0), math.nextafter(ratio, math.inf), max(hidden - 4, 1) / arguments[0])
    for exact in ([], ["multiple=1"])[: 1 + ("multiple" in options_of(table[name]))]:
        for choice in (usual, ratio, *near):
            spec = spelled(name, [*([] if choice == usual else [f"ratio={choice!r}"]), *exact, *options])
            with shapes_alone():
                if make(table, spec, *arguments).out.in_features == hidden:
                    return spec
    raise ValueError(f"no ratio gives {name} of {arguments[0]} channels the hidden width {hidden}")


def packed(tensors: Mapping[str, Tensor]) -> bool:
    """Whether the first linear of the feed-forward has two halves."""
    first = tensors.get("blocks.0.mlp.fc1.weight")
    return first is not None and len(first) == 2 * tensors["blocks.0.mlp.fc2.weight"].shape[1]


def tensors_of(state: Any) -> dict[str, Tensor]:
    """A state dict as a plain dict; ValueError if it is not one of a timm model."""
    if not isinstance(state, Mapping):
        raise ValueError(f"{SUPPORTED}, not {type(state).__name__}")
    for name, value in state.items():
        if not isinstance(value, Tensor) or not value.is_floating_point():
            kind = value.dtype if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(f"{SUPPORTED}, with floating-point tensors by name; '{name}' is {kind}")
    return dict(state)


def check_axes(tensors: Mapping[str, Tensor], name: str, *axes: int) -> None:
    """ValueError if the tensor has another number of axes than one of those, or nothing in it."""
    if tensors[name].ndim not in axes or 0 in tensors[name].shape:
        wanted, shape = " or ".join(map(str, axes)), list(tensors[name].shape)
        raise ValueError(f"'{name}' must have {wanted} axes, as in timm's models, got shape {shape}")


def fill(
    model: nn.Module,
    tensors: Mapping[str, Tensor],
    biases: Iterable[str],
    find: Callable[[str, Tensor, Callable[..., Tensor], Tensor | None], tuple[str, Tensor]],
) -> Any:
    """The model, built on the meta device, with timm's tensors: each is used, and each of ours is filled.

    find(our name, our tensor, take, like) gives timm's name and the value, which it gets by take(timm's name, like);
    `like` is the weight to which a bias belongs, if any. A missing bias whose name matches a pattern of `biases` is
    zeros. ValueError, in one line, where a tensor is missing, unused or of a wrong shape.
    """
    absent = [pattern for pattern in biases if not any(re.fullmatch(pattern, name) for name in tensors)]
    left, state = dict(tensors), {}

    def take(name: str, like: Tensor | None = None) -> Tensor:
        if name in left:
            return left.pop(name).detach()
        if like is not None and any(re.fullmatch(pattern, name) for pattern in absent):
            return like.new_zeros(len(like))
        raise ValueError(f"'{name}' is missing; {SUPPORTED}")

    for key, slot in model.state_dict().items():
        name, value = find(key, slot, take, state.get(key.removesuffix("bias") + "weight"))
        if value.shape != slot.shape:
            raise ValueError(
                f"'{name}' has shape {list(value.shape)}, but a model of these choices needs {list(slot.shape)}"
            )
        state[key] = value.clone(memory_format=torch.contiguous_format)
    if left:
        raise ValueError(f"'{one_line(next(iter(left)), 100)}' has no counterpart; {SUPPORTED}, of plain blocks")
    model.load_state_dict(state, assign=True)
    make_anchors(model, next(iter(state.values())).device)
    return model.eval()

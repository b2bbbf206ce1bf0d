"""RMS normalization in place of layer normalization in a trained pre-norm model: the same function, exactly (Jiang et
al. 2023, arXiv:2305.14858)."""

from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from zoo.block import Residual
from zoo.choices import FEED_FORWARD, TABLES
from zoo.config import ModelConfig
from zoo.layer import copied
from zoo.models.base import Model
from zoo.models.pyramid import Pyramid
from zoo.models.vit import ViT, ViTConfig
from zoo.norms import LayerNorm
from zoo.positions import Learned, Position, Rotary, SinCos
from zoo.spec import check, each_name, names_of, options_of, parse, respelled
from zoo.weights.origin import inherit


class Reader(NamedTuple):
    """A norm, by its owner and its site there, and the linears that alone read its result; or why there are none."""

    owner: nn.Module
    site: str
    linears: list[nn.Linear] | str


def to_rmsnorm(model: nn.Module, *, compressed: bool = False) -> ViT:
    """A copy of a vision transformer, in eval mode, that computes the same with `rmsnorm` in place of `layernorm`.

    Everything that writes to the residual stream is centred, so that the channels of each token have zero mean; the two
    norms are then equal. The layer scale goes into the linears in front of it, and the biases of the norms into the
    linears behind them. Weights are computed in fp64 and keep their dtype. The maps of `features` are centred, too.

    Args:
        model: a ViT of the zoo with layernorm and placement `pre`, not fused; it stays as it is.
        compressed: use `crmsnorm`: the stream has dim - 1 channels, because the last is minus the sum of the others.

    Raises:
        ValueError: the result would not be exact; in one line, with the reason.
    """
    kind = "crmsnorm" if compressed else "rmsnorm"
    try:
        if not isinstance(model, Model) or not isinstance(model.config, ModelConfig):
            raise ValueError("only models of the zoo with blocks can be converted")
        _check_choices(model, model.config)
        if not isinstance(model, ViT):
            start = "stem and reductions" if isinstance(model, Pyramid) else "parts around the blocks"
            raise ValueError(f"only the family vit is exact; the {start} of a {type(model).__name__} may have norms")
        twin = copied(model).eval()
        residuals = [part for part in twin.modules() if isinstance(part, Residual)]
        _check_writers(twin, residuals)
        readers, like = _readers(twin, residuals), next(model.parameters())
        biased = not compressed and any(map(_keeps_bias, readers))
        config = _config(twin.config, kind, biased)
        for reader in readers if compressed else ():
            _check_compressed(reader)
        with torch.no_grad():
            twin.double()
            _change(twin, residuals, readers, compressed, biased)
        made = _built(config, twin).to(like)
        inherit(made, model)
        return made
    except ValueError as error:
        raise ValueError(f"{kind}: {error}") from None


def _check_choices(model: Model, config: ModelConfig) -> None:
    """ValueError if the choices of a config let norms read or write what cannot be centred."""
    if model.fusion is not None:
        raise ValueError("the model is fused; start from the unfused one")
    if wrong := [name for name in names_of(config.norm) if parse(name)[0] != "layernorm"]:
        raise ValueError(f"norm '{wrong[0]}' cannot be converted; only layernorm can")
    if wrong := [name for name in names_of(config.placement) if name != "pre"]:
        raise ValueError(f"placement '{wrong[0]}' has norms that do not read the stream; only 'pre' is exact")
    if "norm" in config.words:
        raise ValueError("the layout has a norm that writes the stream, and its result is not zero-mean")
    if "conv" in config.words:
        raise ValueError("the layout has a convolution, whose result cannot be made zero-mean")
    if wrong := [name for name in names_of(config.channel) if parse(name)[0] != "none"]:
        raise ValueError(
            f"channel attention '{wrong[0]}' scales each channel by another factor, so the stream is not zero-mean"
        )
    if wrong := [name for name in names_of(config.modulation) if parse(name)[0] != "none"]:
        raise ValueError(
            f"the gates of modulation '{wrong[0]}' scale each channel by another factor, so the stream is not zero-mean"
        )


def _check_writers(model: ViT, residuals: list[Residual]) -> None:
    """ValueError where something else than linears and tables writes to the stream."""
    config = model.config
    if config.first_norm:
        raise ValueError("first_norm writes the stream, and its result is not zero-mean")
    if config.pool == "attention":
        raise ValueError("pool 'attention' has a norm whose input is not zero-mean")
    position = model.position
    writes = type(position).forward is not Position.forward and not (
        isinstance(position, Rotary) and not position.absolute
    )
    if writes and not isinstance(position, Learned | SinCos):
        raise ValueError(f"position '{config.described('position')}' adds values to the tokens that are not zero-mean")
    if isinstance(position, SinCos) and position.centred != "none":
        raise ValueError(f"position '{config.described('position')}' is centred already")
    for residual in residuals:
        if isinstance(why := residual.branch.outputs(), str):
            raise ValueError(f"the output of a branch cannot be made zero-mean: {why}")


def _readers(model: ViT, residuals: list[Residual]) -> list[Reader]:
    found = []
    for residual in residuals:
        linears: list[nn.Linear] | str = residual.branch.inputs()  # pyright: ignore[reportCallIssue]
        if residual.adds_code and not isinstance(linears, str):
            linears = f"position '{model.config.described('position')}' adds to what the branch reads"
        found.append(Reader(residual, "before", linears))
    heads = [head for head in (model.head, model.head_distilled) if head is not None]
    return [*found, Reader(model, "norm", heads or "a model without a head gives the result of its last norm")]


def _keeps_bias(reader: Reader) -> bool:
    """Whether the bias of the norm cannot go into the linears behind it."""
    if _norm(reader).bias is None:
        return False
    return isinstance(reader.linears, str) or any(each.bias is None for each in reader.linears)


def _check_compressed(reader: Reader) -> None:
    if isinstance(reader.linears, str):
        raise ValueError(f"the omitted channel is needed: {reader.linears}")
    if _keeps_bias(reader):
        raise ValueError("a linear behind a norm has no bias to take that of the norm")


def _norm(reader: Reader) -> LayerNorm:
    return getattr(reader.owner, reader.site)


def _config(config: ViTConfig, kind: str, biased: bool) -> ViTConfig:
    """The config of the result; ValueError if its choices do not allow the other number of channels."""
    dim = config.dim - (kind == "crmsnorm")
    changed = {"norm": each_name(config.norm, lambda spec: _rms(spec, kind, biased)), "layer_scale": None, "dim": dim}
    if parse(names_of(config.position)[0])[0] == "sincos":
        centred = "compressed" if kind == "crmsnorm" else "full"
        changed["position"] = each_name(config.position, lambda spec: respelled(spec, centred=centred))
    if kind == "crmsnorm" and "mixer" in config.words:
        changed["mixer"] = each_name(config.mixer, lambda spec: _same_heads(spec, config))
    if kind == "crmsnorm" and not {*FEED_FORWARD}.isdisjoint(config.words):
        changed["ffn"] = each_name(config.ffn, lambda spec: _same_width(spec, config))
    return replace(config, **changed)  # pyright: ignore[reportArgumentType]


def _rms(spec: str, kind: str, biased: bool) -> str:
    """The spec of the RMS norm for that of a layer norm; its eps is the same, and the defaults are equal."""
    options = check(TABLES["norm"], spec)
    bias = True if biased and options["affine"] else None
    return respelled(spec, kind, bias=bias)


def _same_heads(spec: str, config: ViTConfig) -> str:
    """The mixer with heads as wide as before."""
    options = check(TABLES["mixer"], spec)
    if "head_dim" not in options:
        raise ValueError(f"mixer '{spec}' has no option head_dim, so its heads must divide dim {config.dim - 1}")
    return respelled(spec, head_dim=options["head_dim"] or config.dim // config.heads)


def _same_width(spec: str, config: ViTConfig) -> str:
    """The feed-forward layer with a hidden width as before."""
    row, options = TABLES["ffn"][parse(spec)[0]], check(TABLES["ffn"], spec)
    if "ratio" not in options:
        raise ValueError(f"ffn '{spec}' has no option ratio, so its width cannot stay")
    width = row.sites_of(config.dim, config.heads, **options)["inner"].width
    multiple = {"multiple": 1} if "multiple" in options_of(row) else {}
    options = {"ratio": round((width + 0.5) / (config.dim - 1), 6), **multiple}
    return respelled(spec, **options)


def _change(model: ViT, residuals: list[Residual], readers: list[Reader], compressed: bool, biased: bool) -> None:
    """Gives a model's own weights, in place, what they are in the result."""
    conv, table = model.stem.conv, isinstance(model.position, Learned)
    writers: list[tuple[Any, str, int]] = [(conv, "weight", 0), (conv, "bias", 0), (model, "tokens", -1)]
    writers += [(model.position, "table", -1)] if table else []
    for residual in residuals:
        linears: Any = residual.branch.outputs()  # pyright: ignore[reportCallIssue]
        for linear in linears:
            if residual.layer_scale is not None:
                linear.weight *= residual.layer_scale[:, None]
                if linear.bias is not None:
                    linear.bias *= residual.layer_scale
            writers += [(linear, "weight", 0), (linear, "bias", 0)]
        residual.layer_scale = None
    for owner, name, axis in writers:
        if (tensor := getattr(owner, name)) is not None:
            centred = tensor - tensor.mean(axis, keepdim=True)
            kept = centred.narrow(axis, 0, centred.shape[axis] - compressed)
            setattr(owner, name, nn.Parameter(kept.contiguous()))
    for reader in readers:
        _read(reader, model.config.dim, compressed, biased)


def _read(reader: Reader, dim: int, compressed: bool, biased: bool) -> None:
    """Gives a norm, and the linears behind it, their weights in the result."""
    norm = _norm(reader)
    weight, bias = norm.weight, norm.bias
    if biased or isinstance(reader.linears, str):
        return
    for linear in reader.linears:
        parts = linear.weight.unflatten(1, (-1, dim))  # several for a head that reads several tokens
        if bias is not None:
            linear.bias += (parts @ bias).sum(1)  # pyright: ignore[reportAttributeAccessIssue]
        if compressed:
            parts = parts if weight is None else parts * weight
            linear.weight = nn.Parameter((parts[..., :-1] - parts[..., -1:]).flatten(1))
    norm.bias = None
    if compressed and weight is not None:
        norm.weight = nn.Parameter(torch.ones_like(weight[:-1]))


def _built(config: ViTConfig, changed: ViT) -> ViT:
    """A model of the config with the weights of a changed one; ValueError if they do not fit."""
    made, state = config.build().double().eval(), changed.state_dict()
    shapes: dict[str, Tensor] = made.state_dict()
    for name in sorted({*shapes, *state}):
        if name not in state or name not in shapes or state[name].shape != shapes[name].shape:
            raise ValueError(f"'{name}' depends on the number of channels in a way that is not known")
    made.load_state_dict(state)
    return made

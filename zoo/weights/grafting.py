"""Another mixer in a trained model: each new mixer learns to give what the old one gave (Chandrasegaran et al. 2025,
arXiv:2506.05340)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import replace
from inspect import signature
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import AdamW
from tqdm import tqdm

from zoo.block import Block, Residual
from zoo.config import ModelConfig
from zoo.layer import Context
from zoo.mixers import MIXERS
from zoo.models.base import Model
from zoo.text import one_line
from zoo.weights.origin import inherit


class Graft(NamedTuple):
    """The model with new mixers, and for each the relative squared error |new - old|^2 / |old|^2 on the last batch."""

    model: Model
    errors: dict[str, float]


def graft(model: nn.Module, mixer: Any, batches: Iterable[Any], *, rate: float = 1e-3, progress: bool = True) -> Graft:
    """A copy of a trained model whose blocks have another mixer, each trained to give what the old one gives for the
    same tokens. Train the result with `fit` as any checkpoint (`zoo.save_model`, then `--model.weights`).

    Each batch is one step: the trained model sees it, and every new mixer, alone, sees the tokens that the old one saw.
    Weights of one name and shape start as the old ones; all outside the mixers are copied.

    Args:
        model: a trained model of the zoo, in any mode; it stays as it is.
        mixer: the name of the new mixer, or several that the blocks take in turn, as in `zoo.create_model`.
        batches: arguments of the model, one tuple or mapping for each step, such as prepared images.
        rate: peak learning rate of AdamW, which falls to 0 if the number of batches is known.
        progress: shows a bar.

    Raises:
        ValueError: in one line: the model has no blocks of the zoo or is fused, no block would change, the mixer does
            not fit the model, there are no batches, or an error is NaN or infinite.
    """
    if not isinstance(model, Model) or not isinstance(model.config, ModelConfig):
        raise ValueError("graft needs a model of the zoo with blocks, as zoo.create_model gives it")
    if model.fusion is not None:
        raise ValueError("graft needs a model that is not fused")
    if not 0.0 <= rate < math.inf:
        raise ValueError(f"rate must be finite and >= 0, got {rate}")
    grafted = replace(model.config, mixer=tuple(mixer) if isinstance(mixer, list) else mixer).build()
    assert isinstance(grafted, Model)
    device = next(model.parameters()).device
    grafted.to(device, next(model.parameters()).dtype)
    paths = changed(model, grafted)
    copy_common(model, grafted)
    inherit(grafted, model)
    new = {path: grafted.get_submodule(path).train() for path in paths}
    trained = [each for part in new.values() for each in part.parameters()]
    if not trained:
        raise ValueError(f"mixer '{grafted.config.described('mixer')}' has no weights to train")
    optimizer = AdamW(trained, lr=rate, weight_decay=0.0)
    total = len(batches) if hasattr(batches, "__len__") else None  # pyright: ignore[reportArgumentType]
    errors, modes = dict[str, Tensor](), {part: part.training for part in model.modules()}
    model.eval()
    try:
        with tqdm(batches, total=total, unit="step", ncols=79, disable=None if progress else True) as bar:
            for step, batch in enumerate(bar):
                for group in optimizer.param_groups:
                    group["lr"] = rate * (1 - step / total if total else 1.0)
                seen = branches_of(model, paths, batch)
                with torch.enable_grad():
                    errors = {path: error(new[path], *each) for path, each in seen}
                    loss = torch.stack([*errors.values()]).sum()
                if step % 50 == 0 and not bool(loss.isfinite()):  # each time the host waits for the device
                    raise ValueError(f"the error of a new mixer is NaN or infinite at step {step}; lower rate")
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
    finally:
        for part, training in modes.items():
            part.training = training
    if not errors:
        raise ValueError("graft needs batches, got none")
    left = {path: float(each.detach()) for path, each in errors.items()}
    if not all(map(math.isfinite, left.values())):
        raise ValueError("the error of a new mixer is NaN or infinite; lower rate")
    return Graft(grafted.eval(), left)


def changed(model: Model, grafted: Model) -> list[str]:
    """The paths of the mixers of blocks whose mixer is another one; ValueError if there are none."""
    config, other = model.config, grafted.config
    found = []
    for stage, size in enumerate(config.stages):
        for index in range(size.depth):
            if config.block(stage, index).mixer == other.block(stage, index).mixer:
                continue
            path = config.path(stage, index)
            block = grafted.get_submodule(path)
            assert isinstance(block, Block)
            found += [f"{path}.steps.{each}" for each in mixers_of(block)]
    if not found:
        raise ValueError(f"mixer '{other.described('mixer')}' changes no block of this model")
    return found


def mixers_of(block: Block) -> Iterator[str]:
    """The paths of a block's mixers in its steps."""
    rows = tuple(MIXERS.values())
    for index, step in enumerate(block.steps):
        if isinstance(step, Residual):
            single = len(step.leaves) == 1
            for place, leaf in enumerate(step.leaves):
                if isinstance(leaf, rows):
                    yield f"{index}.branch" if single else f"{index}.branch.branches.{place}"


@torch.no_grad()
def copy_common(model: Model, grafted: Model) -> None:
    """Gives a model the tensors of another that have the same name and shape."""
    old = model.state_dict()
    for name, tensor in grafted.state_dict().items():
        if name in old and old[name].shape == tensor.shape:
            tensor.copy_(old[name])


def branches_of(model: Model, paths: list[str], batch: Any) -> list[tuple[str, tuple[Tensor, Context, Tensor]]]:
    """What each of the mixers saw of a batch, and what it gave."""
    seen: list[tuple[str, tuple[Tensor, Context, Tensor]]] = []
    with ExitStack() as stack, torch.no_grad():
        for path in paths:

            def note(_: nn.Module, inputs: Any, output: Tensor, path: str = path) -> None:
                seen.append((path, (inputs[0].clone(), inputs[1], output.clone())))

            stack.callback(model.get_submodule(path).register_forward_hook(note).remove)
        given = batch if isinstance(batch, tuple | list | Mapping) else (batch,)
        names = signature(model.forward)
        try:
            found = names.bind(**given) if isinstance(given, Mapping) else names.bind(*given)
        except TypeError as error:
            raise ValueError(f"graft: a batch must be the model's arguments {one_line(names)}: {error}") from error
        model(*found.args, **found.kwargs)
    return seen


def error(layer: nn.Module, x: Tensor, context: Context, wanted: Tensor) -> Tensor:
    """|layer(x) - wanted|^2 / |wanted|^2 over real tokens."""
    apart, size = (layer(x, context) - wanted).float().square(), wanted.float().square()
    if context.mask is not None:
        apart, size = (each.masked_fill(~context.mask[..., None], 0.0) for each in (apart, size))
    return apart.sum() / size.sum().clamp(min=1e-12)

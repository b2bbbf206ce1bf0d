"""From a checkpoint's folder to a model. Only JSON and safetensors are read; no code from a file is ever run."""

from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from zoo.config import Config
from zoo.fusion import fuse
from zoo.inputs import Preprocess
from zoo.layer import advance
from zoo.models import FAMILIES
from zoo.models.base import Model
from zoo.outputs import LABELS
from zoo.outputs.tokens import Tokenizer
from zoo.positions import make_anchors
from zoo.tensors import Unfilled, not_finite, shapes_alone
from zoo.text import reason
from zoo.weights.files import CheckpointError, file_of, read_tensors
from zoo.weights.format import ABOUT, check_fit, read_config, read_preprocess
from zoo.weights.probe import check_probe

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
TRIES = 5  # of reading a checkpoint that another process replaces meanwhile


class Checkpoint(NamedTuple):
    """The result of `load_checkpoint`: the model in eval mode, and the other contents of its folder.

    Called with a raw input, such as a file's path, it predicts: `load_checkpoint("vit_micro.digits")("photo.jpg")`.
    """

    model: Model
    preprocess: Preprocess | None
    labels: tuple[str, ...] | Tokenizer | None  # labels of the outputs: a name for each class, or the tokenizer
    config: dict[str, Any]  # config.json, in the newest format

    def __call__(self, raw: Any, /) -> Any:
        """The prediction for one raw input, which is anything that `preprocess` accepts.

        Returns:
            For an image, its classes as a list of (label, probability), the most probable first; for audio, its text.

        Raises:
            ValueError: the input cannot be read, or the checkpoint has no preprocessing or no head.
        """
        kind, config = self.model.config.labels, self.model.config
        if self.preprocess is None:
            raise ValueError("the checkpoint has no preprocess; call its model with a prepared input")
        if not config.headed:
            raise ValueError("the checkpoint is a backbone without a head, so it predicts nothing; call its model")
        if kind is None or not config.answers:
            raise ValueError(f"the checkpoint has no answer for an input; see `zoo {config.task} --help`")
        return LABELS[kind].answer(self.model, self.preprocess.parts(raw), self.labels)


def read_checkpoint(folder: Path, check: bool = False) -> Checkpoint:
    """The checkpoint in a folder, which may be replaced meanwhile; CheckpointError if it is invalid."""
    for _ in range(TRIES):
        identity = _identity(folder)
        try:
            found = _load(folder, check)
        except CheckpointError:
            if _identity(folder) == identity:
                raise
            continue
        if _identity(folder) == identity:
            return found
    raise CheckpointError(f"{folder} was replaced {TRIES} times while it was being read; try again")


def _identity(folder: Path) -> tuple[int, int] | None:
    """Distinguishes a folder from one that replaces it."""
    try:
        found = folder.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino


def _load(folder: Path, check: bool) -> Checkpoint:
    path = file_of(folder, "config.json")
    written = read_config(path)
    files = written["files"]
    tensors = read_tensors(file_of(folder, "model.safetensors"), files.get("model.safetensors"))
    preprocess = labels = None
    try:
        config = FAMILIES[written["family"]](**written["model"])
        if written["labels"] is not None:
            if config.labels is None:
                raise ValueError("this model's outputs take no labels")
            labels = LABELS[config.labels].read(written["labels"])
        if written["preprocess"] is not None:
            preprocess = read_preprocess(config, written["preprocess"])
        check_fit(config, preprocess, labels)
        if lacking := config.missing(tensors):
            raise ValueError(f"model.safetensors has no tensor '{lacking}'")
        model = _build(config, written["fused"], tensors, folder / "model.safetensors")
    except CheckpointError:
        raise
    except Exception as error:  # a config from elsewhere may raise any error in a constructor
        raise CheckpointError(f"{path}: {reason(error)}") from error
    if check:
        check_probe(file_of(folder, "probe.safetensors"), model, preprocess, files.get("probe.safetensors"))
    model.preset, model.preprocess, model.labels = written["preset"], preprocess, labels
    model.about = {name: written[name] for name in ABOUT}
    return Checkpoint(model, preprocess, labels, written)


def _build(config: Config, fused: bool, tensors: dict[str, Tensor], path: Path) -> Model:
    """The model with the given weights. The caller's random state is unchanged."""
    with torch.random.fork_rng(devices=[]):
        with shapes_alone():  # finds misfits before memory is taken
            model = _built(config, fused)
        kinds = _match(model, tensors, path)
        make_anchors(model)
        if fused or any(each.is_meta and name not in kinds for name, each in model.named_buffers()):
            with torch.device("cpu"), Unfilled():  # other buffers outside the state dict have to be made
                model = _built(config, fused)
        places = model.state_dict()
        own = {name: _laid_out(tensors.pop(name).to(kind), places[name]) for name, kind in kinds.items()}
        model.load_state_dict(own, assign=True)
        return _checked(model, path)


def _laid_out(tensor: Tensor, place: Tensor) -> Tensor:
    """The tensor with the shape and strides of its place in the model, such as those of channels last."""
    tensor = tensor.view(place.shape)
    if tensor.stride() == place.stride():
        return tensor
    return torch.empty_like(place, dtype=tensor.dtype, device="cpu").copy_(tensor)


def _built(config: Config, fused: bool) -> nn.Module:
    model = config.build()
    if fused:
        advance(model, 1.0)
        model = fuse(model)
    return model


def _match(model: nn.Module, tensors: dict[str, Tensor], path: Path) -> dict[str, torch.dtype]:
    """The dtypes of the model's tensors by name; CheckpointError if those of the file differ."""
    wanted = model.state_dict()
    missing = wanted.keys() - tensors.keys()
    wrong = [f"{name!r} is missing" for name in missing]
    wrong += [f"{name!r} is unknown" for name in tensors.keys() - wanted.keys()]
    for name in wanted.keys() & tensors.keys():
        got, want = tensors[name], wanted[name]
        if got.shape != want.shape and not (got.ndim == 0 and want.shape == (1,)):  # alpha of norms was a scalar once
            wrong.append(f"{name!r} has shape {list(got.shape)}, expected {list(want.shape)}")
        elif got.dtype != want.dtype and not (want.is_floating_point() and got.dtype in FLOATS):
            wrong.append(f"{name!r} has dtype {got.dtype}, expected {want.dtype}")
    if wrong:
        more = f"; and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise CheckpointError(f"{path} does not fit its config.json: {'; '.join(sorted(wrong)[:3])}{more}")
    return {name: tensor.dtype for name, tensor in wanted.items()}


def _checked(model: nn.Module, path: Path) -> Model:
    assert isinstance(model, Model)
    if name := not_finite(model.state_dict()):
        raise CheckpointError(f"{path}: '{name}' is NaN or infinite")
    return model.eval()

"""The base of every model: a config, a forward of its own, features for other models; and running its blocks."""

import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, Generic, Self, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import zoo
from zoo.block import Block
from zoo.config import Config, ModelConfig
from zoo.layer import Carry, Context, Fold, Layer, Losses, Notes, second_run
from zoo.positions import POSITIONS, Position
from zoo.spec import make
from zoo.tensors import compiling

Kind = TypeVar("Kind", bound=Config)


@dataclass(frozen=True, kw_only=True)
class ClassifierConfig(Config):
    """The config of a family that classifies images.

    Args:
        image: side of the images in pixels, for weights that depend on it; any other size works too.
        channels: channels of the images.
        classes: number of classes; 0 omits the classifier, and the model gives pooled features [B, D] of the last map.
    """

    task = "classify"
    input = "image"
    argument = "images"
    labels = "classes"

    image: int = 224
    channels: int = 3
    classes: int = 1000

    @property
    def labelled(self) -> int:
        return self.classes

    @property
    def tokens_read(self) -> int:
        """How many tokens before the grid the head reads, the first ones; 0 if it reads only those of the grid."""
        return 0

    @property
    def pipeline_tag(self) -> str:
        return "image-classification" if self.classes else "image-feature-extraction"

    def call(self, prepared: str) -> str:
        return f"{'logits' if self.classes else 'output'} = model({prepared})"

    def probe_inputs(self, generator: torch.Generator) -> dict[str, Tensor]:
        shape = (1, self.channels, self.image, self.image)
        return {"images": torch.randn(shape, generator=generator, device="cpu")}


class Model(nn.Module, Generic[Kind]):
    """A model of the zoo. A family derives from it and from Config; its Config describes inputs and outputs.

    `checkpointing` recomputes activations in the backward pass, to save memory. `notes` is what layers report into in
    a forward, `losses` what they add to the loss, both None if nobody asks (see `noting` and `adding_losses`). `fusion`
    is the report of `zoo.fuse`, None if the model is not fused. `preset`, `preprocess`, `labels` and `about` (source,
    license, card, figures and more) are those of the checkpoint that it was read from; set the first three to None, and
    `about` to {}, to save it without them. `loaded` says which of its weights are from there (see
    `zoo.weights.Loaded`), and `origin` for which weights `about` holds.
    """

    replaceable: tuple[str, ...] = ("head",)  # parts that may start untrained in fine-tuning

    config: Kind
    fusion: list[Fold] | None = None
    notes: Notes | None = None
    losses: list[Tensor] | None = None
    _checkpointing: bool = False
    # Facts from the model's checkpoint, which `zoo.save_model` keeps.
    preset: str | None = None
    preprocess: Any = None
    labels: Any = None
    about: Mapping[str, Any] = MappingProxyType({})
    loaded: Any = None
    origin: Any = None

    def __init__(self, config: Kind) -> None:
        super().__init__()
        self.config = config
        self.checkpointing = False

    @property
    def checkpointing(self) -> bool:
        """Whether this model, and the models that it contains, recompute activations."""
        return self._checkpointing

    @checkpointing.setter
    def checkpointing(self, value: bool) -> None:
        self._checkpointing = value
        for part in self.modules():
            if part is not self and hasattr(part, "checkpointing"):
                part.checkpointing = value  # pyright: ignore[reportArgumentType]

    @property
    def strides(self) -> list[int]:
        """The stride of each of `features`: places of the input, along one side or along time, per place."""
        raise TypeError(f"{type(self).__name__} has no strides")

    @property
    def channels(self) -> list[int]:
        """The channels of each of `features`."""
        raise TypeError(f"{type(self).__name__} has no channels")

    @property
    def num_features(self) -> int:
        """The channels of the last of `features`, and the size D of the pooled [B, D] that classes = 0 gives."""
        return self.channels[-1]

    def features(self, inputs: Tensor, /, layers: Sequence[int] | None = None) -> list[Tensor]:
        """Maps [B, C, ...] after the given layers, all if None, for other models to build on."""
        raise TypeError(f"{type(self).__name__} has no features")

    def no_weight_decay(self) -> set[str]:
        """Parameters of more than one dimension without weight decay."""
        return set()

    def group_matcher(self, coarse: bool = False) -> dict[str, object]:
        """The depth of each parameter, in the form for timm's layer-wise decay."""
        raise ValueError(f"{type(self).__name__} does not support layer_decay; it has no group_matcher")

    @classmethod
    def from_pretrained(cls, name: str | os.PathLike[str], **options: Any) -> Self:
        """`zoo.load_model` for a checkpoint of this family, with its options, such as classes, revision, token,
        cache_dir, force_download and local_files_only; ValueError if it is one of another."""
        model = zoo.load_model(name, **options)
        if not isinstance(model, cls):
            raise ValueError(f"{name} holds a {type(model).__name__}, not a {cls.__name__}; use zoo.load_model")
        return model

    def save_pretrained(self, folder: str | os.PathLike[str], **facts: Any) -> None:
        """`zoo.save_model`: writes a checkpoint folder."""
        zoo.save_model(self, folder, **facts)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        commit_message: str | None = None,
        private: bool | None = None,
        token: str | bool | None = None,
        create_pr: bool = False,
        tag: str | None = None,
    ) -> str:
        """Publishes the model as a checkpoint on the Hub: `zoo.publish` of a folder that `save_pretrained` writes, with
        the argument names of the Hub's client.

        Args:
            repo_id: "owner/name"; it is created if it does not exist, unless with `create_pr`.
            commit_message: title of the commit or the pull request, in one line.
            private: create the repository as private.
            token: of the Hub; None or True is the stored one or HF_TOKEN.
            create_pr: open a pull request instead of writing to `main`.
            tag: a tag for this upload, so that "owner/name@tag" always loads it.

        Returns:
            The address of the repository or the pull request.
        """
        from huggingface_hub.utils import validate_repo_id

        validate_repo_id(str(repo_id))  # before a folder gets its name
        with tempfile.TemporaryDirectory() as home:
            folder = Path(home, str(repo_id).rpartition("/")[2])
            zoo.save_model(self, folder)
            given: dict[str, Any] = {"message": commit_message, "private": bool(private), "token": token, "tag": tag}
            return zoo.publish(folder, repo_id, pr=create_pr, **given)

    def name_layers(self) -> None:
        """Tells each layer its path in the model."""
        for name, module in self.named_modules():
            if isinstance(module, Layer):
                module.address = name

    def run(self, blocks: Iterable[nn.Module], x: Tensor, context: Context) -> Tensor:
        """The blocks one after the other. Layers write into `notes` and `losses`, if these are not None. What blocks
        leave for later ones lasts for this call; a family that runs some of them at a time gives the Context a `carry`.
        """
        if self.notes is not None:
            context = context._replace(notes=self.notes)
        carry = Carry() if context.carry is None else context.carry
        checkpointing = self.checkpointing and self.training
        for block in blocks:
            # Of each block: compiled blocks are compiled again for another number of losses.
            added = None if self.losses is None else Losses()
            own = Carry(carry.values)
            x = run((block,), x, context._replace(losses=added, carry=own), checkpointing)
            carry.values = {**carry.values, **own.left}
            own.left = {}  # a checkpointed block keeps its Context, and these tensors keep that block
            if self.losses is not None and added is not None:
                self.losses += added.values
                added.values = []  # for what a checkpointed block adds when it runs again
        return x


@contextmanager
def noting(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """While it lasts, the layers of the model, and of models that it contains, report into the dict: attention weights
    as `<path of the layer>.weights`. Each forward overwrites what was there."""
    models = [(name, part) for name, part in model.named_modules() if isinstance(part, Model)]
    before, notes = [part.notes for _, part in models], Notes()
    try:
        for name, module in model.named_modules():
            if isinstance(module, Layer):
                module.address = name
        for _, part in models:
            part.notes = notes
        yield notes.values
    finally:
        for (_, part), earlier in zip(models, before, strict=True):
            part.notes = earlier


@contextmanager
def adding_losses(model: nn.Module) -> Iterator[list[Tensor]]:
    """While it lasts, the layers of the model, and of models that it contains, add their losses to the list in forwards
    with gradients."""
    parts = [part for part in model.modules() if isinstance(part, Model)]
    before, losses = [part.losses for part in parts], list[Tensor]()
    try:
        for part in parts:
            part.losses = losses
        yield losses
    finally:
        for part, earlier in zip(parts, before, strict=True):
            part.losses = earlier


def chosen_layers(layers: Sequence[int] | None, number: int, kind: str) -> list[int]:
    """The requested layers, counted from 0; all if None, and -1 is the last. ValueError if one does not exist."""
    wanted = range(number) if layers is None else layers
    if bad := [layer for layer in wanted if not -number <= layer < number]:
        raise ValueError(f"layers: {kind} {bad[0]} does not exist; choose from 0 to {number - 1}")
    return [layer % number for layer in wanted]


def make_block(config: ModelConfig, stage: int, index: int, rate: float) -> Block:
    """One block; an error names it if blocks differ."""
    try:
        return Block(config.block(stage, index), rate)
    except ValueError as error:
        raise ValueError(f"{config.located(stage, index)}{error}") from None


def make_position(config: ModelConfig, stage: int = 0, prefix: bool = True) -> Position:
    """The position of a stage's tokens; prefix=False for one that tokens get before those of the prefix join them."""
    first = config.block(stage)
    own = first.place if prefix else replace(first.place, prefix=0)
    place = (first.dim, first.heads, first.head_width, own)
    return make(POSITIONS, first.position, *place, field=f"{config.located(stage, 0)}position")


def count_parameters(model: nn.Module) -> int:
    """The number of parameters, trainable or not."""
    return sum(parameter.numel() for parameter in model.parameters())


def drop_rates(last: float, depth: int) -> list[float]:
    """The rates of stochastic depth of a model's blocks: they grow linearly from 0 to that of the last one."""
    return [last * index / max(1, depth - 1) for index in range(depth)]


def _first_and_second_run() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    return nullcontext(), second_run()


def run(blocks: Iterable[nn.Module], x: Tensor, context: Context, checkpointing: bool = False) -> Tensor:
    """The blocks one after the other; with checkpointing, activations are recomputed in the backward pass, and
    running statistics move once."""
    # The compiler traces a block once, so its statistics move once by themselves.
    watch = {} if compiling() else {"context_fn": _first_and_second_run}
    for block in blocks:
        if checkpointing and torch.is_grad_enabled():
            x = checkpoint(block, x, context, use_reentrant=False, **watch)  # pyright: ignore
        else:
            x = block(x, context)
    return x


def compile_blocks(model: nn.Module, device: torch.device) -> None:
    """Compiles each block at its first call, and again when sizes start to vary. `device` is that of the training."""
    # On the CPU Inductor would make convolutions channels last. With sizes that vary, PyTorch 2.11 then recompiles the
    # backward pass for every size, and fails on models whose strides it cannot compare.
    options: dict[str, Any] | None = {"layout_optimization": False} if device.type == "cpu" else None
    # One limit holds for all blocks, of every stage, in training and validation, with and without padding.
    torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
    for module in model.modules():
        if isinstance(module, Block):
            module.compile(options=options)

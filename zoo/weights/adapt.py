"""A trained model changed for a new task: other classes, channels, image size or choices, with a report of what was
taken from it and what was not."""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import fields, replace
from typing import Any, NamedTuple

from torch import Tensor

from zoo.config import Config, field_names
from zoo.inputs import Preprocess
from zoo.inputs.images import PixelPreprocess
from zoo.models.base import Model
from zoo.outputs import LABELS
from zoo.tensors import shapes_alone
from zoo.text import unknown
from zoo.weights.origin import made_from
from zoo.weights.read import Checkpoint

FREE = ("drop_path", "dropout")  # fields that have no part in what a trained model computes


class Loaded(NamedTuple):
    """Where each tensor of a model comes from, by name: `model.loaded`.

    `taken` tensors are those of the checkpoint; `resized` ones were made from them, or keep the rows of classes that
    both know; `new` ones start untrained; `left_out` are those of the checkpoint that the model does not have.
    """

    taken: tuple[str, ...] = ()
    resized: tuple[str, ...] = ()
    new: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()

    def __str__(self) -> str:
        parts = [f"{len(self.taken)} tensors taken"]
        for word in ("resized", "new", "left_out"):
            if names := getattr(self, word):
                more = f" and {len(names) - 3} more" if len(names) > 3 else ""
                parts.append(f"{word.replace('_', ' ')}: {', '.join(names[:3])}{more}")
        return "; ".join(parts)


def adapt(
    start: Checkpoint,
    changes: Mapping[str, Any],
    labels: Any = None,
    fresh: Iterable[str] = (),
    name: object = "the checkpoint",
) -> Checkpoint:
    """A checkpoint's model for another task.

    Args:
        start: the checkpoint; its model is not used afterwards.
        changes: fields of the model's config. The number of classes makes a new classifier, channels sum or spread
            the weights of the first convolution, and the image size changes the preprocessing: learned tables keep
            their own size and are resized where they are used.
        labels: names of the classes, a tokenizer or a LabelMap. Rows of those that the checkpoint has, too, are kept.
        fresh: names of other fields that may change; weights that then do not fit start untrained.
        name: of the checkpoint, for errors.

    Raises:
        ValueError: a field is unknown, or it changes and is not in `fresh`; or the checkpoint is fused.
    """
    config, preprocess = start.model.config, start.preprocess
    if not isinstance(fresh, Iterable) or not all(isinstance(each, str) for each in fresh):
        raise ValueError("fresh must be a list of names of fields")
    changes, fresh = dict(config.migrated(changes, config)), {fresh} if isinstance(fresh, str) else {*fresh}
    known = field_names(config)
    if wrong := [each for each in (*changes, *fresh) if each not in known]:
        raise ValueError(unknown(f"field of {name}", wrong[0], known))
    if labels is not None:
        changes[config.counted] = _checked_labels(start, labels, name)
    wanted = replace(config, **changes)
    different = {each.name for each in fields(config) if getattr(wanted, each.name) != getattr(config, each.name)}
    usual = {config.counted, "channels", "image", *FREE}
    if refused := sorted(different - usual - fresh):
        was, now = config.described(refused[0]), wanted.described(refused[0])
        raise ValueError(
            f"{name} has {refused[0]} '{was}', not '{now}'; to allow it, list it in fresh, as in "
            f"fresh=['{refused[0]}']: weights that do not fit then start untrained"
        )
    if labels is None:
        labels = start.labels if config.counted not in different else None
    kept = _kept_rows(start.labels, labels, config)
    model, report = start.model, Loaded(taken=(*start.model.state_dict(),))
    if different or kept is not None:
        if start.config["fused"]:
            raise ValueError(f"{name} is fused, so its config cannot change; start from the unfused one")
        model, report = _rebuilt(start, wanted, different, fresh, kept, name)
    if preprocess is not None:
        preprocess = _prepared(preprocess, changes)
    model.preset, model.preprocess, model.labels = start.config["preset"], preprocess, labels
    same = kept is None and different <= {*FREE} and preprocess == start.preprocess
    about, origin = start.model.about, start.model.origin
    model.about = dict(about) if same else made_from(about, origin and origin.base)
    model.loaded, model.origin = report, origin
    return Checkpoint(model.train(start.model.training), preprocess, labels, start.config)


def _checked_labels(start: Checkpoint, labels: Any, name: object) -> int:
    """The number of outputs that such labels need."""
    config = start.model.config
    if config.labels is None:
        raise ValueError(f"the outputs of {name} take no labels")
    kind = LABELS[config.labels]
    if not kind.fits(labels):
        raise ValueError(f"labels of {name} must be {kind.what}, got {type(labels).__name__}")
    names = kind.names(labels)
    if names and (most := Counter(names).most_common(1)[0])[1] > 1:
        raise ValueError(f"labels: '{most[0]}' appears twice")
    if start.labels is None:
        raise ValueError(f"{name} has no labels, so none can be matched; give the number of classes instead")
    return kind.number(labels)


def _kept_rows(old: Any, new: Any, config: Config) -> list[int | None] | None:
    """For each new label the row that the old labels have for it; None where all rows stay as they are."""
    if config.labels is None or old is None or new is None:
        return None
    names = LABELS[config.labels].names
    before, after = names(old), names(new)
    if [*before] == [*after]:
        return None
    row = {name: index for index, name in enumerate(before)}
    return [row.get(name) for name in after]


def _of_classes(config: Config) -> set[str]:
    """The tensors that have a row for each class."""
    with shapes_alone():
        one, more = (
            replace(config, **{config.counted: getattr(config, config.counted) + extra}).build().state_dict()
            for extra in (0, 1)
        )
    return {key for key in one.keys() & more.keys() if one[key].shape != more[key].shape}


def _rebuilt(
    start: Checkpoint, wanted: Config, different: set[str], fresh: set[str], kept: list[int | None] | None, name: object
) -> tuple[Model, Loaded]:
    """The model of the wanted config with all weights that fit, and where each is from."""
    config, state = start.model.config, start.model.state_dict()
    model = _with_its_own_tables(config, wanted, different)
    rows, known = set[str](), 0
    if wanted.labelled and config.labelled and (kept is not None or config.counted in different):
        rows = _of_classes(config)
    if kept is not None and config.labels is not None:
        known = len(LABELS[config.labels].names(start.labels))
    filled: dict[str, Tensor] = {}
    taken, resized, new = list[str](), list[str](), list[str]()
    misfit = f"the weights of {name} do not fit {_changed(wanted, different)}"
    for key, want in model.state_dict().items():
        have, value = state.get(key), None
        if have is not None and key in rows:
            value = _rows(have, want, known, kept)
            (new if value is None else resized).append(key)
        elif have is not None and have.shape == want.shape:
            value = have
            taken.append(key)
        elif have is not None and "channels" in different and _is_first(have, want, config, wanted):
            value = other_channels(have, want.shape[1])
            resized.append(key)
        elif fresh or (config.counted in different and key.startswith(model.replaceable)):
            new.append(key)
        else:
            raise ValueError(f"{misfit}: '{key}' differs")
        if value is not None:
            filled[key] = value
    left_out = sorted(state.keys() - model.state_dict().keys())
    if not fresh and (odd := [key for key in left_out if not key.startswith(model.replaceable)]):
        raise ValueError(f"{misfit}: '{odd[0]}' differs")
    model.load_state_dict(filled, strict=False)
    return model, Loaded(tuple(taken), tuple(resized), tuple(new), tuple(left_out))


def _with_its_own_tables(config: Config, wanted: Config, different: set[str]) -> Model:
    """The new model, untrained. Its `image` stays the old one where weights depend on it: they are resized at use."""
    model = wanted.build()
    if "image" in different:
        same = replace(wanted, image=config.image)  # pyright: ignore
        with shapes_alone():
            shapes = {key: tensor.shape for key, tensor in same.build().state_dict().items()}
        if shapes != {key: tensor.shape for key, tensor in model.state_dict().items()}:
            model = same.build()
    assert isinstance(model, Model)
    return model


def _rows(have: Tensor, want: Tensor, number: int, kept: list[int | None] | None) -> Tensor | None:
    """The rows of known classes, and those behind the classes (no object, blank, no class), in the new tensor's
    others; None if no class is known."""
    if kept is None or have.shape[1:] != want.shape[1:] or not any(row is not None for row in kept):
        return None
    value = want.clone()
    for index, row in enumerate(kept):
        if row is not None:
            value[index] = have[row]
    value[len(kept) :] = have[number:]
    return value


def _is_first(have: Tensor, want: Tensor, old: Config, new: Config) -> bool:
    """Whether a tensor is that of a convolution of the input's channels."""
    sizes = (getattr(old, "channels", None), getattr(new, "channels", None))
    rest = have.ndim > 2 and have.shape[:1] + have.shape[2:] == want.shape[:1] + want.shape[2:]
    return rest and (have.shape[1], want.shape[1]) == sizes


def other_channels(weight: Tensor, channels: int) -> Tensor:
    """The weights of a convolution for another number of input channels, which gives the same for images whose
    channels are all alike: summed for one channel, else repeated in turn and scaled."""
    if channels == 1:
        return weight.sum(1, keepdim=True)
    given = weight.shape[1]
    repeated = weight[:, [index % given for index in range(channels)]]
    total, now = weight.sum(1, keepdim=True), repeated.sum(1, keepdim=True)
    if channels % given == 0:
        return repeated * (given / channels)
    return repeated + (total - now) / channels


def _changed(config: Config, different: set[str]) -> str:
    """The fields that changed, as an error names them."""
    return ", ".join(f"{name}={config.described(name)}" for name in sorted(different)) or "its labels"


def _prepared(preprocess: Preprocess, changes: Mapping[str, Any]) -> Preprocess | None:
    """The preprocessing for another size or number of channels; None for channels that no image file has."""
    given: dict[str, Any] = {}
    names = {each.name for each in fields(preprocess)}
    if "image" in changes and "size" in names:
        given["size"] = changes["image"]
    channels = changes.get("channels")
    if channels is not None and isinstance(preprocess, PixelPreprocess) and channels != preprocess.channels:
        if channels not in (1, 3):
            return None
        given["channels"] = channels
        for name in ("mean", "std"):
            old = getattr(preprocess, name)
            given[name] = (sum(old) / len(old),) * channels
    try:
        return replace(preprocess, **given)
    except ValueError as error:
        raise ValueError(f"the preprocessing does not allow this: {error}") from None

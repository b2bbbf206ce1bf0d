"""From a model to a checkpoint's folder: written aside, loaded and probed, and only then renamed into place."""

import json
import os
import shutil
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import zoo
from zoo.aside import aside
from zoo.config import Config
from zoo.inputs import Preprocess
from zoo.layer import copied
from zoo.models import PRESETS, family_of
from zoo.models.base import Model, count_parameters
from zoo.outputs import LABELS
from zoo.outputs.tokens import Tokenizer
from zoo.tensors import not_finite
from zoo.text import reason, unknown
from zoo.weights.card import model_card
from zoo.weights.figures import Figure, checked_figures
from zoo.weights.files import FILES, TENSORS, CheckpointError, record, sync_folder
from zoo.weights.format import ABOUT, FORMAT, check_about, check_fit, write_preprocess
from zoo.weights.names import previous_of
from zoo.weights.origin import still_true
from zoo.weights.probe import cost_of, inputs_for, outputs_of, pack
from zoo.weights.read import read_checkpoint

PICTURE = "gallery.png"  # of a checkpoint in checkpoints/, drawn by scripts/tables; it is kept


def save_model(
    model: nn.Module,
    folder: str | os.PathLike[str],
    *,
    preset: str | None = None,
    preprocess: Preprocess | None = None,
    labels: Sequence[str] | Tokenizer | None = None,
    source: str | None = None,
    card: str | None = None,
    license: str | None = None,
    datasets: Sequence[str] | None = None,
    figures: Sequence[Figure] | None = None,
    base: Mapping[str, str | None] | None = None,
) -> Path:
    """Writes a checkpoint folder: README.md, config.json, model.safetensors and probe.safetensors.

    The folder is written aside, loaded again and probed, and only then renamed into place; an existing
    checkpoint is replaced completely or not at all. The model itself is not touched. Weights keep their dtype. A
    warning names a preprocess or labels that are missing.

    What is None is taken from the checkpoint that the model was read from, if it was. Figures hold only for what was
    measured: if a weight or the preprocessing has changed since, as by training, `source`, `card` and `figures` are not
    taken, and `base` is that checkpoint. `zoo.fuse` counts as no change.

    Args:
        model: a model of the zoo, fused or not, compiled or not, in float32, float16 or bfloat16.
        folder: where to write; an existing checkpoint is replaced.
        preset: the preset that the model was made from.
        preprocess: how a raw input, such as an image, becomes the model's; the probe then starts from a raw one.
        labels: what the outputs mean: one name a class, or the tokenizer of a speech model.
        source: where the weights come from: a command, an address.
        card: what the model is, in Markdown; otherwise a plain sentence.
        license: of the weights, by its name on the Hub; otherwise unknown.
        datasets: the data that it was trained on.
        figures: what was measured: mappings with the fields of `zoo.weights.Figure`.
        base: the model that this one was made from: `address`, `commit` and `layout` (the library of its files).

    Returns:
        The folder, absolute.

    Raises:
        ValueError: an argument does not fit the model, the model's config does not describe it, its output is not
            finite, or the folder holds something other than a checkpoint.
        OSError: the folder could not be written; one line with the reason and the fate of the previous one.
    """
    target = Path(folder).expanduser().resolve()
    model = getattr(model, "_orig_mod", model)  # the module inside torch.compile
    family = family_of(model)
    if family is None or not isinstance(model, Model):
        raise ValueError(f"save_model needs a model of the zoo, got a {type(model).__name__}; unwrap it first")
    for name, module in model.named_modules():
        if hasattr(module, "_orig_mod"):
            raise ValueError(f"'{name}' is compiled on its own; put {name}._orig_mod in its place before saving")
    preset, preprocess = preset or model.preset, preprocess or model.preprocess
    labels = model.labels if labels is None else labels
    given = {"source": source, "card": card, "license": license, "datasets": datasets, "figures": figures, "base": base}
    if preset is not None and not (isinstance(preset, str) and preset in PRESETS):
        raise ValueError(unknown("preset", str(preset), PRESETS))
    config = model.config
    check_fit(config, preprocess, labels)
    if any(tensor.is_meta for tensor in model.state_dict().values() if isinstance(tensor, Tensor)):
        raise ValueError("the model is on the meta device and has no weights to save")
    twin = copied(model).cpu().eval()
    twin._compiled_call_impl = None  # of model.compile(), which would compile for a single input
    tensors = twin.state_dict()
    if odd := [name for name, tensor in tensors.items() if not isinstance(tensor, Tensor) or tensor.is_quantized]:
        raise ValueError(
            f"'{odd[0]}' is quantized, which checkpoints do not support; save the model before quantizing it"
        )
    said = {**ABOUT, **still_true(model, twin, preprocess)}
    said |= {name: value for name, value in given.items() if value is not None}
    check_about(said)
    said |= {"datasets": [*said["datasets"]], "figures": checked_figures(said["figures"])}
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    if name := not_finite(tensors):  # as values beyond 65,504 in float16
        raise ValueError(f"'{name}' is NaN or infinite, so the model is not saved to {target}")
    floats = [tensor.dtype for tensor in tensors.values() if tensor.is_floating_point()]
    inputs = inputs_for(config, preprocess)
    outputs = outputs_of(twin.float(), preprocess, inputs)
    if not all(bool(output.isfinite().all()) for output in outputs.values()):
        raise ValueError(f"the model's output is NaN or infinite, so it is not saved to {target}")
    written = {
        "format": FORMAT,
        "zoo": zoo.__version__,
        "family": family,
        "preset": preset,
        "model": asdict(config),
        "preprocess": None if preprocess is None else write_preprocess(config, preprocess),
        "labels": None if labels is None or config.labels is None else LABELS[config.labels].write(labels),
        "fused": model.fusion is not None,
        "parameters": count_parameters(model),
        "cost": cost_of(twin, preprocess, inputs),
        "dtype": str(max(floats, key=floats.count, default=torch.float32)).removeprefix("torch."),
        **{name: said[name] for name in ABOUT},
    }
    _write(target, written, config, preprocess, {TENSORS[0]: tensors, TENSORS[1]: pack(inputs, outputs)})
    if lacking := _lacking(config, preprocess, labels):
        warnings.warn(f"{target.name} was saved without {lacking} to save_model", stacklevel=2)
    return target


def _lacking(config: Config, preprocess: Preprocess | None, labels: object) -> str:
    """What is missing for predictions from raw inputs, and what follows; empty if nothing is."""
    if config.labels is None or not config.labelled:
        return ""
    missing = {
        "preprocess": (preprocess is None and config.input is not None, "it takes no files, only prepared inputs"),
        "labels": (labels is None, "its outputs have no names"),
    }
    found = {name: result for name, (absent, result) in missing.items() if absent}
    them = "it" if [*found] == ["preprocess"] else "them"
    return f"{' and '.join(found)}, so {' and '.join(found.values())}; give {them}" if found else ""


def _write(
    target: Path,
    written: dict[str, Any],
    config: Config,
    preprocess: Preprocess | None,
    tensors: Mapping[str, dict[str, Tensor]],
) -> None:
    """Writes all files aside, loads and probes them, and renames them to target."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    exists = target.exists() or previous_of(target).exists()
    fate = "the previous one is untouched" if exists else "nothing was left behind"
    made = target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        check_target(target)
        with aside(target.parent) as folder:
            made = folder / target.name
            made.mkdir()
            for name, content in tensors.items():
                save_file(content, made / name, metadata={"format": "pt"})
            written = written | {"files": {name: record(made / name) for name in tensors}}
            texts = {
                "config.json": json.dumps(written, indent=2, ensure_ascii=False, allow_nan=False) + "\n",
                "README.md": model_card(config, written, preprocess, target.name),
            }
            for name, text in texts.items():
                # A surrogate from the name of a file becomes \\udcXX, as JSON spells it.
                (made / name).write_text(text, encoding="utf-8", errors="backslashreplace")
            for name in tensors:
                shutil.copymode(made / "config.json", made / name)  # safetensors lets only the owner read
            for name in FILES:
                with open(made / name, "rb+") as file:
                    os.fsync(file.fileno())
            if (target / PICTURE).is_file():
                shutil.copy2(target / PICTURE, made / PICTURE)
            sync_folder(made)
            read_checkpoint(made, check=True)
            _swap(made, target)
    except CheckpointError as error:
        why = str(error).replace(str(made), str(target))
        raise ValueError(f"this model cannot be saved, its config does not describe it: {why}; {fate}") from error
    except (OSError, SafetensorError) as error:
        raise OSError(f"cannot write the checkpoint {target}: {reason(error)}; {fate}") from error


def check_target(target: Path) -> None:
    """ValueError if saving there would replace anything but a checkpoint."""
    if target.exists() and not target.is_dir():
        raise ValueError(f"{target} is a file, so no checkpoint can be written there")
    found = {entry.name for entry in target.iterdir()} if target.exists() else set()
    if "config.json" in found:
        found.discard(PICTURE)
    if not found <= set(FILES) or found == {"README.md"}:
        other = min(found - set(FILES), default="README.md")
        raise ValueError(f"{target} holds {other}, so it is not replaced by a checkpoint; choose another folder")


def _swap(made: Path, target: Path) -> None:
    previous = previous_of(target)
    if target.exists():
        shutil.rmtree(previous, ignore_errors=True)
        os.replace(target, previous)
    try:
        os.replace(made, target)
    except BaseException:
        if previous.exists() and not target.exists():
            os.replace(previous, target)
        raise
    sync_folder(target.parent)
    shutil.rmtree(previous, ignore_errors=True)

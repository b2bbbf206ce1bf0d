"""Checkpoints: folders that hold a model's config, its weights, a card, and a probe that shows whether the model still
computes the same. Only JSON and safetensors are read; no code from a file is ever run."""

import contextlib
import copy
import json
import os
import re
import secrets
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import zoo
from zoo.audio import AudioPreprocess
from zoo.card import model_card, one_line
from zoo.config import Config
from zoo.fusion import fuse
from zoo.layer import advance, count_parameters
from zoo.models import FAMILIES, PRESETS
from zoo.preprocess import ImagePreprocess
from zoo.tokens import Tokenizer, tokenizer_from_dict

Preprocess = ImagePreprocess | AudioPreprocess

FILES = ("README.md", "config.json", "model.safetensors", "probe.safetensors")
PICKLES = (".pt", ".pth", ".bin", ".ckpt", ".pkl", ".pickle")
FLOATS = (torch.float32, torch.float16, torch.bfloat16)
TOLERANCE = 1e-4  # how far a probe's output may be off, as a share of the largest output
LEFTOVER = 24 * 3600.0  # seconds after which a folder that a killed save left behind is removed

FORMAT = 2
KINDS = {"format": int, "zoo": str, "family": str, "preset": str | None, "model": dict, "preprocess": dict | None}
KINDS |= {"labels": list | None, "tokenizer": dict | None, "fused": bool, "source": str}
# From a format to the next: takes a whole config.json of that format, returns it in the format one higher.
MIGRATIONS: dict[int, Callable[[dict[str, Any]], dict[str, Any]]] = {
    1: lambda written: written | {"format": 2, "tokenizer": None},
}


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; one line that names the file and says why."""


class Checkpoint(NamedTuple):
    """What `load_checkpoint` gives: the model in eval mode, and what its folder says about it."""

    model: nn.Module
    preprocess: Preprocess | None
    labels: tuple[str, ...] | Tokenizer | None  # what the outputs mean: a name a class, or the tokens
    config: dict[str, Any]  # config.json, in the newest format


def save_model(
    model: nn.Module,
    folder: str | os.PathLike[str],
    *,
    preset: str | None = None,
    preprocess: Preprocess | None = None,
    labels: Sequence[str] | Tokenizer | None = None,
    source: str = "",
    card: str | None = None,
    license: str = "unknown",
    metrics: Mapping[str, str | float] | None = None,
) -> Path:
    """Writes a checkpoint folder: README.md, config.json, model.safetensors and probe.safetensors.

    The folder is written aside, loaded again and probed, and only then renamed into place; a checkpoint that stood
    there is replaced whole or left whole. The model itself is not touched. Weights keep their kind of number.

    Args:
        model: a model of the zoo, fused or not, unwrapped, in float32, float16 or bfloat16.
        folder: where to write; a checkpoint that is there already is replaced.
        preset: the preset that the model was made from.
        preprocess: how a picture, or a waveform, becomes the model's input; the probe then starts from a raw one.
        labels: one name a class, or the tokenizer of a speech model.
        source: where the weights come from: a command, an address.
        card: what the model is, in Markdown; a plain sentence where None.
        license: of the weights, by its name on the Hub.
        metrics: figures for the card, by name.

    Returns:
        The folder, absolute.

    Raises:
        ValueError: an argument does not fit the model, the model's config does not describe it, its output is not
            finite, or the folder holds something else than a checkpoint.
        OSError: the folder could not be written; one line that says so and what became of the previous one.
    """
    target, config = Path(folder).resolve(), getattr(model, "config", None)
    family = next((name for name, kind in FAMILIES.items() if type(config) is kind), None)
    if family is None or not isinstance(config, Config):
        raise ValueError(f"save_model takes a model of the zoo, not a {type(model).__name__}; unwrap it first")
    if preset is not None and preset not in PRESETS:
        raise ValueError(f"there is no preset '{preset}'; choose from: {', '.join(sorted(PRESETS))}")
    _check_fit(config, preprocess, labels)
    written = {
        "format": FORMAT,
        "zoo": zoo.__version__,
        "family": family,
        "preset": preset,
        "model": asdict(config),
        "preprocess": None if preprocess is None else preprocess.to_dict(),
        "labels": None if labels is None or isinstance(labels, Tokenizer) else list(labels),
        "tokenizer": labels.to_dict() if isinstance(labels, Tokenizer) else None,
        "fused": hasattr(model, "fusion"),
        "source": source,
    }
    figures = {"parameters": f"{count_parameters(model):,}"} | dict(metrics or {})
    texts = {
        "config.json": json.dumps(written, indent=2, ensure_ascii=False, allow_nan=False) + "\n",
        "README.md": model_card(written, target.name, card, license, figures),
    }
    twin = copy.deepcopy(model).cpu().eval()
    tensors = {name: tensor.contiguous() for name, tensor in twin.state_dict().items()}
    probe = {"input": _probe_input(config, preprocess)}
    probe["output"] = _run(twin.float(), preprocess, probe["input"])
    if not bool(probe["output"].isfinite().all()):
        raise ValueError(f"the model's output is not finite, so it is not saved to {target}")
    _write(target, texts, {"model.safetensors": tensors, "probe.safetensors": probe})
    return target


def load_model(name: str | os.PathLike[str], *, check: bool = False) -> nn.Module:
    """The model of a checkpoint, in eval mode and float32 on the CPU. Arguments and errors as in `load_checkpoint`."""
    return load_checkpoint(name, check=check).model


def load_checkpoint(name: str | os.PathLike[str], *, check: bool = False) -> Checkpoint:
    """Reads a checkpoint: the model in eval mode and float32 on the CPU, its preprocessing, labels and config.json.

    Args:
        name: a folder; or the name of a folder under ./checkpoints; or a Hub name "owner/name" or
            "owner/name@revision".
        check: run the probe, and raise where the output is off by more than `TOLERANCE` of the largest output.

    Raises:
        CheckpointError: there is no such checkpoint; a file of it is missing, truncated, a pickle, or does not fit the
            others; it was written by a newer zoo; or its probe fails.
    """
    folder = _locate(name)
    path = _file(folder, "config.json")
    written = _read_config(path)
    tensors = _read_tensors(_file(folder, "model.safetensors"))
    preprocess = None
    try:
        config = FAMILIES[written["family"]](**written["model"])
        labels = None if written["labels"] is None else tuple(written["labels"])
        if written["tokenizer"] is not None:
            if labels is not None:
                raise ValueError("there are both labels and a tokenizer")
            labels = tokenizer_from_dict(written["tokenizer"])
        if written["preprocess"] is not None:
            kind = AudioPreprocess if hears(config) else ImagePreprocess
            preprocess = kind.from_dict(written["preprocess"])
        _check_fit(config, preprocess, labels)
        model = _build(config, written["fused"], tensors, folder / "model.safetensors")
    except CheckpointError:
        raise
    except Exception as error:  # a config from elsewhere may break a constructor in any way
        raise CheckpointError(f"{path}: {one_line(error)}") from error
    if check:
        _check_probe(_file(folder, "probe.safetensors"), model, preprocess)
    return Checkpoint(model, preprocess, labels, written)


def hears(config: Config) -> bool:
    """Whether a config is that of a speech model."""
    return hasattr(config, "mels")


def _check_fit(config: Config, preprocess: Preprocess | None, labels: Sequence[str] | Tokenizer | None) -> None:
    kind, takes = (AudioPreprocess, "mels") if hears(config) else (ImagePreprocess, "channels")
    if preprocess is not None:
        if not isinstance(preprocess, kind):
            raise ValueError(f"this model takes {kind.__name__}, not {type(preprocess).__name__}")
        if (given := getattr(preprocess, takes)) != (taken := getattr(config, takes)):
            raise ValueError(f"preprocess makes {given} {takes}, but the model takes {taken}")
    if labels is None:
        return
    if isinstance(labels, Tokenizer) != hears(config):
        raise ValueError("labels are the tokenizer of a speech model, and the names of the classes of any other")
    if isinstance(labels, Tokenizer):
        if labels.vocabulary != (wanted := getattr(config, "vocabulary", None)):
            raise ValueError(f"the tokenizer has {labels.vocabulary} tokens with the blank, but the model {wanted}")
        return
    if isinstance(labels, str) or not all(isinstance(label, str) for label in labels):
        raise ValueError("labels must be a list of names")
    if len(labels) != (classes := getattr(config, "classes", None)):
        raise ValueError(f"labels has {len(labels)} names, but the model has {classes} classes")


def _probe_input(config: Config, preprocess: Preprocess | None) -> Tensor:
    """A raw picture, uint8 [H, W, C], larger than the model takes, or a waveform of 1.3 s; without preprocessing
    float32 [1, C, H, W] or [1, 131, mels]."""
    generator = torch.Generator().manual_seed(0)
    if hears(config):
        if preprocess is None:
            return torch.randn(1, 131, config.mels, generator=generator, device="cpu")  # pyright: ignore
        noise = torch.randn(preprocess.rate * 13 // 10, generator=generator, device="cpu")  # pyright: ignore
        return 0.1 * noise * torch.linspace(0, 20, len(noise)).sin()
    if preprocess is None:
        shape = (1, config.channels, config.image, config.image)  # pyright: ignore[reportAttributeAccessIssue]
        return torch.randn(shape, generator=generator, device="cpu")
    assert isinstance(preprocess, ImagePreprocess)
    height, width = preprocess.size * 3 // 2 + 7, preprocess.size * 2 + 3
    shape = (height // 4 + 1, width // 4 + 1, preprocess.channels)
    coarse = torch.randint(256, shape, generator=generator, device="cpu")
    fine = coarse.repeat_interleave(4, 0).repeat_interleave(4, 1)[:height, :width]
    return fine.to(torch.uint8).contiguous()


@torch.no_grad()
def _run(model: nn.Module, preprocess: Preprocess | None, raw: Tensor) -> Tensor:
    with torch.autocast("cpu", enabled=False):
        ready = raw if preprocess is None else preprocess(raw)[None]
        made = model(ready)
        if isinstance(made, Tensor):
            return made
        if callable(getattr(model.head, "joint", None)):  # an RNN-T head has its say too
            return model.head(made[0], torch.zeros(1, 2, dtype=torch.long))  # pyright: ignore
        return made[0]


def _write(target: Path, texts: dict[str, str], tensors: dict[str, dict[str, Tensor]]) -> None:
    """Writes all files aside, loads and probes what was written, and puts it in the place of target."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    aside = target.parent / f".{target.name}.{secrets.token_hex(4)}.new"
    stands = target.exists() or _previous(target).exists()
    fate = "the previous one is untouched" if stands else "nothing was left behind"
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _clear(target)
        aside.mkdir()
        for name, text in texts.items():
            (aside / name).write_text(text, encoding="utf-8")
        for name, content in tensors.items():
            save_file(content, aside / name, metadata={"format": "pt"})
            shutil.copymode(aside / "config.json", aside / name)  # safetensors lets only the owner read
        for name in FILES:
            with open(aside / name, "rb+") as file:
                os.fsync(file.fileno())
        _sync_folder(aside)
        load_checkpoint(aside, check=True)
        _swap(aside, target)
    except CheckpointError as error:
        reason = str(error).replace(str(aside), str(target))
        raise ValueError(f"this model cannot be saved, its config does not describe it: {reason}; {fate}") from error
    except (OSError, SafetensorError) as error:
        raise OSError(f"cannot write the checkpoint {target}: {one_line(error)}; {fate}") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _previous(target: Path) -> Path:
    """Where a checkpoint stands for the moment in which its successor takes its place."""
    return target.parent / f".{target.name}.previous"


def _clear(target: Path) -> None:
    """Refuses to replace what is no checkpoint, and removes what saves that were killed long ago left behind."""
    if target.exists() and not target.is_dir():
        raise ValueError(f"{target} is a file, so no checkpoint can be written there")
    found = {entry.name for entry in target.iterdir()} if target.exists() else set()
    if not found <= set(FILES) or found == {"README.md"}:
        other = min(found - set(FILES), default="README.md")
        raise ValueError(f"{target} holds {other}, so it is not replaced by a checkpoint; choose another folder")
    for entry in target.parent.iterdir():
        if entry.name.startswith(f".{target.name}.") and entry.suffix == ".new":
            with contextlib.suppress(OSError):  # another save may be faster
                if time.time() - entry.stat().st_mtime > LEFTOVER:
                    shutil.rmtree(entry)


def _swap(aside: Path, target: Path) -> None:
    previous = _previous(target)
    if target.exists():
        shutil.rmtree(previous, ignore_errors=True)
        os.replace(target, previous)
    try:
        os.replace(aside, target)
    except BaseException:
        if previous.exists() and not target.exists():
            os.replace(previous, target)
        raise
    _sync_folder(target.parent)
    shutil.rmtree(previous, ignore_errors=True)


def _sync_folder(folder: Path) -> None:
    with contextlib.suppress(OSError):  # not every system can open or sync a folder
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _locate(name: str | os.PathLike[str]) -> Path:
    for folder in (Path(name), Path("checkpoints", name)):
        if folder.is_dir():
            return folder
        if (previous := _previous(folder.resolve())).is_dir():  # a save was killed between its two renames
            return previous
    if str(name).lower().endswith(".nemo"):
        raise CheckpointError(
            f"{name} is NeMo's; zoo.convert.from_nemo reads such files, and zoo.save_model keeps them"
        )
    if Path(name).exists():
        raise CheckpointError(f"{name} is a file; a checkpoint is a folder that holds {' and '.join(FILES[1:3])}")
    repository, _, revision = str(name).partition("@")
    if isinstance(name, str) and re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", repository):
        return _download(repository, revision or None)
    where = "neither a folder, nor one under checkpoints, nor OWNER/NAME on the Hub"
    raise CheckpointError(f"there is no checkpoint {str(name)!r}: it is {where}")


def _download(repository: str, revision: str | None) -> Path:
    import huggingface_hub

    try:
        return Path(huggingface_hub.snapshot_download(repository, revision=revision, allow_patterns=list(FILES)))
    except Exception as error:  # the client raises its own errors, those of its network library, and the system's
        at = f" at '{revision}'" if revision else ""
        reason = one_line(error)
        raise CheckpointError(f"no folder {repository} here, and the Hub does not give it{at}: {reason}") from error


def _file(folder: Path, name: str) -> Path:
    path = folder / name
    if path.is_file():
        return path
    if pickles := sorted(entry.name for entry in folder.iterdir() if entry.suffix.lower() in PICKLES):
        raise CheckpointError(f"{folder} holds {pickles[0]} and no {name}; only safetensors are read, never a pickle")
    raise CheckpointError(f"{folder} has no {name}")


def _read_config(path: Path) -> dict[str, Any]:
    try:
        written = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON: {one_line(error)}") from error
    if not isinstance(written, dict) or type(written.get("format")) is not int:
        raise CheckpointError(f"{path} is no config of a checkpoint: it has no whole number as format")
    writer = f"zoo {written.get('zoo')}"
    if written["format"] > FORMAT:
        news = f"format {written['format']} of {writer}; zoo {zoo.__version__} reads up to {FORMAT}: upgrade zoo"
        raise CheckpointError(f"{path} has {one_line(news)}")
    while written["format"] < FORMAT:
        if written["format"] not in MIGRATIONS:
            raise CheckpointError(f"{path} has format {written['format']}, which zoo {zoo.__version__} does not know")
        written = MIGRATIONS[written["format"]](written)
    if odd := sorted(KINDS.keys() ^ written.keys()):
        verb = "lacks" if odd[0] in KINDS else "has an unknown"
        raise CheckpointError(f"{path} {verb} field {odd[0]!r}")
    if wrong := [key for key, kind in KINDS.items() if not isinstance(written[key], kind)]:
        raise CheckpointError(f"{path}: {wrong[0]} has a value of the wrong kind, {type(written[wrong[0]]).__name__}")
    if written["family"] not in FAMILIES:
        raise CheckpointError(f"{path}: there is no family {written['family']!r}; zoo has: {', '.join(FAMILIES)}")
    known = {field.name for field in fields(FAMILIES[written["family"]])}
    if unknown := [field for field in written["model"] if field not in known]:
        age = f"{one_line(writer)} wrote the model field {unknown[0]!r}, which zoo {zoo.__version__} does not know"
        raise CheckpointError(f"{path}: {age}")
    return written


def _read_tensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError, KeyError, RuntimeError) as error:
        kind = "is no whole safetensors file"
        with contextlib.suppress(OSError), open(path, "rb") as file:
            if file.read(2).startswith((b"\x80", b"PK")):
                kind = "seems to be a pickle, which is never read"
        raise CheckpointError(f"{path} {kind}: {one_line(error)}") from error


def _build(config: Config, fused: bool, tensors: dict[str, Tensor], path: Path) -> nn.Module:
    """The model with the given weights. The caller's random numbers stay as they were."""
    with torch.random.fork_rng(devices=[]):
        if not fused:
            with torch.device("meta"):  # costs nothing, and finds misfits before memory is taken
                model = config.build()
            kinds = _match(model, tensors, path)
            if {name for name, _ in model.named_buffers()} <= kinds.keys():
                own = {name: tensors[name].to(kind, copy=True) for name, kind in kinds.items()}
                model.load_state_dict(own, assign=True)
                return model.eval()
        with torch.device("cpu"):  # buffers outside the state dict have to be made
            model = config.build()
            if fused:
                advance(model, 1.0)
                model = fuse(model)
        _match(model, tensors, path)
        model.load_state_dict(tensors)
        return model.eval()


def _match(model: nn.Module, tensors: dict[str, Tensor], path: Path) -> dict[str, torch.dtype]:
    """The kinds of the model's tensors by name; CheckpointError where those of the file have others."""
    wanted = model.state_dict()
    wrong = [f"{name!r} is missing" for name in wanted.keys() - tensors.keys()]
    wrong += [f"{name!r} is unknown" for name in tensors.keys() - wanted.keys()]
    for name in wanted.keys() & tensors.keys():
        got, want = tensors[name], wanted[name]
        if got.shape != want.shape:
            wrong.append(f"{name!r} is {list(got.shape)}, not {list(want.shape)}")
        elif got.dtype != want.dtype and not (want.is_floating_point() and got.dtype in FLOATS):
            wrong.append(f"{name!r} is {got.dtype}, not {want.dtype}")
    if wrong:
        more = f"; and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise CheckpointError(f"{path} does not fit its config.json: {'; '.join(sorted(wrong)[:3])}{more}")
    return {name: tensor.dtype for name, tensor in wanted.items()}


def _check_probe(path: Path, model: nn.Module, preprocess: Preprocess | None) -> None:
    probe = _read_tensors(path)
    if probe.keys() != {"input", "output"}:
        raise CheckpointError(f"{path} is no probe: it has to hold input and output")
    try:
        got = _run(model, preprocess, probe["input"])
    except (ValueError, RuntimeError) as error:
        raise CheckpointError(f"{path}: the model cannot take the probe's input: {one_line(error)}") from error
    if got.shape != probe["output"].shape:
        raise CheckpointError(f"{path}: the output is {list(got.shape)}, not {list(probe['output'].shape)}")
    largest = probe["output"].abs().max()
    error = (got - probe["output"]).abs().max()
    if not error <= TOLERANCE * largest:  # true for what is no number, too
        share = f"{(error / largest).item():.3g} of the largest output, and {TOLERANCE:g} is allowed"
        raise CheckpointError(f"{path}: the output is off by {share}; weights, preprocessing or code have changed")

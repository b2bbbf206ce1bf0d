"""Facts about the code for zoo/facts.json: the texts of `zoo list`, `zoo info` and help, without PyTorch."""

import inspect
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, fields
from typing import Any
from unittest.mock import patch

import torch
from docstring_parser import parse as parse_docstring
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from zoo.__main__ import TASKS, TRAINING, target
from zoo.channels import CHANNELS
from zoo.choices import PAPERS, PLACEMENTS
from zoo.config import Config, field_names
from zoo.ffns import FFNS
from zoo.heads import HEADS, SPEECH_HEADS
from zoo.layer import Context, Layer, Place, advance
from zoo.mixers import CONVS, CROSSES, MIXERS
from zoo.models import FAMILIES, PRESETS, describe
from zoo.modulations import MODULATIONS
from zoo.norms import NORMS, Norm
from zoo.positions import POSITIONS
from zoo.spec import options_of
from zoo.stems import REDUCTIONS, STEMS, SUBSAMPLINGS
from zoo.tasks import cli
from zoo.text import readable

DIM, HEADS_OF = 32, 2
# Each kind of choice: its description, its table, and the arguments of a row before its place.
TABLES: dict[str, tuple[str, Mapping[str, type], tuple[int, ...]]] = {
    "mixer": ("token mixers", MIXERS, (DIM, HEADS_OF)),
    "cross": ("attention of a decoder to its memory", CROSSES, (DIM, HEADS_OF)),
    "conv": ("convolution branches, for a layout with `conv`", CONVS, (DIM,)),
    "norm": ("normalizations, for `norm` and `conv_norm`", NORMS, (DIM,)),
    "channel": ("channel attention", CHANNELS, (DIM,)),
    "position": ("position encodings", POSITIONS, (DIM, HEADS_OF, DIM // HEADS_OF)),
    "ffn": ("feed-forward layers", FFNS, (DIM,)),
    "modulation": ("ways in which a condition changes a block", MODULATIONS, (DIM,)),
    "stem": ("from an image to tokens, in models with stages", STEMS, ()),
    "reduction": ("from a stage to the next", REDUCTIONS, ()),
    "subsampling": ("from speech features to tokens", SUBSAMPLINGS, ()),
    "head (images)": ("from the tokens of the last stage to logits", HEADS, ()),
    "head (speech)": ("from tokens to logits over a vocabulary", SPEECH_HEADS, ()),
}
USUAL = {"eps", "momentum", "bias"}  # options that are as in PyTorch
TIMES = 4  # factor of tokens at which the cost of a mixer is compared


def dumped(found: dict[str, Any]) -> str:
    """The text of facts.json."""
    return json.dumps(found, indent=1, ensure_ascii=False) + "\n"


def facts() -> dict[str, Any]:
    tables: dict[str, Any] = {}
    for kind, (about, rows, arguments) in TABLES.items():
        tables[kind] = {"about": about, "rows": {name: row_facts(kind, row, arguments) for name, row in rows.items()}}
        if kind == "ffn":
            tables["placement"] = {"about": "where the norms of a block are", "rows": dict(placements())}
    return {
        "tables": tables,
        "families": {name: family_facts(kind) for name, kind in FAMILIES.items()},
        "models": {name: describe(name) | {"input": input_of(config)} for name, config in PRESETS.items()},
        "tasks": {task: task_facts(task) for task in TASKS},
    }


# Choices


def row_facts(kind: str, row: type, arguments: tuple[int, ...]) -> dict[str, Any]:
    doc = inspect.getdoc(row) or ""
    found = {"summary": summary(doc), "doc": doc, "papers": papers_in(doc.split("\n\n")[0]), "options": options_of(row)}
    for base in row.__mro__[1:]:  # whose docstring explains the options that rows share
        shared = inspect.cleandoc(base.__doc__ or "").split("\n\n")[-1]
        if any(not named(option, found["doc"]) and named(option, shared) for option in {*options_of(row)} - USUAL):
            found["doc"] += f"\n\n{shared}"
    if not issubclass(row, Layer):
        return found
    found |= {"reads": sorted(row.reads_of() - {"mask"}), "mixes": row.mixes, "axes": list(row.dimensions)}
    if kind in ("mixer", "cross", "conv", "ffn", "norm"):
        found["folds"] = folds(row(*arguments, *([] if kind == "ffn" else [place_of(row, 64)])))
    if kind == "mixer":
        least, most = (operations(row, arguments, number) for number in (1024, 1024 * TIMES))
        found["cost"] = "quadratic" if most > 2 * TIMES * least else "linear"
        found["cost"] += ", memory too" * row.quadratic
        if not row.quadratic and 1 in row.dimensions and row(*arguments, Place(1, (64,))).quadratic:
            found["cost"] += "; along time with a mask quadratic, memory too"
    return found


def named(word: str, text: str) -> bool:
    return re.search(rf"\b{word}\b", text) is not None


def papers_in(text: str) -> list[str]:
    return list(dict.fromkeys(re.findall(r"arXiv:(\d{4}\.\d{4,5})", text)))


def summary(doc: str) -> str:
    """The first sentence of a docstring without its references."""
    text = " ".join(doc.split("\n\n")[0].split())
    text = re.sub(r" ?\([^()]*(?:arXiv:|\d{4}\b)[^()]*\)", "", text)
    return re.split(r"(?<=[a-z)\]`])\. ", text)[0].rstrip(".")


def place_of(row: type[Layer], tokens: int) -> Place:
    axes = row.dimensions[-1]
    return Place(axes, (tokens,) if axes == 1 else (tokens // 32, 32))


def operations(row: type[Layer], arguments: tuple[int, ...], tokens: int) -> int:
    """Floating-point operations of the matrix products and convolutions of a row; nothing is computed."""
    place = place_of(row, tokens)
    # With gradients scores are computed at once; in chunks, each of which is traced, it takes long.
    with FakeTensorMode(allow_non_fake_inputs=True), sdpa_kernel(SDPBackend.MATH):
        layer, x = row(*arguments, place), torch.randn(1, tokens, DIM)
        with FlopCounterMode(display=False) as counter:
            layer(x, Context(grid=place.grid))
    return counter.get_total_flops()


def folds(layer: nn.Module) -> str:
    """The parts that zoo.fuse can fold into a layer, or of a norm into its neighbours."""
    if isinstance(layer, Norm):
        advance(layer, 1.0)
        able = layer.eval().affine() is not None
        return "folds: at inference it is an affine map" if able else "does not fold: it is not an affine map"
    assert isinstance(layer, Layer)
    ways = [way for way, linears in (("before", layer.inputs()), ("after", layer.outputs())) if linears_in(linears)]
    return f"an affine norm {' or '.join(ways)} it folds into its linears" if ways else "no norm folds into it"


def linears_in(found: list[nn.Linear] | str) -> bool:
    return not isinstance(found, str)


SITES = {
    ("before", "norm"): "a norm in front of the branch",
    ("after", "norm"): "a norm on the output of the branch",
    ("total", "norm"): "a norm after the residual sum",
    ("inner", "norm"): "a norm in front of the output linear",
    ("query", "norm"): "a norm on queries",
    ("key", "norm"): "a norm on keys",
    ("value", "norm"): "a norm on values",
    ("before", "affine"): "a learned scale and shift in front of the branch",
    ("inner", "heads"): "a learned scale of each head",
    ("stream", "scale"): "a learned scale of the residual stream",
    ("stream", "before"): "the branch is added to its normalized input",
}


def placements() -> Iterator[tuple[str, dict[str, Any]]]:
    for name, parts in PLACEMENTS.items():
        mixing, ffn = (", ".join(SITES[site] for site in part.items()) for part in parts)
        text = mixing if mixing == ffn else f"{mixing}; in feed-forward branches {ffn}"
        text = text[0].upper() + text[1:]
        yield name, {"summary": text, "doc": f"{text}.", "papers": [PAPERS[name]], "options": {}}


# Models


def input_of(config: Config) -> str:
    """The input of a model in a few words."""
    if config.input in ("image", "boxes"):
        return f"{config.image} px"  # pyright: ignore[reportAttributeAccessIssue]
    if config.input == "audio":
        return f"{config.mels} mels, {config.stride} frames/token"  # pyright: ignore[reportAttributeAccessIssue]
    return ""


def family_facts(kind: type[Config]) -> dict[str, Any]:
    """The fields of a family's config: default, None where it is required, and meaning."""
    said = {
        parameter.arg_name: " ".join((parameter.description or "").split())
        for each in reversed(kind.__mro__)
        for parameter in parse_docstring(each.__doc__ or "").params
    }
    usual = {each.name: None if each.default is MISSING else readable(each.default) for each in fields(kind)}
    return {
        "task": kind.task,
        "axes": getattr(kind, "axes", None),
        "fields": {name: {"default": usual[name], "about": said.get(name, "")} for name in field_names(kind)},
    }


# Tasks


class Parsed(Exception):
    """Carries LightningCLI's parsers out of it."""


def stop(command: Any, *_: Any) -> None:
    raise Parsed(command._subcommand_parsers)


def task_facts(task: str) -> dict[str, Any]:
    """A task's description, verbs, and the options of those that LightningCLI parses: default and first sentence."""
    model, data, others = TASKS[task]
    module = inspect.getmodule(target(model))
    about = (module.__doc__ or "" if module else "").partition(":")[0]
    try:
        with patch.object(cli.Command, "parse_arguments", stop):
            cli.main(target(model), target(data), task, [TRAINING[0]])
        raise AssertionError("LightningCLI parses nothing")
    except Parsed as found:
        parsers = found.args[0]
    options = {verb: dict(map(option, filter(shown, parsers[verb]._actions))) for verb in TRAINING}
    shared = {name: each for name, each in options[TRAINING[0]].items() if all(name in of for of in options.values())}
    own = {verb: {name: each for name, each in of.items() if name not in shared} for verb, of in options.items()}
    return {"about": about, "verbs": [*TRAINING, *others], "options": shared, "own": own}


def shown(action: Any) -> bool:
    return action.dest != "help" and not action.dest.endswith(".help")


def option(action: Any) -> tuple[str, dict[str, Any]]:
    text = re.split(r"(?<=[a-z)\]`])\.\s", " ".join((action.help or "").split()))[0].rstrip(".")
    default = None if action.default == "==SUPPRESS==" else action.default
    return action.dest, {"default": json.loads(json.dumps(default, default=str)), "about": text}

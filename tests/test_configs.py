"""Each command and variant in the header of a config constructs its task, its data and its trainer.

A header is a title, then labelled lines. `# command:` lists the commands in the order they run; each starts with `zoo`,
and other lines continue the one above. `# variants:`, which is optional, lists flags to add to the last command, from
its second line on; a line that is indented further continues the one above.
"""

import functools
import inspect
import itertools
import re
import shlex
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
import yaml
from lightning.pytorch.trainer.states import TrainerFn
from torch import nn

import zoo
from encoding import cache
from zoo.__main__ import run
from zoo.data.boxes import Boxes
from zoo.data.images import Images
from zoo.data.speech import Speech
from zoo.outputs.label_map import LabelMap
from zoo.tasks.cli import Command

ROOT = Path(__file__).parent.parent
CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))
LABELS = ["command", "hardware", "time", "result"]
# Classes of the data that a file is named after.
HELD = {
    "imagenet": 1000,
    "caltech": 99,
    "clothing10": 10,
    "digits": 10,
    "mnist": 10,
    "coco": 80,
    "bccd": 3,
    "aquarium": 7,
}
OWN = 7  # classes in a user's own folder
PLACEHOLDERS = {"DIR": "data", "N": str(OWN)}
STARTS = {"detect": "rtdetr_micro.blood_cells"}  # a checkpoint to fine-tune, by task
INITIALISERS = ("kaiming_uniform_", "normal_", "ones_", "trunc_normal_", "uniform_", "xavier_uniform_", "zeros_")
HERE = ["--trainer.accelerator=cpu", "--trainer.devices=1"]


def header(path: Path) -> list[tuple[str, list[str]]]:
    """Each label with its text, line by line; further lines keep their indentation."""
    sections: list[tuple[str, list[str]]] = []
    for line in itertools.takewhile(lambda line: line.startswith("#"), path.read_text().splitlines()):
        if found := re.match(rf"# ({'|'.join(LABELS)}|variants):(.*)", line):
            sections.append((found[1], [found[2].strip()]))
        elif sections:
            sections[-1][1].append(line[1:])
    return sections


def commands(path: Path) -> list[str]:
    """The commands that train, without those that make data."""
    joined: list[str] = []
    for line in map(str.strip, dict(header(path)).get("command", [])):
        if line.startswith(("zoo ", "scripts/")) or not joined:
            joined.append(line)
        else:
            joined[-1] += f" {line}"
    return [line for line in joined if not line.startswith("scripts/")]


def variants(path: Path) -> list[str]:
    lines = dict(header(path)).get("variants", [])[1:]
    outer = min((len(line) - len(line.lstrip()) for line in lines), default=0)
    joined: list[str] = []
    for line in lines:
        if line[outer:].startswith("--") or not joined:
            joined.append(line.strip())
        else:
            joined[-1] += f" {line.strip()}"
    return joined


def flags(text: str) -> dict[str, str]:
    """What flags written as `--a.b value` set."""
    names, values = (words := shlex.split(text))[::2], words[1::2]
    assert all(name.startswith("--") for name in names), text
    return {name[2:]: value for name, value in zip(names, values, strict=True)}


@functools.cache
def recipe(path: Path) -> Any:
    return yaml.safe_load(path.read_text())


class Case(NamedTuple):
    path: Path
    before: list[str]
    command: str


CASES = {
    f"{path.parent.name}-{path.stem}" + f"-{number}" * bool(number): Case(path, before, f"{last} {variant}".strip())
    for path in CONFIGS
    for *before, last in [commands(path) or [""]]
    for number, variant in enumerate(["", *variants(path)])
}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_header_has_its_labels_and_ends_with_the_command_of_its_file(path: Path):
    sections = header(path)
    given = [label for label, _ in sections]
    assert given in (LABELS, [LABELS[0], "variants", *LABELS[1:]])
    assert all("".join(lines).strip() for _, lines in sections)
    verb = f"zoo {path.parent.name} fit --config {path.relative_to(ROOT)}"
    assert commands(path)[-1].startswith(verb)
    assert ("variants" in given) == bool(variants(path))


def test_a_variant_changes_the_recipe_and_writes_to_a_folder_of_its_name():
    chosen = [(path, flags(variant)) for path in CONFIGS for variant in variants(path)]
    assert chosen
    for path, changes in chosen:
        for name, value in changes.items():
            given = recipe(path)
            for part in name.split("."):
                given = given.get(part, {})
            assert given != yaml.safe_load(value), (path.name, name)
        own = {f"model.backbone.{field}": value for field, value in recipe(path)["model"]["backbone"].items()} | changes
        words = [own["model.backbone.name"], own.get("model.backbone.norm"), path.stem.rpartition("_")[2]]
        assert changes["trainer.default_root_dir"] == "runs/" + "_".join(filter(None, words))


def test_no_two_recipes_write_to_the_same_folder():
    folders = defaultdict(set)
    for case in CASES.values():
        for line in (*case.before, case.command):
            given = flags(line.partition(" fit ")[2])
            own = recipe(ROOT / given["config"])["trainer"]["default_root_dir"]
            folders[given.get("trainer.default_root_dir", own)].add(line)
    assert {folder: lines for folder, lines in folders.items() if len(lines) > 1} == {}


# Construction


@pytest.fixture(scope="module")
def parsers() -> dict[type, list[Any]]:
    return {}


@pytest.fixture
def construct(
    parsers: dict[type, list[Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[[str], Command]]:
    """Runs a command line up to where training would start, in an empty folder that has `configs`.

    To save time, a task's parser is made once, new weights are not initialised, and jsonargparse, which asks for its
    caller whenever it parses, is not given the source lines of every frame.
    """
    reached: list[Command] = []
    setup = Command.setup_parser
    parts = ("parser", "_subcommand_parsers", "_subcommand_method_arguments")

    def setup_parser(self: Any, *arguments: Any) -> None:
        if self._model_class not in parsers:
            setup(self, *arguments)
            parsers[self._model_class] = [getattr(self, part) for part in parts]
        for part, value in zip(parts, parsers[self._model_class], strict=True):
            setattr(self, part, value)

    def construct(line: str) -> Command:
        program, *arguments = [PLACEHOLDERS.get(word, word) for word in shlex.split(line)]
        assert program == "zoo"
        start = str(ROOT / "checkpoints" / STARTS.get(arguments[0], "vit_micro.digits"))
        arguments = [start if word == "CHECKPOINT" else word for word in arguments]
        with monkeypatch.context() as patch:
            patch.setattr(Command, "setup_parser", setup_parser)
            patch.setattr(Command, "_run_subcommand", lambda self, verb: reached.append(self))
            patch.setattr(inspect, "stack", lambda: [(sys._getframe(1),), (sys._getframe(2),)])
            for name in INITIALISERS if arguments[0] != "detect" else ():  # a trunk of timm is tried when it is made
                patch.setattr(nn.init, name, lambda tensor, *_, **__: tensor)
            run([*arguments, *HERE])
        return reached[-1]

    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    (tmp_path / "checkpoints").symlink_to(ROOT / "checkpoints")
    (tmp_path / "data").mkdir()
    (tmp_path / "data/data.yaml").touch()  # of YOLO, for dataset auto
    cache(tmp_path / "data/imagenet_latents", {}, side=32)
    monkeypatch.setattr("zoo.tasks.detect.train.load_trunk", lambda *given: None)
    precision = torch.get_float32_matmul_precision()
    yield construct
    torch.set_float32_matmul_precision(precision)


@pytest.mark.daily(6)
@pytest.mark.filterwarnings("ignore:the checkpoint was trained with ImagePreprocess")  # of finetune.yaml
@pytest.mark.parametrize("name", CASES)
def test_a_command_of_a_header_builds_all_that_it_needs(name: str, construct, monkeypatch: pytest.MonkeyPatch):
    case = CASES[name]
    for line in case.before:
        first = construct(line)
        kept = {"preset": first.model.preset, "preprocess": first.datamodule.preprocess}
        model = first.model.model if first.model.start else zoo.create_model(**first.model.backbone)
        zoo.save_model(model, Path(first.trainer.default_root_dir, "best"), **kept)
    built = construct(case.command)
    module, data, trainer = built.model, built.datamodule, built.trainer

    # The data fit the model, as far as that can be known without reading them.
    number = HELD.get(case.path.stem.rpartition("_")[2], OWN)
    if isinstance(data, Boxes):
        names = LabelMap.from_names([f"category {index}" for index in range(number)])
        monkeypatch.setattr(Boxes, "labels", names)
    elif isinstance(data, Images):
        monkeypatch.setattr(Images, "classes", [f"class {index}" for index in range(number)])
    else:
        assert isinstance(data, Speech)
        pieces = data.pieces if data.wanted_tokenizer == "pieces" else module.config.vocabulary - 1
        monkeypatch.setattr(Speech, "tokenizer", SimpleNamespace(vocabulary=pieces + 1))
    steps = 10 * trainer.max_epochs
    module._trainer = SimpleNamespace(
        datamodule=data,
        estimated_stepping_batches=steps,
        num_training_batches=10 * trainer.accumulate_grad_batches,
        accumulate_grad_batches=trainer.accumulate_grad_batches,
        precision="32-true",
        fit_loop=SimpleNamespace(setup_data=lambda: None),
        state=SimpleNamespace(fn=TrainerFn.FITTING),
    )
    module.setup("fit")

    # The learning rate reaches its peak and falls from there, if it is not flat to the end.
    (optimizer,), _ = module.configure_optimizers()
    trained = {id(value) for group in optimizer.param_groups for value in group["params"]}
    assert trained == {id(value) for value in module.model.parameters() if value.requires_grad}
    factors = [module.factor(step, 10, steps) for step in range(steps)]
    assert max(factors) == 1.0
    constant = getattr(module, "flat", None) == 1.0 or module.final_rate == module.rate
    assert factors[-1] == 1.0 if constant else factors[-1] < factors[steps // 2]

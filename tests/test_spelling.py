"""Spelling mistakes in options: what is found before PyTorch is imported, and what passes."""

import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

import zoo
from zoo.__main__ import TRAINING
from zoo.spelling import check, check_files

CONFIGS = sorted((Path(__file__).parent.parent / "configs").rglob("*.yaml"))


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("--model.backbone.mixer=slaa", "--model.backbone.mixer: unknown mixer 'slaa'; did you mean sla"),
        ("--model.backbone.mixer slaa", "unknown mixer 'slaa'"),
        ("--model.backbone.mixer=[softmax,slaa]", "unknown mixer 'slaa'"),
        ("--model.backbone.norm=prepbn(untl=0.5)", "unknown option of prepbn 'untl'; did you mean until?"),
        ("--model.backbone.conv_norm=batchnrom", "unknown norm 'batchnrom'; did you mean batchnorm?"),
        ("--model.backbone.head=transducr", "unknown head 'transducr'; did you mean transducer?"),
        ("--model.backbone.mixer=qqqq", "'qqqq'; choose from: softmax, window, area, "),
        ("--model.backbone.name=vit_tinny", "unknown model 'vit_tinny'; did you mean vit_tiny"),
        ("--model.backbone.name=vit_tiny --model.backbone.depht=3", "unknown field of vit_tiny 'depht'"),
        ("--model.backbone.name=vit_tiny --model.backbone.anything=3", "'anything'; choose from: dim, depth, heads, "),
        (
            "--model.backbone.name=davit_tiny --model.backbone.name=vit_tiny --model.backbone.dpth=3",
            "of vit_tiny 'dpth'",
        ),
        ("--model.backbone.vocabulry=3", "unknown field 'vocabulry'; did you mean vocabulary?"),
        ("--modle.rate=3", "--modle.rate: unknown option; did you mean --model.rate?"),
        ("--modle.backbone.mixer=sla", "did you mean --model.backbone.mixer?"),
        ("--model.rat=3", "did you mean --model.rate"),
        ("--data.bacth 3", "did you mean --data.batch?"),
        ("--trainer.max_epoch=3", "did you mean --trainer.max_epochs"),
        ("--max_epochs=3", "did you mean --trainer.max_epochs?"),
        ("--model.mixer=sla", "did you mean --model.backbone.mixer?"),
        ("--ckpt_pth=x", "did you mean --ckpt_path?"),
        ("--confg x.yaml", "did you mean --config?"),
    ],
)
def test_a_spelling_mistake_is_found(line: str, words: str):
    with pytest.raises(ValueError) as error:
        check("classify", "fit", shlex.split(line))
    assert words in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"modle": {"rate": 1}}, "modle.rate: unknown option; did you mean --model.rate?"),
        ({"data": {"bacth": 1}}, "data.bacth: unknown option"),
        ({"model": {"backbone": {"name": "vit_tiny", "mixer": ["sla", "sofmax"]}}}, "unknown mixer 'sofmax'"),
        ({"model": {"backbone": {"name": "vit_tiny", "patchs": 3}}}, "unknown field of vit_tiny 'patchs'"),
    ],
)
def test_a_spelling_mistake_in_a_config_is_found(change: dict[str, Any], words: str, tmp_path: Path):
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(change))
    for given in (["--config", str(path)], [f"--config={path}"], ["-c", str(path)]):
        with pytest.raises(ValueError) as error:
            check("classify", "fit", given)
        assert str(error.value).startswith(f"{path}: ") and words in str(error.value)


@pytest.mark.parametrize(("task", "axes"), [("classify", 2), ("transcribe", 1)])
def test_the_offered_mixers_work_in_the_models_of_the_task(task: str, axes: int):
    """`grouped` works along time only; a model that is named narrows them likewise."""
    name = {"classify": "vit_tiny", "transcribe": "conformer_ctc_s"}[task]
    for flags in (["--model.backbone.mixer=qqqq"], ["--model.backbone.mixer=qqqq", f"--model.backbone.name={name}"]):
        with pytest.raises(ValueError) as error:
            check(task, "fit", flags)
        offered = str(error.value).partition("choose from: ")[2].split(", ")
        assert offered == [mixer for mixer, row in zoo.MIXERS.items() if axes in row.dimensions]
        assert ("grouped" in offered) == (axes == 1)


def test_configs_that_are_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    Path("configs/classify").mkdir(parents=True)
    for name in ("mine.yaml", "configs/classify/vit_micro_digits.yaml"):
        Path(name).write_text("model: {}")
    Path("broken.yaml").write_text("a: [")
    Path("list.yaml").write_text("[1]")
    for given, words in (
        ("nope.yaml", "--config: file not found: nope.yaml"),
        ("mines.yaml", "--config: file not found: mines.yaml; did you mean mine.yaml?"),
        (
            f"{tmp_path}/mines.yaml",
            f"--config: file not found: {tmp_path}/mines.yaml; did you mean {tmp_path}/mine.yaml?",
        ),
        ("vit_micro_digit.yaml", "vit_micro_digit.yaml; did you mean configs/classify/vit_micro_digits.yaml?"),
        ("configs", "--config must be a YAML file, but configs is a folder"),
        ("broken.yaml", "--config: broken.yaml cannot be read as YAML: while parsing"),
        ("list.yaml", "--config: list.yaml must hold options by name, got a list"),
    ):
        for flags in (["--config", given], [f"--config={given}"], ["-c", given], [f"-c={given}"]):
            with pytest.raises(ValueError) as error:
                check_files("classify", "fit", flags)
            assert words in str(error.value) and "\n" not in str(error.value)
    for given in ("mine.yaml", "{model: {}}", "a: 1\nb: 2"):
        check_files("classify", "fit", ["--config", given])


def test_a_checkpoint_of_another_task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    for folder, family in (
        ("checkpoints/vit", "vit"),
        ("run/last", "pyramid"),
        ("ear/best", "conformer"),
        ("odd", "x"),
    ):
        Path(folder).mkdir(parents=True)
        Path(folder, "config.json").write_text(f'{{"family": "{family}"}}')
    Path("mine.yaml").write_text("model: {weights: run/last}")
    wrong = ["--model.weights=vit", "--model.weights run/last", "--ckpt_path run", "--config mine.yaml"]
    for line in (*wrong, "--ckpt_path=run/resume/last.ckpt", f"--model.weights {tmp_path}/run/last"):
        with pytest.raises(ValueError, match="^`zoo transcribe` cannot use .*; use `zoo classify validate`$"):
            check_files("transcribe", "validate", shlex.split(line))
        check_files("classify", "validate", shlex.split(line))
    for line in ("--model.weights=odd", "--model.weights none/x", "--model.weights", "--ckpt_path=last"):
        check_files("classify", "fit", shlex.split(line))
    with pytest.raises(ValueError, match="use `zoo transcribe fit`$"):
        check_files("classify", "fit", ["--ckpt_path", "ear"])


def test_what_is_not_certain_passes(tmp_path: Path):
    """Every recipe, and what only the full parser can judge."""
    for path in CONFIGS:
        for verb in TRAINING:
            check(path.parent.name, verb, ["--config", str(path), "--trainer.accelerator=cpu"])
    (tmp_path / "list.yaml").write_text("[1, 2]")
    (tmp_path / "broken.yaml").write_text("a: [")
    (tmp_path / "saved.yaml").write_text("trainer: {logger: {class_path: X, init_args: {save_dri: y}}, callbacks: []}")
    for line in (
        "--trainer.logger=CSVLogger --trainer.logger.save_dir=x",
        "--trainer.callbacks+=Timer --trainer.callbacks.duration=1",
        "--trainer.logger.help CSVLogger",
        "--print_config=skip_null --help-all --verbose",
        "--model.backbone {name:vit_tiny}",
        "--model.backbone.mixer=[softmax,sla] --model.backbone.norm='(\"prepbn\",)' --model.backbone.mixer=sla(",
        "--model.backbone.modulate=false --model.backbone.mixers=[relative]",
        "--model.backbone.anything_else=3 --something_else 4 --model.rate=slaa stray -x --",
        "--config nowhere.yaml --config",
        f"--config {tmp_path} --config {tmp_path}/list.yaml --config {tmp_path}/broken.yaml",
        f"--config={tmp_path}/saved.yaml",
    ):
        check("classify", "fit", shlex.split(line))
    check("transcribe", "test", ["--verbose=false", "--data.train+=x"])

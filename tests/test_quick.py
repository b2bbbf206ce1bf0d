"""What the command says before PyTorch is imported: lists, descriptions and short help."""

import contextlib
import os
import re
import shlex
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

import zoo
from training import refused
from zoo import quick
from zoo.__main__ import TASKS, TRAINING, main
from zoo.models import PRESETS

ROOT = Path(__file__).parent.parent
HEAVY = ["torch", "numpy", "lightning", "jsonargparse", "timm", "matplotlib"]
AT_ONCE = ["--help", "list", "list mixers", "info vit_tiny", "info sla", "info vit_micro.digits", "--version"]
AT_ONCE += [
    "list --help",
    "info --help",
    "list checkpoints",
    "list nothing",
    "info nothing",
    "train",
    "classify --help",
    "runs --help",
    "runs zoo",
    "runs nowhere --json",
]
AT_ONCE += [
    "classify fit --help",
    "transcribe validate -h",
    "classify fit --model.backbone.mixer=slaa",
    "classify traim",
]
AT_ONCE += [
    f"classify fit --config {ROOT}/configs/classify/vit_micro_digits.yaml --modle.rate 1",
    "info vit_tiny mixr=1",
    "info vit_tiny foo=1",
    "classify fit --config nope.yaml",
    "transcribe test --model.weights=vit_micro.digits",
]


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def printed(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    main([*arguments])
    return capsys.readouterr().out


def test_nothing_heavy_is_imported():
    code = "import shlex, sys\nfrom zoo.__main__ import main\nfor line in sys.argv[1:]:\n    try:\n"
    code += "        main(shlex.split(line))\n    except SystemExit as stop:\n        print(stop, file=sys.stderr)\n"
    code += f"    for name in {HEAVY}:\n        assert name not in sys.modules, (line, name)\n"
    done = subprocess.run([sys.executable, "-c", code, *AT_ONCE], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("zoo: error: ") == 12


@pytest.mark.slow
@pytest.mark.parametrize("line", ["--help", "list", "info sla", "classify fit --help"])
def test_it_is_quick(line: str):
    code = "import resource, subprocess, sys; subprocess.run(sys.argv[1:], check=True, stdout=subprocess.DEVNULL); "
    code += "usage = resource.getrusage(resource.RUSAGE_CHILDREN); print(usage.ru_utime + usage.ru_stime)"
    command = [sys.executable, "-c", code, sys.executable, "-m", "zoo", *shlex.split(line)]
    seconds = [float(subprocess.run(command, capture_output=True, text=True, check=True).stdout) for _ in range(3)]
    assert statistics.median(seconds) < 0.5


def test_a_closed_pipe_is_not_an_error():
    """`zoo list | head` ends without a word; with and without a buffer."""
    for settings in ({}, {"PYTHONUNBUFFERED": "1"}):
        reader, writer = os.pipe()
        os.close(reader)
        line = [sys.executable, "-m", "zoo", "list"]
        done = subprocess.run(line, stdout=writer, stderr=subprocess.PIPE, text=True, env=os.environ | settings)
        os.close(writer)
        assert (done.returncode, done.stderr) == (141, "")


# Lists


def first_words(text: str) -> list[str]:
    return [line.split()[0] for line in text.splitlines() if line.strip()]


def test_models_are_listed(capsys: pytest.CaptureFixture[str]):
    assert first_words(printed(capsys, "list", "models")) == [*PRESETS]
    assert first_words(printed(capsys, "list", "deit_*")) == ["deit_tiny", "deit_small", "deit_base"]
    assert first_words(printed(capsys, "list", "models", "*_large")) == ["vit_large"]
    assert " 5.7 M  224 px " in printed(capsys, "list", "vit_tiny")


@pytest.mark.parametrize("kind", ["mixers", "norms", "channels", "positions", "ffns", "placements"])
def test_choices_are_listed_by_either_number(kind: str, capsys: pytest.CaptureFixture[str]):
    table = getattr(zoo, kind.upper())
    assert first_words(printed(capsys, "list", kind)) == [*table] == first_words(printed(capsys, "list", kind[:-1]))


def test_everything_is_counted(capsys: pytest.CaptureFixture[str]):
    text = printed(capsys, "list")
    assert f"zoo list mixers         {len(zoo.MIXERS)}  token mixers" in text
    assert set(PRESETS) < set(first_words(text))
    for kind in ("modulations", "stems", "reductions", "subsamplings", "heads", "crosses", "convs", "checkpoints"):
        assert f"zoo list {kind} " in text and printed(capsys, "list", kind)


def test_checkpoints_are_listed_with_their_scores(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    lines = printed(capsys, "list", "checkpoints").splitlines()
    (line,) = (each for each in lines if each.split()[0] == "vit_micro.digits")
    assert line.split()[:4] == ["vit_micro.digits", "classify,", "top-1", "accuracy"]
    assert "top-1 accuracy 0.9944 (0.980 to 0.998), n = 360: A small vision transformer" in line
    os.chdir(tmp_path)
    assert printed(capsys, "list", "checkpoints").splitlines() == lines, "of the zoo, wherever one is"
    broken = tmp_path / "checkpoints/broken"
    broken.mkdir(parents=True)
    for text in ("{", "[]", "[" * 100_000, "\0"):
        (broken / "config.json").write_text(text)
        assert "broken  " in printed(capsys, "list", "checkpoints")
        assert "broken/config.json" in refused("info", "broken")
    (broken / "config.json").write_text('{"preset": "\\u001b[31m", "labels": ["\\u001b[32m"]}')
    (broken / "README.md").write_text("# broken\n\nIt \x1b[33mis.\n\n| n | \x1b[34m |")
    run = tmp_path / "run"
    (run / "best").mkdir(parents=True)
    (run / "best/config.json").write_text('{"family": "vit"}')
    assert "run/best (checkpoint)" in printed(capsys, "info", "run")
    for text in (printed(capsys, "list", "checkpoints"), printed(capsys, "info", "broken")):
        assert "\x1b" not in text and "\\x1b[33mis" in text


# Descriptions


def test_a_model_is_described(capsys: pytest.CaptureFixture[str]):
    text = printed(capsys, "info", "vit_tiny")
    number = sum(parameter.numel() for parameter in zoo.create_model("vit_tiny").parameters())
    assert text.startswith("vit_tiny: Vision Transformer (") and "arXiv:2010.11929" in text
    for part in (f"{number:,} parameters, input 224 px, used by `zoo classify`", "  mixer = softmax ", "token mixer\n"):
        assert part in text
    deit = printed(capsys, "info", "deit_tiny")
    assert "position = learned " in deit and "[default: sincos]" in deit and "[default: sincos]" not in text


def test_fields_of_a_model_are_replaced(capsys: pytest.CaptureFixture[str]):
    text = printed(capsys, "info", "vit_tiny", "mixer=sla", "depth=1", "norm=('prepbn',)")
    number = sum(p.numel() for p in zoo.create_model("vit_tiny", mixer="sla", depth=1, norm=("prepbn",)).parameters())
    assert f"{number:,} parameters" in text and "mixer = sla " in text
    assert '  zoo.create_model("vit_tiny", mixer="sla", depth=1, norm=("prepbn",))' in text
    assert refused("info", "vit_tiny", "mixr=sla") == "unknown field of vit_tiny 'mixr'; did you mean mixer?"
    assert refused("info", "vit_tiny", "foo=1").startswith("unknown field of vit_tiny 'foo'; choose from: dim, depth, ")
    with pytest.raises(ValueError) as error:
        zoo.create_model("vit_tiny", mixer="slaa")
    assert refused("info", "vit_tiny", "mixer=slaa").partition("; ")[2] == str(error.value).partition("; ")[2]
    assert "'sla' must be FIELD=VALUE" in refused("info", "vit_tiny", "sla")
    assert "unknown model 'sla'" in refused("info", "sla", "mixer=sla")


def test_a_choice_is_described(capsys: pytest.CaptureFixture[str]):
    text = " ".join(printed(capsys, "info", "sla").split())
    for part in ("q' (k'^T v) / (q' sum k')", "https://arxiv.org/abs/2405.11582", "options kernel=5", "linear in the"):
        assert part in text
    for part in (
        "along time (1-D) and on images (2-D)",
        "prefix tokens yes",
        "used by pvt_sla_tiny",
        "zoo.fuse an affine",
    ):
        assert part in text
    assert "`causal` (2 before" in " ".join(printed(capsys, "info", "conv4").split())
    assert "prefix tokens  no: refused" in printed(capsys, "info", "pool")
    assert "quadratic in the number" in printed(capsys, "info", "relative")
    assert 'norm="prepbn(alpha=1.0)"' in printed(capsys, "info", "prepbn")


def test_all_rows_of_a_name_are_shown(capsys: pytest.CaptureFixture[str]):
    text = printed(capsys, "info", "conv")
    assert [line for line in text.splitlines() if line.startswith("conv (")] == [
        "conv (stem)",
        "conv (reduction)",
        "conv (head (images))",
    ]


def test_every_name_is_described(capsys: pytest.CaptureFixture[str]):
    for kind in ("models", "checkpoints", *quick.kinds()):
        for name in quick.entries(kind):
            assert name in printed(capsys, "info", name)


def test_a_checkpoint_is_described_by_name_and_folder(capsys: pytest.CaptureFixture[str]):
    text = printed(capsys, "info", "vit_micro.digits")
    assert "on digits val  top-1 accuracy 0.9944 (0.980 to 0.998), n = 360" in text
    assert "multiply-adds  47,481,792 for an input [1, 3, 32, 32]" in text and "size           2.7 MB" in text
    assert "zoo classify predict vit_micro.digits FILES" in text
    assert printed(capsys, "info", "checkpoints/vit_micro.digits") == text.replace(
        "vit_micro.digits (", "checkpoints/vit_micro.digits ("
    ).replace("predict vit", "predict checkpoints/vit").replace('point("vit', 'point("checkpoints/vit')
    assert '  zoo.load_checkpoint("vit_micro.digits")(FILE)' in text
    text = printed(capsys, "info", "dit_micro.digits")  # which has no answer for a file
    assert "zoo generate sample dit_micro.digits" in text and "load_checkpoint" not in text


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["info", "slaa"], "checkpoints/slaa); did you mean `zoo info sla`"),
        (["info", "vit_tinny"], "`zoo info vit_tiny`"),
        (["info", "vit_micro.digit"], "`zoo info vit_micro.digits`"),
        (["info", "mixer"], "`zoo list mixers` lists the mixers"),
        (["info", "qqqq"], f"(nor is there {ROOT}/qqqq or {ROOT}/checkpoints/qqqq); `zoo list` shows the kinds"),
        (["info", "/qqqq"], "(nor is there /qqqq); "),
        (["list", "mixrs"], "did you mean `zoo list mixers`?"),
        (["list", "norms", "mixrs"], "`zoo list norms` shows all"),
        (["list", "sla"], "no models match 'sla'; did you mean `zoo info sla`"),
        (["list", "nothing_*"], "no models match 'nothing_*'"),
        (["list", "mixers", "x*"], "no mixers match 'x*'; `zoo list mixers` shows all"),
        (["list", "mixxers", "x*"], "unknown kind 'mixxers'; did you mean mixers"),
    ],
)
def test_names_that_nothing_has(arguments: list[str], words: str):
    assert words in refused(*arguments)


# Help


@pytest.mark.parametrize("task", TASKS)
def test_help_fits_a_screen_and_ends_with_an_example(task: str, capsys: pytest.CaptureFixture[str]):
    text = printed(capsys, task, "--help")
    assert all(f"  {verb} " in text for verb in (*TRAINING, *TASKS[task][2]))
    for verb in TRAINING:
        text = printed(capsys, task, verb, "--help")
        assert text == printed(capsys, task, verb, "--model.rate=1", "-h")
        recipe = f"--config configs/{task}/" if verb == "fit" else "--model.weights RUN/best\n"
        assert f"\nexample:\n  zoo {task} {verb} {recipe}" in text
        assert "--help-all" in text and "--data.dataset" in text
        assert ("--model.rate " in text) == (verb == "fit")


HELPS = [[], ["list"], ["info"], ["runs"], *([task] for task in TASKS)]
HELPS += [[task, verb] for task in TASKS for verb in (*TRAINING, *TASKS[task][2])]


@pytest.mark.parametrize("arguments", HELPS, ids=" ".join)
def test_help_fits_24_lines_of_80_columns(
    arguments: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("COLUMNS", "80")
    with contextlib.suppress(SystemExit):
        main([*arguments, "--help"])
    lines = capsys.readouterr().out.splitlines()
    assert 10 < len(lines) <= 24 and max(map(len, lines)) <= 80


def test_help_all_has_every_option(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as stop:
        main(["classify", "fit", "--help-all"])
    text = capsys.readouterr().out
    assert stop.value.code in (0, None)
    assert all(f"--{option}" in text for option in quick.facts()["tasks"]["classify"]["options"])


@pytest.mark.parametrize("arguments", [["--help"], ["list", "--help"], ["info", "--help"]], ids=str)
def test_other_help_has_examples(arguments: list[str], capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 0 and re.search(r"\nexamples?:\n  zoo ", capsys.readouterr().out)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "COMMAND"),
        (
            ["trian"],
            "unknown command 'trian'; choose from: list, info, app, convert, evaluate, page, publish, runs, shard, "
            "classify, detect, generate, transcribe",
        ),
        (["clasify", "fit"], "unknown command 'clasify'; did you mean classify?"),
        (["classify"], "VERB"),
        (["classify", "fitt"], "unknown verb 'fitt'; did you mean fit?"),
        (["list", "a", "b", "c"], "unrecognized arguments: c"),
        (["info"], "the following arguments are required: NAME"),
    ],
    ids=str,
)
def test_unknown_commands(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("usage: zoo") and "error: " in lines[-1] and words in lines[-1]
    assert "FIELD" not in lines[-1]

"""`zoo convert`: what it writes and prints, and what it refuses."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import zoo
from generating import classifier
from zoo.__main__ import main


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small classifier, `model`, and `images`."""
    root = tmp_path_factory.mktemp("convert")
    classifier(root / "model")
    (root / "images").mkdir()
    for index in range(6):
        pixels = torch.randint(0, 256, (20, 20), generator=torch.Generator().manual_seed(index), dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(root / f"images/{index}.png")
    return root


def refused(capsys: pytest.CaptureFixture[str], *arguments: Any) -> str:
    with pytest.raises(SystemExit) as stop:
        main(["convert", *map(str, arguments)])
    text = capsys.readouterr().err if stop.value.code == 2 else str(stop.value.code)
    assert text.count("\n") <= 1 and "error: " in text
    return text


def test_norm_and_dtype(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    main(["convert", f"{home}/model", f"{tmp_path}/made", "--norm=crmsnorm", "--dtype=bfloat16", f"--on={home}/images"])
    said = capsys.readouterr().out
    found = {line[:17].strip(): line[17:] for line in said.splitlines()}
    assert found["compared on"] == "6 files" and found["written to"] == f"{tmp_path}/made"
    exact, rounded = (re.fullmatch(r"outputs differ by (\S+) of the largest, same class for (\d) of 6", found[name])
                      for name in ("norm crmsnorm", "dtype bfloat16"))  # fmt: skip
    assert exact and float(exact[1]) < 1e-5 and exact[2] == "6"
    assert rounded and 1e-5 < float(rounded[1]) < 0.1
    config = json.loads((tmp_path / "made/config.json").read_text())
    old = json.loads((home / "model/config.json").read_text())
    assert config["model"]["norm"] == "crmsnorm" and config["dtype"] == "bfloat16" and config["figures"] == []
    assert config["base"]["address"] == "model" and config["labels"] == old["labels"]
    assert config["source"] == "zoo convert model --norm crmsnorm --dtype bfloat16"
    assert zoo.load_checkpoint(tmp_path / "made", check=True)(home / "images/0.png")
    assert f"parameters       {old['parameters']:,}, now {config['parameters']:,}" in said


def test_kv_heads_and_fuse(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    model = zoo.create_model("vit_micro", dim=16, depth=1, heads=2, norm="batchnorm", classes=3)
    with pytest.warns(UserWarning, match="without preprocess"):
        zoo.save_model(model, tmp_path / "model")
    main(["convert", f"{tmp_path}/model", f"{tmp_path}/made", "--kv-heads=1", "--fuse"])
    said = capsys.readouterr().out
    assert "compared on      8 random inputs" in said and ", 3 of 3 layers folded" in said
    made = zoo.load_model(tmp_path / "made")
    assert made.config.mixer == "softmax(kv_heads=1)"  # pyright: ignore[reportAttributeAccessIssue]
    assert made.fusion is not None


def test_a_new_mixer_learns(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    errors = []
    for steps in (1, 30):
        arguments = [f"--on={home}/images", f"--steps={steps}", "--batch=4", "--rate=1e-2"]
        main(["convert", f"{home}/model", f"{tmp_path}/made", "--mixer=sla", *arguments])
        found = re.search(r"^mixer sla .* error of a mixer (\S+)$", capsys.readouterr().out, re.MULTILINE)
        assert found is not None
        errors.append(float(found[1]))
    assert errors[1] < errors[0] / 2
    assert zoo.load_model(tmp_path / "made").config.mixer == "sla"  # pyright: ignore[reportAttributeAccessIssue]


def test_what_is_refused(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    model = f"{home}/model"
    assert "at least one of --norm, --kv-heads, --mixer, --fuse, --dtype" in refused(capsys, model, tmp_path / "a")
    assert "--mixer needs --on" in refused(capsys, model, tmp_path / "a", "--mixer=sla")
    assert "--steps is only for --mixer" in refused(capsys, model, tmp_path / "a", "--fuse", "--steps=9")
    assert "no layer of" in refused(capsys, model, tmp_path / "a", "--fuse")
    assert "kv_heads must divide" in refused(capsys, model, tmp_path / "a", "--kv-heads=5")
    assert "is the checkpoint itself" in refused(capsys, model, model, "--dtype=float16")
    assert "is not replaced by a checkpoint" in refused(capsys, model, home / "images", "--dtype=float16")
    assert "not found" in refused(capsys, tmp_path / "none", tmp_path / "a", "--dtype=float16")
    assert "no image in folder" in refused(capsys, model, tmp_path / "a", "--dtype=float16", f"--on={model}")
    assert "mixer: unknown name 'slaa'" in refused(capsys, model, tmp_path / "a", "--mixer=slaa", f"--on={home}/images")
    Image.new("L", (4, 4)).save(tmp_path / "small.png")
    (tmp_path / "broken.png").write_text("not an image")
    assert "broken.png" in refused(capsys, model, tmp_path / "a", "--dtype=float16", f"--on={tmp_path}/broken.png")
    assert "is inside the checkpoint itself" in refused(capsys, model, f"{model}/a", "--dtype=float16")
    assert "small.png is a file" in refused(capsys, model, tmp_path / "small.png/a", "--dtype=float16")
    new = ["--mixer=sla", f"--on={home}/images"]
    assert "--mixer 'softmax(kv_heads=1)'" in refused(capsys, model, tmp_path / "a", "--kv-heads=1", *new)
    assert "can be folded" in refused(capsys, model, tmp_path / "a", "--fuse", "--steps=99999999", *new)
    assert not (tmp_path / "a").exists()


def test_outputs_that_float16_cannot_hold(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    model: Any = zoo.load_model(home / "model")
    model.head.weight.data[0] = 1e6
    zoo.save_model(model, tmp_path / "large")
    assert "NaN or infinite" in refused(capsys, tmp_path / "large", tmp_path / "a", "--dtype=float16")
    assert "outputs differ" not in capsys.readouterr().out and not (tmp_path / "a").exists()


def test_the_source_is_a_command_and_nothing_is_warned_of(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], recwarn: pytest.WarningsRecorder
):
    other: Any = zoo.load_model(home / "model")
    with pytest.warns(UserWarning, match="without labels"):
        zoo.save_model(other.config.build(), tmp_path / "a model", preprocess=other.preprocess)
    more = ["--mixer=softmax(kv_heads=1)", f"--on={home}/images", "--steps=1"]
    main(["convert", f"{tmp_path}/a model", f"{tmp_path}/made", *more])
    said = capsys.readouterr()
    assert not recwarn.list and not re.search("(?i)warning", said.err) and "mixer softmax(kv_heads=1) " in said.out
    config = json.loads((tmp_path / "made/config.json").read_text())
    assert config["source"] == "zoo convert 'a model' --mixer 'softmax(kv_heads=1)'"


def test_a_generator_takes_no_files(tmp_path: Path, capsys: pytest.CaptureFixture[str], home: Path):
    model = zoo.create_model("dit_micro", dim=16, depth=1, heads=2)
    zoo.save_model(model, tmp_path / "model")
    arguments = [tmp_path / "model", tmp_path / "a", "--mixer=sla", f"--on={home}/images"]
    assert "use zoo.graft in Python" in refused(capsys, *arguments)
    trained = Path(__file__).parents[2] / "checkpoints/dit_micro.digits"  # its preprocessing reads images
    arguments = [trained, tmp_path / "a", "--dtype=float16", f"--on={home}/images"]
    assert "takes no files, only prepared inputs" in refused(capsys, *arguments)
    main(["convert", f"{tmp_path}/model", f"{tmp_path}/a", "--kv-heads=1"])
    assert "outputs differ by" in capsys.readouterr().out
    assert "crmsnorm: the gates of modulation" in refused(capsys, tmp_path / "model", tmp_path / "b", "--norm=crmsnorm")

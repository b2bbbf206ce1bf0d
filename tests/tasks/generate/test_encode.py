"""`zoo generate encode`, training on its latents, and samples that are decoded."""

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from filelock import FileLock
from PIL import Image
from safetensors.torch import load_file

import zoo
from encoding import autoencoder, images
from training import refused
from zoo.__main__ import main
from zoo.data.generation import WholeImages
from zoo.data.latents import read_index
from zoo.inputs.latents import LatentPreprocess
from zoo.tasks.generate import encode
from zoo.tasks.generate.images import decoder_for, sides_of, to_bytes

SMALL = ["--size=16", "--shard=4", "--batch=3", "--workers=1", "--device=cpu"]


@pytest.fixture(scope="module", autouse=True)
def in_this_process():
    """Images are read without worker processes, to save time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(WholeImages, "processes", lambda self, files: 0)
        yield


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an autoencoder `vae`, images `images`, and their latents `latents`."""
    folder = tmp_path_factory.mktemp("encode")
    autoencoder(folder / "vae")
    images(folder / "images")
    main(command(folder, folder / "latents"))
    return folder


def command(home: Path, output: Path, *more: str) -> list[str]:
    return ["generate", "encode", f"--root={home / 'images'}", f"--decoder={home / 'vae'}", f"--output={output}"] + [
        *SMALL,
        *more,
    ]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != ".lock"}


def test_moments_are_diffusers_own(home: Path):
    import diffusers

    theirs: Any = diffusers.AutoencoderKL.from_pretrained(home / "vae", low_cpu_mem_usage=False)  # pyright: ignore
    index = read_index(home / "latents")
    assert {name: shard["count"] for name, shard in index.shards.items()} == {
        "train-00000.safetensors": 4,
        "train-00001.safetensors": 4,
        "train-00002.safetensors": 2,
        "val-00000.safetensors": 4,
    }
    assert (index.image, index.factor, index.channels, index.classes) == (16, 2, 6, ["cats", "dogs"])
    assert index.decoder == str(home / "vae") and index.scaling == {"scale": 0.18215, "shift": 0.0}
    drawn: list[torch.Tensor] = []
    for split, labels in (("train", [0] * 5 + [1] * 5), ("val", [0, 0, 1, 1])):
        found = [load_file(path) for path in sorted((home / "latents").glob(f"{split}-*"))]
        assert torch.cat([each["labels"] for each in found]).tolist() == labels
        mean, std = (torch.cat([each[name] for each in found]) for name in ("mean", "std"))
        for row, label in enumerate(labels):
            number = row - labels.index(label)
            file = home / "images" / split / ("cats", "dogs")[label] / f"{number}.png"
            with Image.open(file) as image:  # 24 x 20: the short side becomes 16, then the centre is cut out
                resized = image.resize((19, 16), Image.Resampling.BICUBIC).crop((2, 0, 18, 16))
            pixels = torch.from_numpy(np.array(resized)).permute(2, 0, 1)[None] / 127.5 - 1
            for side, values in enumerate((pixels, pixels.flip(-1))):
                with torch.no_grad():
                    wanted = theirs.encode(values).latent_dist
                assert (mean[row, side] - wanted.mean[0]).abs().max() < 1e-6
                assert (std[row, side] - wanted.std[0]).abs().max() < 1e-6
        if split == "train":
            drawn = [mean, std]
    mean, std = drawn
    first = mean.double().mean((0, 1, 3, 4))
    second = (mean.double() ** 2 + std.double() ** 2).mean((0, 1, 3, 4))
    assert torch.allclose(torch.tensor(index.mean).double(), first, atol=1e-6)
    assert torch.allclose(torch.tensor(index.std).double(), (second - first**2).sqrt(), atol=1e-6)


def test_a_resumed_encode_gives_the_same_files(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    output, write = tmp_path / "latents", encode.written

    def killed(*given: Any) -> Any:
        for found in write(*given):
            yield found
            if len([*output.glob("*.safetensors")]) == 2:
                raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(encode, "written", killed)
        with pytest.raises(SystemExit) as stop:
            main(command(home, output))
    assert stop.value.code == 130
    assert sorted(contents(output)) == ["train-00000.safetensors", "train-00001.safetensors"]
    (output / ".train-00002.safetensors.new").write_bytes(b"cut off")  # of a process that was killed as it wrote
    times = {path.name: path.stat().st_mtime_ns for path in output.glob("*.safetensors")}
    capsys.readouterr()
    main(command(home, output))
    assert "wrote 14 images in 4 shards, 2 of them from before to" in capsys.readouterr().err
    assert contents(output) == contents(home / "latents")
    assert all((output / name).stat().st_mtime_ns == time for name, time in times.items())


@pytest.mark.slow
def test_a_killed_encode_resumes(home: Path, tmp_path: Path):
    images(tmp_path / "images", {"train": 30})
    outputs = [tmp_path / name for name in ("whole", "killed")]
    more = [f"--root={tmp_path / 'images'}", "--shard=2"]
    main(command(home, outputs[0], *more))
    process = subprocess.Popen([sys.executable, "-m", "zoo", *command(home, outputs[1], *more)])
    while len([*outputs[1].glob("*.safetensors")]) < 2:
        assert process.poll() is None
        time.sleep(0.005)
    process.kill()
    process.wait()
    assert not (outputs[1] / "index.json").exists()
    main(command(home, outputs[1], *more))
    assert contents(outputs[1]) == contents(outputs[0])


def test_refused_encodes(home: Path, tmp_path: Path):
    output = tmp_path / "latents"

    def text(*more: str) -> str:
        return refused(*command(home, output, *more))

    shutil.copytree(home / "latents", output)
    path = output / "train-00001.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:300])
    assert text().startswith(f"{path} is truncated") and "delete the file and run `zoo generate encode` again" in text()
    path.write_bytes((output / "train-00000.safetensors").read_bytes())
    assert f"{path} holds other latents (they differ in names)" in text()
    path.write_bytes(whole)
    assert "holds other latents (they differ in image)" in text("--size=18")
    assert "holds other latents (they differ in dtype)" in text("--dtype=float16")
    assert "train-00002.safetensors is not part of these latents" in text("--shard=5")
    other = autoencoder(tmp_path / "other", seed=1)
    assert "holds other latents (they differ in autoencoder)" in text(f"--decoder={other}")
    assert contents(output) == contents(home / "latents")
    assert "--size must be a multiple of 2" in text("--size=15")
    assert "is neither a folder" in text("--decoder=vae")
    assert "nothing/train is not a folder" in text(f"--root={tmp_path / 'nothing'}")
    with FileLock(output / ".lock"):
        assert "another process writes to" in text()


def test_a_full_disk(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def full(number: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    output = tmp_path / "latents"
    assert refused(*command(home, output)) == f"cannot write to {output}: No space left on device"
    assert not contents(output)


def test_unreadable_images_are_left_out(home: Path, tmp_path: Path, capsys):
    root = Path(shutil.copytree(home / "images" / "train", tmp_path / "images" / "train")).parent
    for number in (0, 1, 2, 3):
        (root / "train" / "cats" / f"{number}.png").write_bytes(b"no image")
    main(command(home, tmp_path / "latents", f"--root={root}", "--dtype=float16"))
    said = capsys.readouterr().err
    assert said.count("cannot be read as an image") == 4 and "cats/2.png" in said
    assert "wrote 6 images in 3 shards" in said and "skipped 4 unreadable images" in said
    index = read_index(tmp_path / "latents")
    assert [shard["count"] for shard in index.shards.values()] == [0, 4, 2]
    source = WholeImages("latents", str(tmp_path / "latents")).source("train")
    exact = WholeImages("latents", str(home / "latents")).source("train")
    for ours, theirs in zip(source.moments(0, True), exact.moments(4, True), strict=True):
        assert torch.equal(ours, theirs.half().float())
    for path in (root / "train").glob("*/*.png"):
        path.write_bytes(b"no image")
    assert "no image of" in refused(*command(home, tmp_path / "none", f"--root={root}"))


BACKBONE = ["--model.backbone.name=dit_micro", "--model.backbone.depth=1", "--model.backbone.dim=32"]
BACKBONE += ["--model.backbone.heads=2", "--model.warmup=0", "--model.show=2"]
FAST = ["--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false", "--trainer.logger=false"]


@pytest.fixture(scope="module")
def run(home: Path) -> Path:
    """A finished run on the latents."""
    data = ["--data.dataset=latents", f"--data.root={home / 'latents'}", "--data.batch=5"]
    folder = f"--trainer.default_root_dir={home / 'run'}"
    main(["generate", "fit", *BACKBONE, *FAST, *data, "--trainer.max_epochs=1", folder])
    return home / "run"


def test_a_model_of_latents(home: Path, run: Path, tmp_path: Path, capsys):
    found = zoo.load_checkpoint(run / "best", check=True)
    index = read_index(home / "latents")
    assert found.preprocess == index.preprocess() and found.model.config.channels == 6
    assert found.labels == ("cats", "dogs")
    with Image.open(run / "samples" / "00001.png") as image:  # two classes, two samples of 16 x 16, enlarged
        assert image.size == (2 * 34 + 2, 2 * 34 + 2) and image.mode == "RGB"
    data = ["--data.dataset=latents", f"--data.root={home / 'latents'}"]
    main(["generate", "validate", f"--model.weights={run / 'best'}", *data, "--trainer.accelerator=cpu"])
    assert "(n = 4)" in capsys.readouterr().out
    common = ["generate", "sample", str(run / "best"), "--steps=2", "--each=1", "--device=cpu"]
    main([*common, "--size=16x20", f"--output={tmp_path / 'a'}"])
    facts = json.loads((tmp_path / "a" / "samples.json").read_text())
    assert facts["decoder"] == str(home / "vae") and facts["size"] == [16, 20]
    with Image.open(tmp_path / "a" / "00001.png") as image:
        assert image.size == (20, 16) and json.loads(image.text["zoo"])["decoder"] == str(home / "vae")  # pyright: ignore
    other = autoencoder(tmp_path / "other", seed=1)
    main([*common, f"--decoder={other}", f"--output={tmp_path / 'b'}"])
    assert json.loads((tmp_path / "b" / "samples.json").read_text())["decoder"] == str(other)
    wrong = autoencoder(tmp_path / "wrong", channels=4)
    out = f"--output={tmp_path / 'c'}"
    text = refused(*common, f"--decoder={wrong}", out)
    assert text == f"decoder {wrong} has 4 channels of latents, but the model has 6"
    assert refused(*common, "--size=15", out) == "--size must be multiples of 2, got 15x15"
    assert "is neither a folder" in refused(*common, "--decoder=nowhere", out)
    assert not (tmp_path / "c").exists()


def test_samples_of_latents_are_measured_beside_decoded_images(home: Path, run: Path, tmp_path: Path, capsys):
    data = ["--data.dataset=latents", f"--data.root={home / 'latents'}", "--trainer.accelerator=cpu"]
    figures = ["--model.samples=4", "--model.steps=1", "--model.guidance=1", f"--model.output={tmp_path / 'out'}"]
    main(["generate", "validate", f"--model.weights={run / 'best'}", *data, *figures])
    found = json.loads((tmp_path / "out" / "figures.json").read_text())
    assert (found["held_out"], found["training"], found["size"]) == (4, 10, [16, 16]) and found["mirrored"]
    assert found["decoder"] == str(home / "vae") and found["figures"].keys() == {"neighbours", "near_copies"}
    assert "the 4 held-out images, decoded from their latents, in place of samples" in capsys.readouterr().out


def test_without_the_decoder_no_grid_is_drawn(home: Path, tmp_path: Path, caplog):
    latents = Path(shutil.copytree(home / "latents", tmp_path / "latents"))
    index = json.loads((latents / "index.json").read_text())
    (latents / "index.json").write_text(json.dumps(index | {"decoder": "vanished"}))
    data = ["--data.dataset=latents", f"--data.root={latents}", "--data.batch=5"]
    folder = f"--trainer.default_root_dir={tmp_path / 'run'}"
    main(["generate", "fit", *BACKBONE, *FAST, *data, "--trainer.max_epochs=2", folder])
    assert caplog.text.count("no samples are drawn: decoder 'vanished' is neither a folder") == 1
    assert (tmp_path / "run" / "best").is_dir() and not (tmp_path / "run" / "samples").exists()
    found = refused("generate", "sample", tmp_path / "run" / "best", "--device=cpu", f"--output={tmp_path / 'out'}")
    assert found.startswith("decoder 'vanished' is neither a folder") and "another one with --decoder" in found


def test_bytes_are_those_of_the_decoded_images(home: Path):
    prepare = LatentPreprocess(size=4, channels=6, mean=(1.0,) * 6, std=(2.0,) * 6, decoder=str(home / "vae"), factor=2)
    decoder, x = decoder_for(prepare), torch.randn(3, 6, 4, 5)
    assert decoder is not None and sides_of(None, prepare) == (4, 4) and sides_of((8, 6), prepare) == (4, 3)
    images = decoder.model.decode(x * 2 + 1).sample
    wanted = ((images / 2 + 0.5) * 255).round().clamp(0, 255).permute(0, 2, 3, 1)
    assert torch.equal(to_bytes(x, prepare, decoder).float(), wanted)
    pixels = WholeImages("digits", size=8, channels=1).preprocess
    assert decoder_for(pixels) is None and sides_of(None, pixels) == (8, 8) and sides_of((8, 6), pixels) == (8, 6)
    with pytest.raises(ValueError, match="this model gives pixels, which need no decoder"):
        decoder_for(pixels, str(home / "vae"))

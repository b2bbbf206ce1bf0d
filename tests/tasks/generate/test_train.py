"""`zoo generate fit|validate|sample`: a run from its start to images, and what is refused."""

import io
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from lightning import Trainer
from PIL import Image

import zoo
from training import refused
from zoo.__main__ import main
from zoo.data.generation import WholeImages
from zoo.data.images import Batch
from zoo.tasks.generate.images import grid, to_bytes
from zoo.tasks.generate.train import Generate
from zoo.tasks.task import NotFinite

TINY = ["--model.backbone.name=dit_micro", "--model.backbone.depth=1", "--model.backbone.dim=32"]
TINY += ["--model.backbone.heads=2", "--data.dataset=digits", "--data.size=8", "--data.channels=1", "--data.flip=0"]
FAST = ["--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false", "--data.workers=0", "--data.batch=32"]
SHORT = ["--trainer.limit_train_batches=3", "--trainer.limit_val_batches=2", "--trainer.max_epochs=2"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run."""
    folder = tmp_path_factory.mktemp("generate") / "run"
    main(["generate", "fit", *TINY, *FAST, *SHORT, f"--trainer.default_root_dir={folder}", "--model.average=0.9"])
    return folder


def test_a_run_leaves_a_checkpoint_and_its_samples(run, capsys):
    found = zoo.load_checkpoint(run / "best")
    assert found.labels == tuple("0123456789") and found.preprocess.mean == (0.5,) and found.preprocess.size == 8
    with Image.open(run / "samples" / "00002.png") as image:
        assert image.mode == "L" and image.size == (4 * 34 + 2, 10 * 34 + 2)
        drawn = np.asarray(image)
    ((step, logged),) = logged_images(run)[-1:]
    assert step == 6 and np.array_equal(logged, drawn)
    main(["generate", "validate", f"--model.weights={run / 'best'}", *FAST])
    said = capsys.readouterr().out
    assert said.count("time 0.") == 8 and "(n = 360)" in said
    main(["generate", "validate", f"--model.weights={run / 'best'}", *FAST])
    assert capsys.readouterr().out == said


def logged_images(run: Path) -> list[tuple[int, np.ndarray]]:
    """The step and the pixels of each image in TensorBoard's files of a run."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tensorboard" / "version_0"), {"images": 0}).Reload().Images("samples")
    found = []
    for event in events:
        with Image.open(io.BytesIO(event.encoded_image_string)) as image:
            found.append((event.step, np.asarray(image.convert("L"))))
    return found


def test_samples_record_how_they_were_made(run, tmp_path, capsys):
    common = [str(run / "best"), "--steps=3", "--guidance=1.5", "--device=cpu"]
    main(["generate", "sample", *common, "--classes=3,8", "--each=2", "--size=8x12", "--output", str(tmp_path / "a")])
    assert "wrote 4 images" in capsys.readouterr().err
    facts = json.loads((tmp_path / "a" / "samples.json").read_text())
    assert facts["sampler"] == "heun" and facts["evaluations"] == 2 * 5 and facts["guidance"] == 1.5
    assert [each["class"] for each in facts["samples"]] == ["3", "3", "8", "8"]
    values = np.load(tmp_path / "a" / "samples.npz")["arr_0"]
    assert values.shape == (4, 8, 12, 3) and values.dtype == np.uint8
    for entry, value in zip(facts["samples"], values, strict=True):
        with Image.open(tmp_path / "a" / entry["file"]) as image:
            text: Any = image
            own = json.loads(text.text["zoo"])
            assert own["index"] == entry["index"] and own["seed"] == 0 and own["class"] == entry["class"]
            assert np.array_equal(np.asarray(image), value[..., 0])
    main(
        ["generate", "sample", *common, "--classes=3", "--each=2", "--size=8x12", "--batch=1", "--output"]
        + [str(tmp_path / "b")]
    )
    again = np.load(tmp_path / "b" / "samples.npz")["arr_0"]
    assert np.abs(again.astype(int) - values[:2].astype(int)).max() <= 1


def test_a_model_without_classes(tmp_path):
    folder = tmp_path / "run"
    flags = ["--model.backbone.classes=0", f"--trainer.default_root_dir={folder}", "--model.show=1"]
    main(["generate", "fit", *TINY, *FAST, *SHORT, *flags])
    assert zoo.load_checkpoint(folder / "best").labels is None
    common = [folder / "best", "--steps=2", "--each=3", "--device=cpu", "--output", tmp_path / "out"]
    main(["generate", "sample", *map(str, common)])
    facts = json.loads((tmp_path / "out" / "samples.json").read_text())
    assert [each["class"] for each in facts["samples"]] == [None] * 3
    assert "this model has no classes" in refused("generate", "sample", *common, "--classes=3")
    assert "needs a model with classes" in refused("generate", "sample", *common, "--guidance=2")


def module(**options: Any) -> Generate:
    task = Generate({"name": "dit_micro", "depth": 1, "dim": 32, "heads": 2}, **options)
    task.log = lambda *_, **__: None  # pyright: ignore
    return task


def test_labels_are_dropped_once_a_sample_and_never_in_eval():
    task = module(label_drop=0.5)
    seen: list[torch.Tensor] = []
    task.model.label_table.register_forward_hook(lambda _, inputs, output: seen.append(inputs[0]))  # pyright: ignore
    torch.manual_seed(0)
    batch = Batch(torch.randn(2000, 1, 8, 8), torch.arange(2000) % 10, ())
    task.training_step(batch, 0)
    (labels,) = seen
    dropped = labels == 10
    assert dropped.float().mean().item() == pytest.approx(0.5, abs=0.05)
    assert torch.equal(labels[~dropped], batch.labels[~dropped])
    task.model.eval()
    seen.clear()
    task.model(batch.images[:4], torch.rand(4), batch.labels[:4])
    assert torch.equal(seen[0], batch.labels[:4])


@pytest.mark.parametrize("until", [False, True])
def test_validation_draws_nothing_from_the_generators(until):
    task = Generate(
        {"name": "dit_micro", "depth": 1, "dim": 32, "heads": 2, "until": until, "time": "sincos(scale=10.0)"}
    )
    data = WholeImages("digits", size=8, channels=1, batch=64, workers=0)
    trainer = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False)
    before = torch.get_rng_state()
    trainer.validate(task, data, verbose=False)
    assert torch.equal(torch.get_rng_state(), before)
    assert task.said.endswith("(n = 360)")


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_other_precisions_give_nearly_the_same_loss(precision, run, tmp_path, capsys):
    """bf16-true also casts the sums of the losses."""
    losses = []
    for each in ("32-true", precision):
        flags = [f"--model.weights={run / 'best'}", f"--trainer.precision={each}", f"--model.output={tmp_path}"]
        main(["generate", "validate", *FAST, *flags, "--model.samples=10", "--model.steps=1"])
        losses.append(float(capsys.readouterr().out.partition("\nloss ")[2].split()[0]))
    assert losses[1] == pytest.approx(losses[0], rel=0.02)


def test_a_loss_that_is_not_finite_stops_with_the_times():
    task = module()
    with torch.no_grad():
        task.model.out.bias.fill_(float("nan"))  # pyright: ignore
    task._trainer = SimpleNamespace(current_epoch=0, global_step=3, global_rank=0)  # pyright: ignore
    batch = Batch(torch.randn(4, 1, 8, 8), torch.arange(4), ())
    with pytest.raises(NotFinite, match=r"at step 3 \(epoch 0\), at times 0[\d.]* to [\d.]+; lower"):
        task.training_step(batch, 0)


def test_bytes_are_the_inverse_of_the_preprocessing():
    data = WholeImages("digits", size=8, channels=1)
    source = data.source("val")
    images = [source.image(index) for index in range(5)]
    values = to_bytes(data.preprocess.normalized(images), data.preprocess)
    assert all(np.array_equal(np.asarray(image), value[..., 0]) for image, value in zip(images, values, strict=True))
    drawn = np.asarray(grid(values, 3))
    assert drawn.shape == (2 * 34 + 2, 3 * 34 + 2) and np.array_equal(drawn[2:34:4, 36:68:4], values[1, :, :, 0])
    (colour,) = np.split(np.asarray(grid(torch.arange(12, dtype=torch.uint8).view(1, 2, 2, 3), 1, least=2)), 1, -1)
    assert colour.shape == (2, 2, 3) and colour[1, 1].tolist() == [9, 10, 11]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--classes=11"], "--classes: unknown class '11'"),
        (["--sampler=ddm"], "sampler: unknown name 'ddm'"),
        (["--sampler=meanflow"], "needs a model with until=True"),
        (["--size=1x8"], "at least a patch of 2 pixels"),
        (["--guidance=nan"], "scale of guidance must be finite"),
        (["--guidance=2", "--interval=0.6,0.5"], "the interval of guidance must lie in 0..1"),
        (["--shift=0"], "shift must be from 0.01 to 100"),
        (["--guidance=2", "--channels=2"], "at most 1 channels can be guided"),
        (["--guidance=2", "--weak=nothing"], "'nothing' not found"),
        (["--interval=0.2,0.5"], "--weak, --interval and --channels would be ignored; give --guidance"),
    ],
)
def test_refused_samples(run, arguments, message, tmp_path):
    found = refused("generate", "sample", run / "best", "--device=cpu", "--output", tmp_path / "out", *arguments)
    assert message in found and not list(tmp_path.glob("out/*.png"))


def test_a_weaker_checkpoint_of_other_classes_is_refused(run, tmp_path):
    kept = zoo.load_checkpoint(run / "best")
    zoo.save_model(kept.model, tmp_path / "weak", preprocess=kept.preprocess, labels=kept.labels[::-1])
    flags = ["--guidance=2", f"--weak={tmp_path / 'weak'}", "--output", tmp_path / "out"]
    assert "was trained on other classes" in refused("generate", "sample", run / "best", *flags)


def test_mixed_precision_with_clipped_gradients(tmp_path):
    """Lightning does not clip for a fused optimizer."""
    flags = [
        "--trainer.precision=bf16-mixed",
        "--trainer.gradient_clip_val=1",
        f"--trainer.default_root_dir={tmp_path}",
    ]
    main(["generate", "fit", *TINY, *FAST, *SHORT, *flags, "--model.show=0"])
    assert (tmp_path / "best").is_dir()


def test_the_preprocessing_of_a_checkpoint_is_kept():
    base = WholeImages("digits", size=8, channels=1).prepared(None)
    assert base.std == (0.5,)
    other = replace(base, std=(1.0,))
    assert WholeImages("digits").prepared(other).std == (1.0,)


def test_refused_runs(run, tmp_path):
    assert "use `zoo generate" in refused("classify", "predict", run / "best", ".")
    assert "use `zoo classify" in refused("generate", "fit", "--model.backbone.name=vit_micro")
    assert "model.times: unknown name" in refused("generate", "fit", *TINY, "--model.times=normal")
    for option in ("label_drop=1", "times_std=-1", "loss=score", "guidance=-1", "show=-1"):
        assert "\n" not in refused("generate", "fit", *TINY, f"--model.{option}")


@pytest.mark.slow
def test_a_model_of_two_resolutions_learns_digits(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Its velocity has a variance of 1.5 or so; the coarse branch's loss is in training alone."""
    sizes = {"dim": "[64,32]", "depth": "[3,3]", "heads": "[2,2]", "image": "8", "channels": "1"}
    sizes |= {"name": "dimr_xl_2r", "schedule": "linear", "prediction": "velocity"}
    command = [
        "generate",
        "fit",
        *TINY[4:],
        *FAST,
        *(f"--model.backbone.{name}={each}" for name, each in sizes.items()),
    ]
    command += ["--model.rate=2e-3", "--model.show=0", "--trainer.check_val_every_n_epoch=6", "--trainer.max_epochs=6"]
    main([*command, f"--trainer.default_root_dir={tmp_path / 'run'}"])
    model: Any = zoo.load_model(tmp_path / "run" / "best")
    assert model.about["figures"][0]["value"] < 0.75
    given = [str(tmp_path / "run" / "best"), "--classes=3", "--each=2", "--size=8x13", "--steps=4", "--device=cpu"]
    main(["generate", "sample", *given, f"--output={tmp_path / 'samples'}"])
    assert "wrote 2 images" in capsys.readouterr().err

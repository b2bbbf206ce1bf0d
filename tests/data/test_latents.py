"""Latents in files, and the batches made of them."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from encoding import cache
from zoo.data.generation import WholeImages
from zoo.data.latents import INDEX, Latents, Sums, read_index
from zoo.inputs.images import ImagePreprocess
from zoo.inputs.latents import LatentPreprocess

COUNTS = {"train": (3, 3, 1), "val": (3,)}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return cache(tmp_path_factory.mktemp("latents") / "cache", COUNTS)


@pytest.fixture
def copy(root: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(root, tmp_path / "copy"))


def data(root: Path, **options: Any) -> WholeImages:
    return WholeImages(**{"dataset": "latents", "root": str(root), "batch": 2, "workers": 0, **options})


def moments(root: Path, split: str) -> tuple[torch.Tensor, torch.Tensor]:
    found = [load_file(path) for path in sorted(root.glob(f"{split}-*"))]
    return torch.cat([each["mean"] for each in found]), torch.cat([each["std"] for each in found])


def test_a_row_is_that_of_its_shard(root: Path):
    source, (mean, std) = Latents(root, "train"), moments(root, "train")
    assert source.labels.tolist() == [0, 1, 0, 0, 1, 0, 0] and source.classes == ["cats", "dogs"]
    for index in range(7):
        for mirrored in (False, True):
            found = source.moments(index, mirrored)
            assert torch.equal(found[0], mean[index, int(mirrored)]) and torch.equal(
                found[1], std[index, int(mirrored)]
            )
    assert source.name(4).endswith("train-00001.safetensors, row 1")


def test_evaluation_takes_the_means_in_order(root: Path):
    module = data(root)
    batches = list(module.val_dataloader())
    mean, _ = moments(root, "val")
    assert torch.equal(torch.cat([batch.images for batch in batches]), (mean[:, 0] - 2.0) / 3.0)
    assert torch.cat([batch.labels for batch in batches]).tolist() == [0, 1, 0]
    assert module.described() == "latents: 7 images to train on, 3 to validate, 2 classes"
    assert module.example()[0][0].shape == (1, 4, 4, 4)


def test_draws_are_a_function_of_seed_epoch_and_index(root: Path):
    keys = [(epoch, index) for epoch in range(40) for index in range(7)]
    before = torch.get_rng_state()
    drawn = data(root, seed=3).items("train").__getitems__(keys).images
    assert torch.equal(torch.get_rng_state(), before)
    turned = data(root, seed=3).items("train").__getitems__(keys[::-1]).images
    assert torch.equal(turned.flip(0), drawn)
    other = data(root, seed=4).items("train").__getitems__(keys).images
    flat = torch.cat([drawn, other]).flatten(1)
    assert len(flat.unique(dim=0)) == len(flat)

    # What is drawn, less the mean, is the standard deviation times normal noise; half are mirror images.
    mean, std = moments(root, "train")
    latents = drawn * 3.0 + 2.0
    rows = torch.tensor([index for _, index in keys])
    noise = (latents[:, None] - mean[rows]) / std[rows].clamp(min=1e-3)
    distance = noise.abs().flatten(2).mean(2)
    mirrored = distance[:, 1] < distance[:, 0]
    assert mirrored.float().mean().item() == pytest.approx(0.5, abs=0.1)
    chosen = noise[torch.arange(len(rows)), mirrored.long()]
    assert chosen.mean().item() == pytest.approx(0.0, abs=0.03) and chosen.std().item() == pytest.approx(1.0, abs=0.03)
    never = data(root, seed=3, flip=0.0).items("train").__getitems__(keys[:7]).images * 3.0 + 2.0
    assert ((never - mean[:, 0]).abs() <= 6 * std[:, 0] + 1e-4).all()


def test_statistics_are_those_of_what_is_drawn():
    generator = torch.Generator().manual_seed(0)
    mean = torch.randn(50, 2, 3, 2, 2, generator=generator) * torch.tensor([1.0, 2.0, 3.0])[:, None, None] + 5
    std = torch.rand(mean.shape, generator=generator)
    first, second = mean.double().sum((0, 1, 3, 4)), (mean**2 + std**2).double().sum((0, 1, 3, 4))
    half = Sums(200, first / 2, second / 2)
    found = (half + half).statistics()
    drawn = mean + std * torch.randn(400, *mean.shape, generator=generator)
    drawn = drawn.transpose(0, 3).flatten(1)
    assert torch.allclose(torch.tensor(found[0]), drawn.mean(1), atol=5e-3)
    assert torch.allclose(torch.tensor(found[1]), drawn.std(1), rtol=5e-3)


def test_a_checkpoint_keeps_its_statistics(root: Path):
    module = data(root)
    assert module.preprocess == read_index(root).preprocess()
    kept = LatentPreprocess(size=8, mean=(0.0,) * 4, std=(5.0,) * 4, decoder="other/name", factor=2)
    lines = module.follow(SimpleNamespace(preprocess=kept), "fit")
    assert lines == [
        "inputs are preprocessed as in the checkpoint, except for size 4 (was 8), decoder owner/name (was other/name)"
    ]
    assert module.preprocess.std == kept.std and module.preprocess.size == 4
    with pytest.raises(ValueError, match="takes latents of 6 channels, .* has 4"):
        module.follow(SimpleNamespace(preprocess=LatentPreprocess(channels=6, mean=(0.0,) * 6, std=(1.0,) * 6)), "fit")
    with pytest.raises(ValueError, match="the checkpoint takes images, and dataset 'latents' gives latents"):
        module.follow(SimpleNamespace(preprocess=ImagePreprocess()), "fit")
    with pytest.raises(ValueError, match="the checkpoint takes latents, and dataset 'digits' gives images"):
        WholeImages().follow(SimpleNamespace(preprocess=kept), "fit")


def test_a_folder_to_measure_is_recognised(root: Path, tmp_path: Path):
    assert WholeImages.measuring(None, root=str(root))["val"].dataset == "latents"
    assert WholeImages.measuring(None, root=str(tmp_path), split="test")["test"].dataset == "imagefolder"
    assert WholeImages.measuring(None)["val"].dataset == "digits"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 4}, "dataset 'latents' takes no size"),
        ({"channels": 4}, "dataset 'latents' takes no channels"),
        ({"root": None}, "dataset 'latents' needs root"),
        ({"root": "nowhere"}, "nowhere has no index.json; write latents with `zoo generate encode"),
    ],
)
def test_refused_options(root: Path, options: Any, message: str):
    with pytest.raises(ValueError, match=message):
        WholeImages(**{"dataset": "latents", "root": str(root), **options})


def test_broken_folders(copy: Path):
    def refused(split: str = "train") -> str:
        with pytest.raises(ValueError) as error:
            data(copy).find({"train": "fit", "val": "validate", "test": "test"}[split])
        assert "\n" not in str(error.value)
        return str(error.value)

    assert "has no test latents; it has train, val" in refused("test")
    path, other = copy / "train-00001.safetensors", copy / "train-00000.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-10])
    assert refused().startswith(f"{path} is truncated") and "run `zoo generate encode` again" in refused()
    path.write_bytes(other.read_bytes())
    assert f"{path} holds other latents (they differ in names)" in refused()
    save_file({"mean": torch.zeros(3, 2, 4, 4, 4)}, path)
    assert f"{path} does not hold latents of zoo" in refused()
    path.unlink()
    assert f"{path} not found; run `zoo generate encode` again" in refused()
    path.write_bytes(whole)
    index = json.loads((copy / INDEX).read_text())
    for change, message in (
        ({"format": 2}, "format must be 1, got 2"),
        ({"channels": 5}, "mean has 4 values, but channels=5"),
        ({"shards": {"../train-0": {"count": 1, "names": ""}}}, "shard '../train-0' must be the name of a file"),
        ({"extra": 1}, "unknown field 'extra'"),
        ({"classes": "ab"}, "classes must be a list of names, got ab"),
        ({"image": 1.5}, "image must be an integer >= 1, got 1.5"),
        ({"mean": 3}, "mean must be a list of numbers, got 3"),
        ({"shards": {"train-0": 3}}, "shard 'train-0' must have a count and a hash"),
        ({"classes": ["cats"]}, "the labels of .* must be from 0 to 0"),
    ):
        (copy / INDEX).write_text(json.dumps(index | change))
        with pytest.raises(ValueError, match=message):
            data(copy).find("fit")
    (copy / INDEX).write_text(json.dumps({name: index[name] for name in index if name != "std"}))
    assert "it lacks field 'std'" in refused()
    index["shards"][path.name]["count"] = 4
    (copy / INDEX).write_text(json.dumps(index))
    assert f"{path} must hold latents [4, 2, 4, 4, 4], got [3, 2, 4, 4, 4]" in refused()
    (copy / INDEX).write_text("{")
    assert "index.json cannot be read as JSON" in refused()


def test_damaged_moments_are_refused_by_file_and_row(copy: Path):
    path = copy / "train-00001.safetensors"
    with safe_open(path, "pt") as file:
        tensors, metadata = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118
    source = Latents(copy, "train")
    broken = tensors | {"std": tensors["std"].clone()}
    broken["std"][1, 1, 0, 0, 0] = float("inf")
    save_file(broken, path, metadata)
    source.moments(4, False)
    with pytest.raises(ValueError, match="train-00001.safetensors, row 1: the latents are NaN or infinite; delete the"):
        source.moments(4, True)
    for name, value, message in (
        ("labels", None, "has no tensor 'labels'"),
        ("labels", torch.zeros(2), "must hold 3 labels, got torch.float32 .2."),
        ("std", torch.zeros(3, 2, 4, 4, 3), "must hold latents .3, 2, 4, 4, 4., got .3, 2, 4, 4, 3."),
    ):
        kept = {key: each for key, each in (tensors | {name: value}).items() if each is not None}
        save_file(kept, path, metadata)
        with pytest.raises(ValueError, match=message):
            Latents(copy, "train")

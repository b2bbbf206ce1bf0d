"""Latents as a model's input, and the autoencoder that makes them."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import zoo
from encoding import autoencoder
from zoo.inputs import kinds_of
from zoo.inputs.images import ImagePreprocess
from zoo.inputs.latents import Autoencoder, LatentPreprocess
from zoo.weights import CheckpointError

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return autoencoder(tmp_path_factory.mktemp("latents") / "vae")


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    """The autoencoder's folder, to be changed."""
    for name in ("config.json", WEIGHTS):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    return tmp_path


def test_normalised_by_channel_and_back():
    prepare = LatentPreprocess(size=3, channels=2, mean=(1.0, -2.0), std=(2.0, 4.0))
    latents = torch.stack([torch.full((3, 3), 5.0), torch.full((3, 3), 6.0)])
    assert torch.equal(prepare(latents), torch.full((2, 3, 3), 2.0))
    assert torch.equal(prepare(latents.numpy()), torch.full((2, 3, 3), 2.0))
    assert torch.equal(prepare.inverse(prepare(latents)), latents)
    with pytest.raises(ValueError, match=r"latents must be \[2, H, W\], got \[3, 3, 3\]"):
        prepare(torch.zeros(3, 3, 3))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"channels": 6}, "mean has 4 values, but channels=6 needs 6"),
        ({"std": (1.0, 1.0, 0.0, 1.0)}, "std must be >= 1e-6"),
        ({"mean": (1.0, float("nan"), 0.0, 1.0)}, "mean must be a list of numbers"),
        ({"factor": 0}, "factor must be an integer"),
        ({"decoder": None}, "decoder must be a string, got NoneType"),
    ],
)
def test_refused_fields(fields: Any, message: str):
    with pytest.raises(ValueError, match=message):
        LatentPreprocess(**fields)


def test_a_checkpoint_keeps_its_kind_of_preprocessing(tmp_path: Path):
    prepare = LatentPreprocess(size=8, mean=(0.5,) * 4, std=(2.0,) * 4, decoder="owner/name", factor=4)
    options: dict[str, Any] = {"dim": 16, "depth": 1, "heads": 2, "channels": 4, "classes": 2}
    zoo.save_model(zoo.create_model("dit_micro", **options), tmp_path / "made", preprocess=prepare)
    found = zoo.load_checkpoint(tmp_path / "made", check=True)
    assert found.preprocess == prepare and found.config["preprocess"]["kind"] == "latent"
    zoo.save_model(found.model, tmp_path / "again")
    assert zoo.load_checkpoint(tmp_path / "again", check=True).preprocess == prepare
    pixels = ImagePreprocess(size=8, channels=4 - 1)
    with pytest.raises(ValueError, match="preprocess makes 3 channels, but the model takes 4"):
        zoo.save_model(found.model, tmp_path / "other", preprocess=pixels)
    path = tmp_path / "made" / "config.json"
    path.write_text(path.read_text().replace('"latent"', '"boxes"'))
    with pytest.raises(CheckpointError, match="unknown kind of preprocess 'boxes'.*image, latent"):
        zoo.load_checkpoint(tmp_path / "made")


def test_what_may_replace_an_image():
    assert [*kinds_of("image")] == ["image", "latent"] and [*kinds_of("boxes")] == ["boxes"] and not kinds_of(None)


def test_an_autoencoder_is_diffusers_own(folder: Path):
    import diffusers

    theirs: Any = diffusers.AutoencoderKL.from_pretrained(folder, low_cpu_mem_usage=False)  # pyright: ignore
    before = torch.get_rng_state()
    ours = Autoencoder(str(folder))
    assert torch.equal(torch.get_rng_state(), before)
    assert (ours.channels, ours.colours, ours.factor, ours.scaling) == (6, 3, 2, {"scale": 0.18215, "shift": 0.0})
    images = torch.rand(3, 3, 8, 12) * 2 - 1
    mean, std = ours.encode(images)
    with torch.no_grad():
        wanted = theirs.encode(images).latent_dist
        for got, want in ((mean, wanted.mean), (std, wanted.std)):  # another layout of the weights rounds otherwise
            assert torch.allclose(got, want, rtol=0, atol=1e-6)
        latents = torch.randn(11, 6, 4, 6)
        assert torch.allclose(ours.decode(latents), theirs.decode(latents).sample, rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match="gives images that are NaN or infinite"):
        ours.decode(latents * float("nan"))


def test_the_names_of_old_attention_are_read(folder: Path, copy: Path):
    names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    tensors = load_file(copy / WEIGHTS)
    for new, old in names.items():
        tensors = {name.replace(new, old): tensor for name, tensor in tensors.items()}
    save_file(tensors, copy / WEIGHTS, {"format": "pt"})
    assert Autoencoder(str(copy)).fingerprint == Autoencoder(str(folder)).fingerprint


def test_refused_autoencoders(copy: Path, monkeypatch: pytest.MonkeyPatch):
    def refused(name: Path | str = copy) -> str:
        with pytest.raises(ValueError) as error:
            Autoencoder(str(name))
        assert "\n" not in str(error.value)
        return str(error.value)

    assert "is neither a folder" in refused(copy / "nothing")
    assert "has no config.json" in refused(copy.parent)
    whole = (copy / WEIGHTS).read_bytes()
    (copy / WEIGHTS).write_bytes(whole[:5000])
    assert "cannot be loaded" in refused()
    (copy / WEIGHTS).write_bytes(whole)
    tensors = load_file(copy / WEIGHTS)
    gone = tensors.pop("encoder.conv_in.weight")
    save_file(tensors, copy / WEIGHTS, {"format": "pt"})
    assert "tensor 'encoder.conv_in.weight' is missing" in refused()
    torch.save(tensors | {"encoder.conv_in.weight": gone}, copy / "diffusion_pytorch_model.bin")
    (copy / WEIGHTS).unlink()
    assert "only safetensors are read, never a pickle" in refused()
    config = copy / "config.json"
    config.write_text(config.read_text().replace("AutoencoderKL", "AutoencoderDC"))
    assert "must be that of an AutoencoderKL of diffusers, got AutoencoderDC" in refused()
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *given, **options: 1 / 0)
    assert refused("owner/name/vae@main").endswith("cannot be downloaded from the Hub: division by zero")
    monkeypatch.setattr("zoo.inputs.latents.find_spec", lambda name: None)
    assert refused() == 'latents need diffusers; run: pip install "zoo[latents]"'


def test_an_autoencoder_in_a_folder_of_the_hub(copy: Path, monkeypatch: pytest.MonkeyPatch):
    asked: list[Any] = []
    monkeypatch.setattr(
        "huggingface_hub.snapshot_download",
        lambda name, revision, allow_patterns: asked.append((name, revision, allow_patterns)) or copy.parent,
    )
    assert Autoencoder(f"owner/name/{copy.name}@v2").channels == 6
    ((name, revision, patterns),) = asked
    assert (name, revision) == ("owner/name", "v2") and f"{copy.name}/config.json" in patterns
    assert not [each for each in patterns if each.endswith(".bin")]

"""Pipelines of diffusers that hold a DiT: equal outputs, what is known beside the weights, plain refusals."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel
from safetensors.torch import load_file, save_file

from helpers import relative
from hub_server import hub_on_loopback, point_to
from zoo.inputs.latents import LatentPreprocess
from zoo.weights import CheckpointError, load_checkpoint, load_model, save_model

NAMES = {number: f"class {number}" for number in range(10)}
SIZES: dict[str, Any] = {"num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 4, "out_channels": 8}
SIZES |= {"num_layers": 2, "sample_size": 8, "patch_size": 2, "num_embeds_ada_norm": 10}


def transformer(**options: Any) -> Any:
    """diffusers' DiT with random weights; the embeddings of its blocks are equal, as in published ones."""
    torch.manual_seed(0)
    model: Any = DiTTransformer2DModel(**SIZES | options).eval()
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1, generator=generator)
    first = model.transformer_blocks[0].norm1.emb.state_dict()
    for block in model.transformer_blocks[1:]:
        block.norm1.emb.load_state_dict(first)
    return model


def edit(path: Path, **fields: Any) -> None:
    values = json.loads(path.read_text()) | fields
    path.write_text(json.dumps({key: value for key, value in values.items() if value is not ...}))


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pipeline") / "dit"
    blocks = {"block_out_channels": [32, 32, 32, 32], "norm_num_groups": 8, "scaling_factor": 0.25}
    kinds = {"down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4}
    vae: Any = AutoencoderKL(**blocks, **kinds)
    noise = DDIMScheduler(beta_start=0.0001, beta_end=0.02, beta_schedule="linear", clip_sample=False)
    DiTPipeline(transformer(), vae, noise).save_pretrained(folder)
    edit(folder / "model_index.json", id2label=NAMES)  # as the published ones have, and save_pretrained does not write
    (folder / "README.md").write_text("---\nlicense: cc-by-nc-4.0\n---\n")
    return folder


@torch.no_grad()
def compare(theirs: Any, ours: Any) -> float:
    x = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(2))
    steps, labels = torch.tensor([0, 417, 999]), torch.tensor([0, 3, 10])
    wanted = theirs(x, timestep=steps, class_labels=labels).sample
    return relative(ours(x, (steps + 1) / 1000, labels), wanted)


def test_a_folder_gives_what_it_gives_in_diffusers(pipeline, tmp_path):
    found = load_checkpoint(f"hf:{pipeline}")
    theirs: Any = DiTTransformer2DModel.from_pretrained(pipeline / "transformer", low_cpu_mem_usage=False)
    assert theirs.config.norm_eps == 1e-5 and compare(theirs.eval(), found.model) < 1e-5
    assert found.labels == tuple(NAMES.values()) and found.config["license"] == "cc-by-nc-4.0"
    assert found.config["base"] == {"address": "dit", "commit": None, "layout": "diffusers"}
    wanted = LatentPreprocess(size=8, std=(4.0,) * 4, decoder=str(pipeline / "vae"), factor=8)
    assert found.preprocess == wanted
    folder = save_model(found.model, tmp_path / "ours")
    again = load_checkpoint(folder, check=True)
    assert again.labels == found.labels and again.preprocess == wanted
    assert compare(theirs, again.model) < 1e-5


def test_a_repository_on_the_hub(pipeline, tmp_path, monkeypatch):
    with hub_on_loopback() as hub:
        point_to(hub.address, tmp_path / "home", monkeypatch)
        files = {str(path.relative_to(pipeline)): path.read_bytes() for path in pipeline.rglob("*") if path.is_file()}
        commit = hub.put("owner/dit", files, tag="v1")
        for name, more in (("hf:owner/dit", {}), ("hf:owner/dit@v1", {}), ("hf:owner/dit", {"local_files_only": True})):
            found = load_checkpoint(name, **more)
            base = {"address": "https://huggingface.co/owner/dit", "commit": commit, "layout": "diffusers"}
            assert found.config["base"] == base and found.config["license"] == "cc-by-nc-4.0"
            assert found.preprocess.decoder == "owner/dit/vae"  # pyright: ignore
        assert not hub.seen("vae/.*safetensors") and compare(transformer(), found.model) < 1e-5
        hub.put("owner/none", {"README.md": b""})
        with pytest.raises(CheckpointError, match="it has no config.json, so it is not a complete checkpoint"):
            load_model("hf:owner/none")


def test_parts_that_are_not_there(pipeline, tmp_path):
    """An older layout: another class, the table of positions among the tensors, no scheduler, no autoencoder."""
    folder = Path(shutil.copytree(pipeline, tmp_path / "old"))
    shutil.rmtree(folder / "vae")
    shutil.rmtree(folder / "scheduler")
    edit(folder / "transformer" / "config.json", _class_name="Transformer2DModel", cross_attention_dim=None)
    edit(folder / "model_index.json", id2label=...)
    path = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    model = transformer()
    save_file(load_file(path) | {"pos_embed.pos_embed": model.pos_embed.pos_embed.clone()}, path)
    found = load_checkpoint(f"hf:{folder}")
    assert compare(model, found.model) < 1e-5 and found.labels is None
    assert found.preprocess.decoder == "stabilityai/sd-vae-ft-ema"  # pyright: ignore


INDEX, MODEL = "model_index.json", "transformer/config.json"
NOISE, VAE = "scheduler/scheduler_config.json", "vae/config.json"
REFUSED: list[tuple[str, dict[str, Any], str]] = [
    (INDEX, {"_class_name": "StableDiffusionPipeline"}, "the zoo supports DiTPipeline, not 'StableDiffusionPipeline'"),
    (INDEX, {"_class_name": None}, "the zoo supports DiTPipeline, not None"),
    (INDEX, {"id2label": {"0": "a"}}, "id2label: it has 1 names, but the model 10 classes"),
    (INDEX, {"id2label": [1]}, "id2label: it must be an object"),
    (MODEL, {"_class_name": "PixArtTransformer2DModel"}, "_class_name: the zoo supports 'DiTTransformer2DModel' or"),
    (MODEL, {"activation_fn": "gelu"}, "activation_fn: the zoo supports 'gelu-approximate', not 'gelu'"),
    (MODEL, {"activation_fn": None}, "activation_fn: .* not null"),
    (MODEL, {"norm_eps": 0.1}, "norm_eps: the zoo supports 1e-05 or 1e-06, not 0.1"),
    (MODEL, {"norm_type": "ada_norm_single"}, "norm_type: the zoo supports 'ada_norm_zero'"),
    (MODEL, {"norm_elementwise_affine": True}, "norm_elementwise_affine: the zoo supports false"),
    (MODEL, {"attention_bias": False}, "attention_bias: the zoo supports true"),
    (MODEL, {"cross_attention_dim": 8}, "cross_attention_dim: the zoo supports null, not 8"),
    (MODEL, {"out_channels": 5}, "out_channels: the zoo supports 4 or 8, not 5"),
    (MODEL, {"out_channels": None}, "describes a model with variance=False, but the tensors are those of True"),
    (MODEL, {"sample_size": 16}, "describes a model with image=16, but the tensors are those of 8"),
    (MODEL, {"num_layers": 3}, "describes a model with depth=3, but the tensors are those of 2"),
    (MODEL, {"num_attention_heads": 4}, "describes a model with dim=64, but the tensors are those of 32"),
    (MODEL, {"num_embeds_ada_norm": 9}, "describes a model with classes=9, but the tensors are those of 10"),
    (MODEL, {"patch_size": 4}, "describes a model with patch=4, but the tensors are those of 2"),
    (MODEL, {"windows": 4}, "windows: the zoo does not know this key"),
    (NOISE, {"beta_end": 0.012}, "beta_end: the zoo supports 0.02, not 0.012"),
    (NOISE, {"beta_schedule": "scaled_linear"}, "beta_schedule: the zoo supports 'linear'"),
    (NOISE, {"prediction_type": "v_prediction"}, "prediction_type: the zoo supports 'epsilon'"),
    (NOISE, {"num_train_timesteps": 500}, "num_train_timesteps: the zoo supports 1000, not 500"),
    (VAE, {"latent_channels": 16}, "latent_channels: the transformer has 4, not 16"),
    (VAE, {"scaling_factor": 0}, "scaling_factor: it must be positive"),
    (VAE, {"_class_name": "VQModel"}, "_class_name: the zoo supports 'AutoencoderKL'"),
]


@pytest.mark.parametrize(("file", "change", "words"), REFUSED, ids=str)
def test_what_does_not_fit_is_refused(file, change, words, pipeline, tmp_path):
    folder = Path(shutil.copytree(pipeline, tmp_path / "dit"))
    edit(folder / file, **change)
    if "sample_size" in change:
        path = folder / "transformer" / "diffusion_pytorch_model.safetensors"
        save_file(load_file(path) | {"pos_embed.pos_embed": transformer().pos_embed.pos_embed.clone()}, path)
    with pytest.raises(CheckpointError, match=words) as found:
        load_model(f"hf:{folder}")
    assert "\n" not in str(found.value) and str(folder) in str(found.value)


def test_broken_folders_are_refused(pipeline, tmp_path):
    for file in ("transformer/config.json", "transformer/diffusion_pytorch_model.safetensors"):
        folder = Path(shutil.copytree(pipeline, tmp_path / file.replace("/", "-")))
        (folder / file).unlink()
        with pytest.raises(CheckpointError, match=str(folder)) as found:
            load_model(f"hf:{folder}")
        assert "\n" not in str(found.value)

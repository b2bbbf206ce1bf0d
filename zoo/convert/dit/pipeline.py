"""A DiT in the folders of a pipeline of diffusers, read without that library: transformer, scheduler, autoencoder."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from zoo.convert.dit.diffusers import from_diffusers
from zoo.convert.source import Section
from zoo.convert.transformers.files import id_names, read_folder, read_json
from zoo.inputs.latents import LatentPreprocess
from zoo.models.dit import DiT
from zoo.text import one_line

PIPELINE = "model_index.json"
FILES = [PIPELINE, "README.md", "scheduler/scheduler_config.json", "vae/config.json"]
FILES += [f"transformer/{each}" for each in ("config.json", "*.safetensors", "*.safetensors.index.json")]
"""What is downloaded of a pipeline on the Hub."""

_HARMLESS = ("_diffusers_version", "_name_or_path", "dropout", "norm_num_groups", "upcast_attention")
_HARMLESS += ("use_linear_projection",)
# Fields that other models of the class Transformer2DModel set.
_ABSENT = ("num_vector_embeds", "cross_attention_dim", "caption_channels", "interpolation_scale")
_ABSENT += ("use_additional_conditions",)


class ConvertedGenerator(NamedTuple):
    """A generator of another library: the model in eval mode, its preprocessing and the names of its classes; the last
    two are None if the files do not say them."""

    model: DiT
    preprocess: LatentPreprocess | None
    labels: tuple[str, ...] | None


def convert_pipeline(folder: Path, name: str | None = None) -> ConvertedGenerator:
    """Converts a DiTPipeline. The model gives what diffusers gives, with its frequencies of the time (shift=1).

    Args:
        folder: with model_index.json.
        name: of the repository on the Hub, where the autoencoder is then found; None for that in the folder.

    Raises:
        ValueError: in one line with the file: it is another pipeline, a field is not supported or unknown, the noise is
            not that of the zoo's ddpm, or a tensor is missing, unused or of a wrong shape.
    """
    path = folder / PIPELINE
    index = Section(read_json(path), "", str(path))
    if (kind := index.left.get("_class_name")) != "DiTPipeline":
        raise index.refused("_class_name", f"the zoo supports DiTPipeline, not {kind!r}")
    model = _transformer(folder / "transformer")
    _check_noise(folder / "scheduler" / "scheduler_config.json")
    names = None
    if index.left.get("id2label") is not None:
        names = tuple(id_names(index.left, index))
        if len(names) != model.config.classes:
            raise index.refused("id2label", f"it has {len(names)} names, but the model {model.config.classes} classes")
        names = names if len(set(names)) == len(names) else None
    return ConvertedGenerator(model, _latents(folder, model, name), names)


def _transformer(folder: Path) -> DiT:
    path = folder / "config.json"
    given = Section(read_json(path), "", str(path))
    given.fixed("_class_name", "DiTTransformer2DModel", "Transformer2DModel")
    heads, width = given.whole("num_attention_heads", 16), given.whole("attention_head_dim", 72)
    channels = given.whole("in_channels", 4)
    outputs = given.whole("out_channels", channels, null=channels)
    if outputs not in (channels, 2 * channels):
        raise given.refused("out_channels", f"the zoo supports {channels} or {2 * channels}, not {outputs}")
    wanted = {
        "dim": heads * width,
        "depth": given.whole("num_layers", 28),
        "channels": channels,
        "patch": given.whole("patch_size", 2),
        "classes": given.whole("num_embeds_ada_norm", 1000),
        "variance": outputs != channels,
    }
    image = given.whole("sample_size", 32)
    for key, allowed in {
        "activation_fn": ("gelu-approximate",),
        "attention_bias": (True,),
        "attention_type": ("default",),
        "double_self_attention": (False,),
        "norm_elementwise_affine": (False,),
        "norm_eps": (1e-5, 1e-6),  # too near to tell apart
        "norm_type": ("ada_norm_zero",),
        "only_cross_attention": (False,),
        **dict.fromkeys(_ABSENT, (None,)),
    }.items():
        given.fixed(key, *allowed)
    given.finish(*_HARMLESS)
    try:
        model = from_diffusers(read_folder(folder, "diffusion_pytorch_model"), heads=heads, image=image, shift=1.0)
    except ValueError as error:
        raise ValueError(one_line(f"{folder}: {error}")) from error
    for field, value in (wanted | {"image": image}).items():
        if (found := getattr(model.config, field)) != value:
            raise ValueError(f"{path}: it describes a model with {field}={value}, but the tensors are those of {found}")
    return model


def _check_noise(path: Path) -> None:
    """ValueError if a scheduler's noise is not that of the zoo's ddpm. How it samples is chosen with every call."""
    given = Section(read_json(path) if path.is_file() else {}, "", str(path))
    for key, value in (
        ("beta_start", 0.0001),
        ("beta_end", 0.02),
        ("beta_schedule", "linear"),
        ("num_train_timesteps", 1000),
        ("prediction_type", "epsilon"),
        ("rescale_betas_zero_snr", False),
        ("trained_betas", None),
    ):
        given.fixed(key, value)


def _latents(folder: Path, model: DiT, name: str | None) -> LatentPreprocess | None:
    """The preprocessing that the autoencoder beside the model needs; that of Stable Diffusion if there is none."""
    path = folder / "vae" / "config.json"
    if not path.is_file():
        return model.preprocess
    given = Section(read_json(path), "", str(path))
    given.fixed("_class_name", "AutoencoderKL")
    channels = given.whole("latent_channels", 4)
    if channels != model.config.channels:
        raise given.refused("latent_channels", f"the transformer has {model.config.channels}, not {channels}")
    scale = given.take("scaling_factor", float, 0.18215)
    if not 1e-6 < scale < 1e6:
        raise given.refused("scaling_factor", f"it must be positive, got {scale!r}")
    shift = given.take("shift_factor", float, 0.0, null=0.0)
    blocks = given.take("block_out_channels", list, [64])
    made: Mapping[str, Any] = {"mean": (float(shift),) * channels, "std": (1 / scale,) * channels}
    try:
        return LatentPreprocess(
            size=model.config.image,
            channels=channels,
            decoder=f"{name}/vae" if name else str(path.parent),
            factor=2 ** (len(blocks) - 1),
            **made,
        )
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error

"""From the latents of an autoencoder to a model's input and back, and the autoencoder itself (the extra `latents`)."""

from __future__ import annotations

import hashlib
import logging
import re
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from zoo.inputs.base import Preprocess, check_integer, is_number
from zoo.text import from_json, one_line, reason

MISSING = 'latents need diffusers; run: pip install "zoo[latents]"'
FILES = ("config.json", "*.safetensors", "*.safetensors.index.json")
PART = 8  # latents that are decoded at once


@dataclass(frozen=True, kw_only=True)
class LatentPreprocess(Preprocess):
    """Normalises latents with a mean and a standard deviation per channel; stored in a checkpoint's `config.json`.

    Args:
        size: side of the latents.
        channels: their channels.
        mean: mean to subtract, one value per channel.
        std: standard deviation to divide by, one value per channel.
        decoder: the autoencoder that made them: a folder, or its name on the Hub.
        factor: pixels of an image per side of a latent.

    Raises:
        ValueError: a value is out of range, or `mean` or `std` does not have one value per channel.
    """

    replaces: ClassVar[str] = "image"
    shared = ("channels",)
    raw = "latents"

    size: int = 32
    channels: int = 4
    mean: tuple[float, ...] = (0.0,) * 4
    std: tuple[float, ...] = (1.0,) * 4
    decoder: str = ""
    factor: int = 8

    def __post_init__(self) -> None:
        for name in ("size", "channels", "factor"):
            check_integer(name, getattr(self, name), 65_536)
        for name in ("mean", "std"):
            values = getattr(self, name)
            if not isinstance(values, (tuple, list)) or not all(map(is_number, values)):
                raise ValueError(f"{name} must be a list of numbers, got {one_line(values, 100)}")
            if len(values) != self.channels:
                raise ValueError(f"{name} has {len(values)} values, but channels={self.channels} needs {self.channels}")
            object.__setattr__(self, name, tuple(float(value) for value in values))
        if min(self.std) < 1e-6:
            raise ValueError(f"std must be >= 1e-6, got {list(self.std)}")
        if not isinstance(self.decoder, str):
            raise ValueError(f"decoder must be a string, got {type(self.decoder).__name__}")

    @property
    def shape(self) -> tuple[int, int]:
        """The height and width of the latents."""
        return self.size, self.size

    def __call__(self, latents: Tensor | np.ndarray, /) -> Tensor:
        """Latents [..., channels, H, W] as the model takes them, float32; ValueError for another number of channels."""
        values = torch.as_tensor(latents, dtype=torch.float32)
        if values.ndim < 3 or values.shape[-3] != self.channels:
            raise ValueError(f"latents must be [{self.channels}, H, W], got {list(values.shape)}")
        mean, std = self._statistics(values)
        return (values - mean) / std

    def inverse(self, x: Tensor) -> Tensor:
        """Latents from what the model takes or gives [..., channels, H, W]."""
        mean, std = self._statistics(x)
        return x * std + mean

    def sample(self, generator: torch.Generator) -> Tensor:
        mean, std = self._statistics(torch.empty(0, device="cpu"))
        return mean + std * torch.randn(self.channels, self.size, self.size, generator=generator, device="cpu")

    def _statistics(self, like: Tensor) -> list[Tensor]:
        return [like.new_tensor(each)[:, None, None] for each in (self.mean, self.std)]


class Autoencoder:
    """diffusers' AutoencoderKL, in float32 and eval mode. Images have values from -1 to 1.

    `channels` are those of its latents, `colours` those of its images, `factor` the pixels per side of a latent,
    `scaling` the scale and shift that its makers multiply and subtract, `fingerprint` a hash of its weights.

    Args:
        name: a folder in diffusers' layout; or OWNER/NAME on the Hub, with /FOLDER in it, with @REVISION.

    Raises:
        ValueError: diffusers is not installed, or there is no complete AutoencoderKL in safetensors; in one line.
    """

    def __init__(self, name: str) -> None:
        if not is_installed():
            raise ValueError(MISSING)
        self.name = name
        folder = located(name)
        self.model: Any = _loaded(folder)
        config = self.model.config
        self.channels, self.colours = int(config.latent_channels), int(config.in_channels)
        self.factor = 2 ** (len(config.block_out_channels) - 1)
        self.scaling = {"scale": float(config.scaling_factor), "shift": float(config.shift_factor or 0.0)}

    @property
    def fingerprint(self) -> str:
        found = hashlib.sha256()
        for name, tensor in sorted(self.model.state_dict().items()):
            found.update(name.encode() + tensor.cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        return found.hexdigest()[:16]

    def to(self, device: Any) -> Autoencoder:
        self.model.to(device)
        return self

    @torch.no_grad()
    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """The mean and the standard deviation of the latents [B, channels, H / factor, W / factor] of images."""
        found = self.model.encode(images.to(self.model.device)).latent_dist
        return found.mean, found.std

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Images [B, colours, H * factor, W * factor] from latents."""
        parts = latents.float().to(self.model.device).split(PART)
        images = torch.cat([self.model.decode(part).sample for part in parts])
        if not bool(images.isfinite().all()):
            raise ValueError(f"decoder {self.name} gives images that are NaN or infinite")
        return images


def is_installed() -> bool:
    """Whether the package of the autoencoder is installed."""
    return find_spec("diffusers") is not None


def located(name: str) -> Path:
    """The folder of an autoencoder, downloaded if it is on the Hub and not here yet; ValueError if not found."""
    if (folder := Path(name).expanduser()).is_dir():
        return folder
    path, _, revision = name.partition("@")
    found = re.fullmatch(r"(\w[\w.-]*/\w[\w.-]*)((?:/\w[\w.-]*)*)", path)
    if folder.exists() or found is None:
        raise ValueError(f"decoder '{name}' is neither a folder in diffusers' layout nor OWNER/NAME on the Hub")
    import huggingface_hub

    inside = found[2].strip("/")
    allowed = [f"{inside}/{each}" if inside else each for each in FILES]
    try:
        here = huggingface_hub.snapshot_download(found[1], revision=revision or None, allow_patterns=allowed)
    except Exception as error:  # the client raises its own errors, those of its network library, and the system's
        raise ValueError(one_line(f"decoder '{name}' cannot be downloaded from the Hub: {reason(error)}")) from error
    return Path(here, inside)


def _check_config(path: Path) -> None:
    """ValueError if a config.json is not that of an AutoencoderKL."""
    try:
        found = from_json(path.read_bytes())
    except FileNotFoundError:
        raise ValueError(f"decoder {path.parent} has no config.json; give a folder in diffusers' layout") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read as JSON: {reason(error)}") from error
    kind = found.get("_class_name") if isinstance(found, dict) else None
    if kind != "AutoencoderKL":
        raise ValueError(one_line(f"{path} must be that of an AutoencoderKL of diffusers, got {kind}"))


def _loaded(folder: Path) -> Any:
    """diffusers' model; ValueError if it is not complete."""
    _check_config(folder / "config.json")
    if not [*folder.glob("*.safetensors")]:
        raise ValueError(f"decoder {folder} has no .safetensors file; only safetensors are read, never a pickle")
    import diffusers
    from diffusers.utils import logging as messages

    kind: Any = diffusers.AutoencoderKL  # pyright: ignore[reportPrivateImportUsage]
    options: dict[str, Any] = {"use_safetensors": True, "local_files_only": True, "low_cpu_mem_usage": False}
    options |= {"torch_dtype": torch.float32, "output_loading_info": True}
    verbosity = messages.get_verbosity()
    messages.set_verbosity(logging.CRITICAL)
    try:
        with torch.random.fork_rng(devices=[]):
            model, facts = kind.from_pretrained(folder, **options)
    except Exception as error:  # a broken file or config may raise any error in a constructor
        raise ValueError(one_line(f"decoder {folder} cannot be loaded: {reason(error)}")) from error
    finally:
        messages.set_verbosity(verbosity)
    for fault in ("missing", "unexpected", "mismatched"):
        if names := sorted(map(str, facts[f"{fault}_keys"])):
            raise ValueError(f"decoder {folder} does not fit its config.json: tensor '{names[0]}' is {fault}")
    return model.eval().requires_grad_(False)

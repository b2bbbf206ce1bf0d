"""What the tests of latents share: a tiny autoencoder of diffusers, and folders of images."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from zoo.data.latents import Index, Tag, digest, write_index, write_shard

SPLITS = {"train": 5, "val": 2}  # images of each class


def autoencoder(folder: Path, channels: int = 6, seed: int = 0, **options: Any) -> Path:
    """A random AutoencoderKL in its real layout: 2 pixels per side of a latent."""
    import diffusers

    given: dict[str, Any] = {"block_out_channels": (8, 8), "norm_num_groups": 4, "latent_channels": channels}
    given |= {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    kind: Any = diffusers.AutoencoderKL  # pyright: ignore[reportPrivateImportUsage]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = kind(**given | options)
    model.save_pretrained(folder)
    return folder


def images(root: Path, splits: dict[str, int] = SPLITS, side: int = 20) -> Path:
    """An imagefolder of two classes."""
    for split, number in splits.items():
        for label, name in enumerate(("cats", "dogs")):
            folder = root / split / name
            folder.mkdir(parents=True)
            for index in range(number):
                draw = np.random.default_rng([len(split), label, index])
                values = draw.integers(256, size=(4, 5, 3), dtype=np.uint8)
                Image.fromarray(values).resize((side + 4, side)).save(folder / f"{index}.png")
    return root


def cache(root: Path, splits: dict[str, tuple[int, ...]], channels: int = 4, side: int = 4) -> Path:
    """A folder of random latents as `zoo generate encode` writes it, with shards of so many images."""
    root.mkdir()
    generator, shards = torch.Generator().manual_seed(0), dict[str, dict[str, Any]]()
    for split, counts in splits.items():
        for number, count in enumerate(counts):
            name, names = f"{split}-{number:05d}.safetensors", digest([split, str(number)])
            mean = 2 + 3 * torch.randn(count, 2, channels, side, side, generator=generator)
            std = 0.5 * torch.rand(mean.shape, generator=generator)
            labels = torch.arange(count) % 2
            write_shard(
                root / name, Tag(autoencoder="a", image=2 * side, dtype="float32", names=names), mean, std, labels
            )
            shards[name] = {"count": count, "names": names}
    facts: dict[str, Any] = {"decoder": "owner/name", "autoencoder": "a", "scaling": {}, "image": 2 * side, "factor": 2}
    facts |= {"channels": channels, "dtype": "float32", "mean": [2.0] * channels, "std": [3.0] * channels}
    write_index(root, Index(**facts, classes=["cats", "dogs"], shards=shards))
    return root

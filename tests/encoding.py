"""What the tests of latents share: a tiny autoencoder of diffusers, and folders of images."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

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

"""Features of utterances in a folder, so that audio is decoded once for all epochs and runs."""

import hashlib
import json
import os
import secrets
from pathlib import Path

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from zoo.inputs.audio import AudioPreprocess
from zoo.text import reason

VERSION = 1  # to be raised when the same audio and preprocess give other values


class FeatureCache:
    """A folder of features. It may be shared by processes and runs; a file is complete or absent.

    Args:
        folder: where files are written, made if need be.
        preprocess: how features are made; others have other files.
        dither: seed and strength of the dither, if there is any.
    """

    def __init__(self, folder: str, preprocess: AudioPreprocess, dither: tuple[float, ...] = ()):
        self.folder, self.full = Path(folder), False
        self.setting = json.dumps([preprocess.to_dict(), VERSION, *dither], sort_keys=True)

    def _path(self, identity: str) -> Path:
        name = hashlib.sha256(f"{self.setting}\n{identity}".encode()).hexdigest()
        return self.folder / name[:2] / f"{name}.safetensors"

    def read(self, identity: str) -> tuple[Tensor, bool, bool] | None:
        """Features float32 [T, mels], whether the audio is silent, and whether it is clipped; None if there is no
        file, or a damaged one."""
        from safetensors import SafetensorError
        from safetensors.torch import load

        try:
            found = load(self._path(identity).read_bytes())
            features, (silent, clipped) = found["features"], found["flags"].tolist()
        except (OSError, SafetensorError, KeyError, TypeError, ValueError):
            return None
        mels = json.loads(self.setting)[0]["mels"]
        fits = features.dtype == torch.float32 and features.ndim == 2 and features.shape[1] == mels
        return (features, bool(silent), bool(clipped)) if fits else None

    def write(self, identity: str, features: Tensor, silent: bool, clipped: bool) -> None:
        """Writes features; a process warns once if that fails, and writes no more."""
        from safetensors.torch import save

        if self.full:
            return
        content = save({"features": features.contiguous(), "flags": torch.tensor([silent, clipped])})
        path = self._path(identity)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            aside = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
            try:
                aside.write_bytes(content)
                os.replace(aside, path)
            finally:
                aside.unlink(missing_ok=True)
        except OSError as error:
            self.full = True
            rank_zero_warn(f"data.cache: cannot write to {self.folder}: {reason(error)}; features are computed again")

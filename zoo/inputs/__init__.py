"""How raw data becomes a model's input, by the input kind of a family's config. A new kind is a file and a row."""

from zoo.inputs.audio import AudioPreprocess
from zoo.inputs.base import Preprocess
from zoo.inputs.boxes import BoxPreprocess
from zoo.inputs.images import ImagePreprocess
from zoo.inputs.latents import LatentPreprocess

INPUTS: dict[str, type[Preprocess]] = {
    "image": ImagePreprocess,
    "latent": LatentPreprocess,
    "boxes": BoxPreprocess,
    "audio": AudioPreprocess,
}


def kinds_of(wanted: str | None) -> dict[str, type[Preprocess]]:
    """The rows of INPUTS that models of such an input can have, the usual one first; none for None."""
    return {name: kind for name, kind in INPUTS.items() if wanted is not None and wanted in (name, kind.replaces)}

"""How raw data becomes a model's input, by the input kind of a family's config. A new kind is a file and a row."""

from zoo.inputs.audio import AudioPreprocess
from zoo.inputs.base import Preprocess
from zoo.inputs.boxes import BoxPreprocess
from zoo.inputs.images import ImagePreprocess

INPUTS: dict[str, type[Preprocess]] = {"image": ImagePreprocess, "boxes": BoxPreprocess, "audio": AudioPreprocess}

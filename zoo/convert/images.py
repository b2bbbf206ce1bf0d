"""What the conversions of image classifiers share."""

from typing import NamedTuple

from zoo.inputs.images import ImagePreprocess
from zoo.models.vit import ViT


class ConvertedClassifier(NamedTuple):
    """An image classifier of another library: the model in eval mode, its preprocessing, and the names of its classes.
    The last two are None if the files do not hold them."""

    model: ViT
    preprocess: ImagePreprocess | None
    labels: tuple[str, ...] | None

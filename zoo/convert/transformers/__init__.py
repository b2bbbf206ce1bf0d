"""Hugging Face's transformers."""

from pathlib import Path

from zoo.convert.detection import ConvertedDetector
from zoo.convert.images import ConvertedClassifier
from zoo.convert.speech import Converted
from zoo.convert.transformers.detectors import convert_detector
from zoo.convert.transformers.files import located, read_json
from zoo.convert.transformers.parakeet import convert_parakeet
from zoo.convert.transformers.vit import VISION, convert_vit

__all__ = ["from_transformers"]

_KINDS = {"parakeet_ctc": convert_parakeet, "parakeet_encoder": convert_parakeet}
_KINDS |= dict.fromkeys(("detr", "rt_detr", "rt_detr_v2", "d_fine"), convert_detector)
_KINDS |= dict.fromkeys(VISION, convert_vit)


def from_transformers(name: str | Path) -> Converted | ConvertedClassifier | ConvertedDetector:
    """Converts a model of transformers, as `save_pretrained` writes it in version 4 or 5, with equal outputs in eval
    mode. Only JSON and safetensors are read, and transformers is not imported. What acts only in training is not
    copied.

    - ParakeetForCTC and ParakeetEncoder become a Conformer. The blank, transformers' pad_token_id, becomes the last
      output.
    - DetrForObjectDetection becomes a DETR with padding="published", so that padded batches are as there too;
      `dataclasses.replace(model.config, padding="hidden")` hides it. RTDetrForObjectDetection,
      RTDetrV2ForObjectDetection and DFineForObjectDetection become an RTDETR. Backbones are resnets, or for D-FINE
      HGNetV2. Classes named N/A, ids that COCO does not use, are left out.
    - ViT, DeiT and DINOv2, with and without registers, become a ViT, with the head of their ForImageClassification
      (also DeiT's ForImageClassificationWithTeacher). Without a head it gives the normalized class token; the pooler
      and the mask token are left out. Images of any size whose sides the patch divides give the same output, for ViT
      and DeiT as with interpolate_pos_encoding=True.

    Args:
        name: a folder with config.json and model.safetensors, or OWNER/NAME[@REVISION] on the Hugging Face Hub.

    Returns:
        The model in eval mode; its preprocessing; and its tokenizer, its categories or the names of its classes. For
        speech models the preprocessing is NVIDIA's usual one if no file gives it, and the tokenizer is None if
        tokenizer.json does not hold the pieces of sentencepiece. For the others the preprocessing is None without
        preprocessor_config.json. Images of classifiers are resized as version 5 does with torchvision, or with PIL if
        the file names such a processor.

    Raises:
        ValueError: in one line with the file: it cannot be read, a field of the config is not supported or
            unknown, or a tensor is missing, unused or of a wrong shape.
    """
    folder = Path(name).expanduser()
    folder = folder if folder.is_dir() else located(str(name))
    kind = read_json(folder / "config.json").get("model_type")
    if not isinstance(kind, str) or kind not in _KINDS:
        raise ValueError(f"{folder / 'config.json'}: model_type: the zoo supports {', '.join(_KINDS)}, not {kind!r}")
    return _KINDS[kind](folder)

"""Hugging Face's transformers."""

from pathlib import Path

from zoo.convert.detection import ConvertedDetector
from zoo.convert.speech import Converted
from zoo.convert.transformers.detectors import convert_detector
from zoo.convert.transformers.files import located, read_json
from zoo.convert.transformers.parakeet import convert_parakeet

__all__ = ["from_transformers"]

_KINDS = {"parakeet_ctc": convert_parakeet, "parakeet_encoder": convert_parakeet}
_KINDS |= dict.fromkeys(("detr", "rt_detr", "rt_detr_v2", "d_fine"), convert_detector)


def from_transformers(name: str | Path) -> Converted | ConvertedDetector:
    """Converts a model of transformers, as `save_pretrained` writes it in version 4 or 5, with equal outputs in eval
    mode. Only JSON and safetensors are read, and transformers is not imported. What acts only in training is not
    copied.

    - ParakeetForCTC and ParakeetEncoder become a Conformer. The blank, transformers' pad_token_id, becomes the last
      output.
    - DetrForObjectDetection becomes a DETR with padding="published", so that padded batches are as there too;
      `dataclasses.replace(model.config, padding="hidden")` hides it. RTDetrForObjectDetection,
      RTDetrV2ForObjectDetection and DFineForObjectDetection become an RTDETR. Backbones are resnets, or for D-FINE
      HGNetV2. Classes named N/A, ids that COCO does not use, are left out.

    Args:
        name: a folder with config.json and model.safetensors, or OWNER/NAME[@REVISION] on the Hugging Face Hub.

    Returns:
        The model in eval mode; its preprocessing; and its tokenizer or its categories. For speech models the
        preprocessing is NVIDIA's usual one if no file gives it, and the tokenizer is None if tokenizer.json does not
        hold the pieces of sentencepiece; for detectors without preprocessor_config.json the preprocessing is None.

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

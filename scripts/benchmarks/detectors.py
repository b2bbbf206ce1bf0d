"""Detectors against those of transformers, with the same weights."""

import argparse
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.metadata import version
from typing import Any

import torch
from tqdm import tqdm

import zoo
from benchmarks.measure import (
    Call,
    NotMeasured,
    Row,
    agree,
    interleaved,
    markdown,
    milliseconds,
    randomise,
    ratio_cell,
    timed,
)
from zoo.convert import from_transformers

SIDE = 640


def _rtdetr() -> Any:
    """transformers' RT-DETRv2-R18 as published."""
    from transformers import RTDetrResNetConfig, RTDetrV2Config, RTDetrV2ForObjectDetection

    stages = {"layer_type": "basic", "depths": [2, 2, 2, 2], "hidden_sizes": [64, 128, 256, 512]}
    backbone = RTDetrResNetConfig(**stages, out_features=["stage2", "stage3", "stage4"])
    given: dict[str, Any] = {"encoder_in_channels": [128, 256, 512], "decoder_layers": 3, "hidden_expansion": 0.5}
    return RTDetrV2ForObjectDetection(RTDetrV2Config(backbone_config=backbone, num_labels=80, **given))


def _detr() -> Any:
    """transformers' DETR-R50 as published."""
    from transformers import DetrConfig, DetrForObjectDetection

    return DetrForObjectDetection(DetrConfig(num_labels=91, use_pretrained_backbone=False))


RIVALS: Mapping[str, Callable[[], Any]] = {"RT-DETRv2-R18": _rtdetr, "DETR-R50": _detr}


def calls(name: str, side: int) -> dict[str, Call]:
    """transformers' model, ours with its weights, and ours folded, on one image. ValueError where they differ."""
    try:
        import transformers
    except ImportError:
        raise NotMeasured("transformers is not installed") from None
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    theirs = randomise(RIVALS[name]()).eval()
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        ours: Any = from_transformers(folder).model
    folded = zoo.fuse(ours)
    images = torch.randn(1, 3, side, side)
    with torch.no_grad():
        wanted = theirs(images)
        # The best tokens are compared, and not the queries: near ties among these may be ordered differently.
        for kind, model in (("ours", ours), ("ours, folded", folded)):
            if name == "DETR-R50":
                agree(kind, model(images)["logits"], "transformers", wanted.logits)
            else:
                scores, _ = model.rank(*model.encode(images))
                agree(kind, scores, "transformers", wanted.enc_outputs_class)

    def run(model: Any) -> Call:
        def call() -> object:
            with torch.inference_mode():
                return model(images)

        return call

    return {"theirs": run(theirs), "ours": run(ours), "ours, folded": run(folded)}


def against_transformers(options: argparse.Namespace) -> Iterator[Row]:
    """Time of ours as a share of transformers'."""
    for name in tqdm(options.detectors, desc="detectors"):
        compared = calls(name, options.detector_side)
        taken = interleaved(compared, compared["theirs"], options)
        for form in ("ours", "ours, folded"):
            row: Row = {"model": name, "what": form, "side": options.detector_side}
            row |= {"base": f"transformers {version('transformers')}", "ms": milliseconds(taken[form])}
            row |= {"base_ms": milliseconds(taken["theirs"]), "pairs": len(taken[form])}
            yield row | timed("ratio", taken[form], taken["theirs"]) | timed("noise", taken["again"], taken["theirs"])


def table(rows: Sequence[Row]) -> str:
    """A row for each model, as it is and folded."""
    header = ("model", "what", "px", "ms", "ms against", "ratio (quartiles)", "noise (quartiles)")
    lines = []
    for row in rows:
        times = [f"{row['ms']:.1f}", f"{row['base_ms']:.1f}"]
        named = [str(row[column]) for column in ("model", "what", "side")]
        lines.append([*named, *times, ratio_cell(row, "ratio"), ratio_cell(row, "noise")])
    return f"{markdown(header, lines)}\n\nAgainst {rows[0]['base']}, with the same weights."

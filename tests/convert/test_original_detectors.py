"""Detectors of the original code, in every layout of their files: equal outputs, plain errors."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    DFineForObjectDetection,
)

from models.test_distribution import published
from published_detectors import (
    SMALL,
    compare_detr,
    compare_rtdetr,
    detr,
    dfine,
    rtdetr,
    timm,
    written,
)
from zoo.convert import from_detr, from_transformers
from zoo.models import PRESETS
from zoo.outputs.label_map import LabelMap

# The original code

DETR_TO_ORIGINAL = (
    (r"^model\.backbone\.model\.", "backbone.0.body."),
    (r"^model\.input_projection\.", "input_proj."),
    (r"^model\.query_position_embeddings\.", "query_embed."),
    (r"^model\.decoder\.layernorm\.", "transformer.decoder.norm."),
    (r"^model\.(en|de)coder\.", r"transformer.\1coder."),
    (r"^class_labels_classifier\.", "class_embed."),
    (r"^bbox_predictor\.", "bbox_embed."),
    (r"\.encoder_attn\.", ".multihead_attn."),
    (r"(transformer\.encoder\..*)\.final_layer_norm\.", r"\1.norm2."),
    (r"\.encoder_attn_layer_norm\.", ".norm2."),
    (r"\.final_layer_norm\.", ".norm3."),
    (r"\.self_attn_layer_norm\.", ".norm1."),
    (r"\.o_proj\.", ".out_proj."),
    (r"\.mlp\.fc(\d)\.", r".linear\1."),
)
RTDETR_TO_ORIGINAL = (
    (r"^model\.backbone\.model\.embedder\.embedder\.0\.", "backbone.conv1.conv1_1."),
    (r"^model\.backbone\.model\.embedder\.embedder\.1\.", "backbone.conv1.conv1_2."),
    (r"^model\.backbone\.model\.embedder\.embedder\.2\.", "backbone.conv1.conv1_3."),
    (r"^model\.backbone\.model\.encoder\.stages\.(\d)\.layers\.(\d+)\.", r"backbone.res_layers.\1.blocks.\2."),
    (r"\.layer\.0\.", ".branch2a."),
    (r"\.layer\.1\.", ".branch2b."),
    (r"\.layer\.2\.", ".branch2c."),
    (r"\.shortcut\.1\.", ".short.conv."),
    (r"\.shortcut\.", ".short."),
    (r"\.convolution\.", ".conv."),
    (r"\.normalization\.", ".norm."),
    (r"^model\.(en|de)coder_input_proj\.(\d)\.0\.", r"\1coder.input_proj.\2.conv."),
    (r"^model\.(en|de)coder_input_proj\.(\d)\.1\.", r"\1coder.input_proj.\2.norm."),
    (r"^model\.encoder\.aifi\.", "encoder.encoder."),
    (r"^model\.encoder\.", "encoder."),
    (r"^model\.decoder\.query_pos_head\.", "decoder.query_pos_head."),
    (r"^model\.decoder\.", "decoder.decoder."),
    (r"^model\.enc_output\.0\.", "decoder.enc_output.proj."),
    (r"^model\.enc_output\.1\.", "decoder.enc_output.norm."),
    (r"^model\.(enc_|denoising)", r"decoder.\1"),
    (r"^class_embed\.", "decoder.dec_score_head."),
    (r"^bbox_embed\.", "decoder.dec_bbox_head."),
    (r"\.encoder_attn\.", ".cross_attn."),
    (r"\.n_points_scale", ".num_points_scale"),
    (r"(encoder\.encoder\..*)\.final_layer_norm\.", r"\1.norm2."),
    *DETR_TO_ORIGINAL[9:],
)


DFINE_TO_ORIGINAL = (
    (r"^model\.backbone\.model\.embedder\.", "backbone.stem."),
    (r"^model\.backbone\.model\.encoder\.", "backbone."),
    (r"\.convolution\.", ".conv."),
    (r"\.normalization\.", ".bn."),
    (r"_blocks\.(\d)\.csp_rep([12])\.", lambda m: f"_blocks.{m[1]}.cv{int(m[2]) + 1}.0."),
    (r"_blocks\.(\d)\.conv([23])\.", r"_blocks.\1.cv\2.1."),
    (r"_blocks\.(\d)\.conv([14])\.", r"_blocks.\1.cv\2."),
    (r"downsample_convs\.(\d)\.conv([12])\.", r"downsample_convs.\1.0.cv\2."),
    (r"\.mlp\.layers\.0\.", ".linear1."),
    (r"\.mlp\.layers\.1\.", ".linear2."),
    (r"^model\.decoder\.pre_bbox_head\.", "decoder.pre_bbox_head."),
    *RTDETR_TO_ORIGINAL[11:],
)


def original(model: Any, table: Any) -> dict[str, Tensor]:
    """The state dict of transformers' model in the names of the original code, queries, keys and values joined."""
    state, joined = {}, {}
    for name, each in model.state_dict().items():
        if name.startswith("model.decoder.") and re.search(r"\.(class|bbox)_embed\.", name):
            continue  # the same tensors as class_embed and bbox_embed
        for theirs, other in table:
            name = re.sub(theirs, other, name)
        if (found := re.fullmatch(r"(.*)\.([qkv])_proj\.(\w+)", name)) is not None:
            joined.setdefault(f"{found[1]}.in_proj_{found[3]}", {})[found[2]] = each
        else:
            state[name] = each
    return state | {name: torch.cat([parts[each] for each in "qkv"]) for name, parts in joined.items()}


def test_an_original_detr_file_gives_the_same(tmp_path):
    theirs, path = detr(**timm()), tmp_path / "detr.pth"
    torch.save({"model": original(theirs, DETR_TO_ORIGINAL)}, path)
    found = from_detr(path, LabelMap(("cat", "dog"), (1, 3)), heads=4)
    compare_detr(theirs, found.model, [1, 3, 4])
    compare_detr(theirs, from_detr(path, heads=4).model, [0, 1, 2, 3, 4])


@pytest.mark.daily(2)
@pytest.mark.parametrize(("layer", "inside"), [("basic", 32), ("bottleneck", 48)])
def test_an_original_rtdetr_file_gives_the_same(tmp_path, layer, inside):
    theirs, path = rtdetr(layer, inside=inside), tmp_path / "rtdetrv2.pth"
    state = original(theirs, RTDETR_TO_ORIGINAL)
    state["decoder.anchors"] = torch.zeros(1, 5, 4)
    state["decoder.valid_mask"] = torch.ones(1, 5, 1, dtype=torch.bool)
    torch.save(
        {"ema": {"module": state, "updates": 3}, "model": {name: each * 0 for name, each in state.items()}}, path
    )
    found = from_detr(path, heads=4, queries=10)
    compare_rtdetr(theirs, found.model)
    kept = from_detr(path, LabelMap(("a", "b"), (4, 2)), heads=4, queries=10).model
    assert torch.equal(kept.scores[0].weight, found.model.scores[0].weight[[4, 2]])  # pyright: ignore
    assert torch.equal(kept.noise.weight, found.model.noise.weight[[4, 2]])  # pyright: ignore


def original_dfine(theirs: Any) -> dict[str, Tensor]:
    """transformers' D-FINE as its original code has it: both modules that use the constants hold them."""
    state = original(theirs, DFINE_TO_ORIGINAL)
    for layer, points in enumerate([theirs.config.decoder_n_points] * theirs.config.decoder_layers):
        scales = torch.tensor([1 / each for each in points for _ in range(each)])
        state[f"decoder.decoder.layers.{layer}.cross_attn.num_points_scale"] = scales
    assert "decoder.decoder.up" in state and "decoder.decoder.lqe_layers.0.reg_conf.layers.0.weight" in state
    copies = {name.replace("decoder.decoder.", "decoder."): state[name] for name in state if name.endswith(CONSTANTS)}
    return state | copies | {"decoder.anchors": torch.zeros(1, 5, 4), "decoder.valid_mask": torch.ones(1, 5, 1)}


CONSTANTS = (".up", ".reg_scale")


@pytest.mark.parametrize(("name", "sizes"), [("dfine_n", {}), ("dfine_s", SMALL | {"encoder_hidden_dim": 48})])
def test_an_original_dfine_file_gives_the_same(tmp_path, name, sizes):
    """The whole N, and S with other channels, which are not those of its decoder, other bins and another scale."""
    if sizes:
        sizes = sizes | {"decoder_in_channels": [48] * 3, "head_dim": 8, "max_num_bins": 16, "reg_scale": 8.0}
    theirs, path = published(dfine(name, **{"num_queries": 10} | sizes)), tmp_path / "dfine.pth"
    state, heads = original_dfine(theirs), theirs.config.decoder_attention_heads
    torch.save({"last_epoch": 3, "model": {n: each * 0 for n, each in state.items()}, "ema": {"module": state}}, path)
    found = from_detr(path, heads=heads, queries=10)
    compare_rtdetr(theirs, found.model)
    torch.save({"model": state}, path)
    kept = from_detr(path, LabelMap(("a", "b"), (4, 2)), heads=heads, queries=10).model
    assert torch.equal(kept.scores[0].weight, found.model.scores[0].weight[[4, 2]])  # pyright: ignore
    if not sizes:
        preset: Any = PRESETS[name]
        rest = {"neck_ratio": kept.config.neck_ratio, "cross": "deformable(points=6, project=False, gated=True)"}
        assert found.model.config == replace(preset, queries=10, trunk_norm="frozen", **rest)


@pytest.fixture(scope="module")
def nano() -> dict[str, Tensor]:
    return original_dfine(DFineForObjectDetection(dfine("dfine_n")))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            {"decoder.up": torch.tensor([0.4]), "decoder.decoder.up": torch.tensor([0.4])},
            "up' is 0.4; the zoo supports",
        ),
        ({"decoder.reg_scale": torch.tensor([8.0])}, "'decoder.reg_scale' must be the same positive number"),
        ({"decoder.decoder.up": torch.tensor([0.5, 0.5])}, "'decoder.up' must be the same positive number"),
        ({"decoder.decoder.reg_scale": None, "decoder.reg_scale": None}, "'decoder.reg_scale' is missing"),
        ({"decoder.decoder.layers.0.cross_attn.num_points_scale": None}, "num_points_scale' is missing"),
        ({"decoder.decoder.layers.0.cross_attn.num_points_scale": torch.zeros(12)}, "heads do not give its 96 samples"),
        ({"heads": 4}, "points and 4 heads do not give its 96 samples in 2 levels"),
        ({"backbone.stem.stem1.conv.weight": None}, "stem1.convolution.weight' is missing"),
        ({"backbone.stages.3.blocks.0.aggregation.1.conv.weight": torch.zeros(7, 7)}, "the zoo supports hgnetv2_b0"),
        ({"decoder.other": torch.zeros(1)}, "'decoder.other' is not used"),
    ],
    ids=lambda each: each if isinstance(each, str) else "",
)
def test_a_faulty_dfine_file_is_one_line(nano, changed, message):
    state = {name: each for name, each in (nano | changed).items() if name != "heads" and each is not None}
    with pytest.raises(ValueError, match=message) as caught:
        from_detr(state, heads=changed.get("heads", 8))
    assert "\n" not in str(caught.value)


class Evil:
    def __reduce__(self) -> Any:
        return (Path.touch, (Path("evil"),))


def test_faulty_files_are_one_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    theirs = detr(**timm())
    folder = written(theirs, tmp_path / "detr", 4)
    config = json.loads((folder / "config.json").read_text())

    def refused(message: str, **changes: Any) -> None:
        (folder / "config.json").write_text(json.dumps(config | changes))
        with pytest.raises(ValueError, match=message) as caught:
            from_transformers(folder)
        assert "\n" not in str(caught.value)

    refused("model_type: the zoo supports", model_type="yolos")
    refused("model_type: the zoo supports", model_type=["detr"])
    refused("position_embedding_type", position_embedding_type="learned")
    refused("does not know this key", new_key=1)
    refused("id2label", id2label={"1": "a"})
    refused(r"layers\.2\..* is missing", decoder_layers=3)
    refused("not used", decoder_layers=1)
    refused("d_model|shape", d_model=64)
    refused("backbone_config.depths: it must be a list, got 3", backbone_config={"model_type": "resnet", "depths": 3})
    refused("backbone", backbone_config={"model_type": "swin"})
    refused("depths: it must be a list, got 5", backbone_config={"model_type": "resnet", "depths": 5})
    for name, value in (("evil.pth", {"model": {"a": Evil()}}), ("other.pth", {"model": {"a": torch.ones(1)}})):
        torch.save(value, tmp_path / name)
        with pytest.raises(ValueError, match="cannot be read|is not a DETR") as caught:
            from_detr(tmp_path / name)
        assert "\n" not in str(caught.value) and not (tmp_path / "evil").exists()
        assert "weights_only" not in str(caught.value)
    state = original(theirs, DETR_TO_ORIGINAL)
    with pytest.raises(ValueError, match=r"input_projection\.weight' is NaN or infinite"):
        from_detr(state | {"input_proj.weight": state["input_proj.weight"] * float("nan")}, heads=4)
    state.pop("transformer.encoder.layers.0.self_attn.in_proj_weight")
    with pytest.raises(ValueError, match=r"q_proj\.weight' is missing"):
        from_detr(state, heads=4)
    with pytest.raises(ValueError, match="below"):
        from_detr(original(theirs, DETR_TO_ORIGINAL), LabelMap(("a",), (4,)), heads=4)

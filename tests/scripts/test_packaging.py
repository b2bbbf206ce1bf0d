"""What is installed: the dependencies are those that are imported, and the package holds every file that it reads."""

import ast
import fnmatch
import re
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

import zoo

ROOT = Path(__file__).resolve().parents[2]
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())
IMPORTED_AS = {
    "faster-coco-eval": "faster_coco_eval",
    "scikit-learn": "sklearn",
    "pyyaml": "yaml",
    "pillow": "PIL",
    "huggingface-hub": "huggingface_hub",
}
INDIRECT = {"tensorboard"}  # Lightning's logger needs it
EXTRAS: dict[str, list[str]] = PROJECT["project"]["optional-dependencies"]
OPTIONAL = {"triton", "kenlm", "flashlight"}  # comes with PyTorch for CUDA; extras
OPTIONAL |= {
    "onnx",
    "onnxruntime",
    "onnxscript",
    "av",
    "diffusers",
    "gradio",
    "webdataset",
}  # extras, which the tests have
PINS = dict(line.split("==") for line in (ROOT / "scripts/constraints.txt").read_text().splitlines())


def names(requirements: list[str]) -> set[str]:
    return {re.split(r"[\[<>=; ]", each)[0] for each in requirements}


def imported(folder: Path) -> set[str]:
    """The packages outside the standard library that the files below a folder import."""
    found: set[str] = set()
    for path in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                found |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                found.add(node.module.split(".")[0])
    return found - {*sys.stdlib_module_names, "zoo"}


def test_every_dependency_is_imported_and_every_import_is_a_dependency():
    declared = {IMPORTED_AS.get(name, name) for name in names(PROJECT["project"]["dependencies"])}
    assert declared - INDIRECT == imported(ROOT / "zoo") - OPTIONAL


def test_every_dependency_is_pinned_for_the_tests():
    pinned = {re.sub(r"[-_.]+", "-", name).lower() for name in PINS}
    tests = names(EXTRAS["test"])
    assert "zoo" in tests and "zoo[app,export,latents,shards,video]" in EXTRAS["test"]
    wanted = names(PROJECT["project"]["dependencies"]) | tests
    wanted |= names(EXTRAS["app"]) | names(EXTRAS["export"]) | names(EXTRAS["latents"])
    wanted |= names(EXTRAS["shards"]) | names(EXTRAS["video"])
    assert wanted - {"zoo"} <= pinned


def test_the_package_holds_its_data():
    patterns = PROJECT["tool"]["setuptools"]["package-data"]["zoo"]
    package = ROOT / "zoo"
    data = [path.relative_to(package).as_posix() for path in package.rglob("*") if path.is_file()]
    data = [path for path in data if not path.endswith((".py", ".pyc", ".md"))]
    assert {"facts.json", "py.typed", "kernels/deformable_cpu.cpp"} <= {*data}
    assert not [path for path in data if not any(fnmatch.fnmatch(path, pattern) for pattern in patterns)]


def test_no_file_of_the_package_is_long():
    files = [*(ROOT / "zoo").rglob("*.py"), *(ROOT / "scripts").rglob("*.py")]
    assert [path.name for path in files if len(path.read_text().splitlines()) > 450] == []
    assert len(files) > 150


def test_the_changelog_has_the_version():
    versions = re.findall(r"^## \[?([\w.]+)", (ROOT / "CHANGELOG.md").read_text(), flags=re.MULTILINE)
    assert versions[0] == "Unreleased" and versions[1] == zoo.__version__


def test_hooks_use_the_pinned_ruff():
    (hooks,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert hooks["rev"] == f"v{PINS['ruff']}"
    assert [hook["id"] for hook in hooks["hooks"]] == ["ruff-check", "ruff-format"]


@pytest.mark.parametrize("path", sorted((ROOT / ".github/workflows").glob("*.yml")), ids=lambda path: path.name)
def test_workflows_run_scripts_that_exist(path: Path):
    jobs = yaml.safe_load(path.read_text())["jobs"]
    steps = [step["run"] for job in jobs.values() for step in job["steps"] if "run" in step]
    assert steps and all((ROOT / step.split()[0]).exists() for step in steps)

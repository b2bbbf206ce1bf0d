"""The wheel: what it holds, and that it works away from the repository, with a Hub on loopback, offline and from a
read-only cache."""

import ctypes
import json
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import soundfile
from PIL import Image
from sklearn.datasets import load_digits

import zoo
from helpers import randomise
from hub_server import Hub, environment, hub_on_loopback
from zoo.inputs.images import ImagePreprocess
from zoo.quick import index

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[2]
OWN = "visitor/vit.test"
SMALL: dict[str, Any] = {"dim": 16, "depth": 1, "heads": 2, "image": 16, "patch": 8, "classes": 2}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, so that no build folder of the checkout gets into it."""
    source, made = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("made")
    shutil.copytree(ROOT / "zoo", source / "zoo", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    here = int(version("setuptools").partition(".")[0]) >= 77  # else pip downloads it
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", *["--no-build-isolation"] * here, "-w", str(made)]
    done = subprocess.run([*command, str(source)], capture_output=True, text=True)
    if not here and done.returncode and "No matching distribution found for setuptools" in done.stderr:
        pytest.skip("setuptools 77 or newer is not installed and cannot be downloaded")
    assert done.returncode == 0, done.stderr
    (found,) = made.glob("*.whl")
    return found


def test_the_wheel_holds_the_package_and_nothing_else(wheel: Path):
    files = (path for path in (ROOT / "zoo").rglob("*") if path.is_file() and path.suffix not in (".pyc", ".md"))
    about = f"zoo-{zoo.__version__}.dist-info"
    wanted = {path.relative_to(ROOT).as_posix() for path in files}
    names = ("METADATA", "WHEEL", "RECORD", "entry_points.txt", "top_level.txt", "licenses/LICENSE")
    assert {*zipfile.ZipFile(wheel).namelist()} == wanted | {f"{about}/{name}" for name in names}


class Installed(NamedTuple):
    """An environment with the wheel, a working folder, and the folder of the Hub's client."""

    python: Path
    work: Path
    home: Path

    def run(self, hub: Hub, *command: str, **more: str) -> str:
        """What a command prints."""
        done = self.start(hub, *command, **more)
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout

    def start(self, hub: Hub, *command: str, **more: str) -> subprocess.CompletedProcess[str]:
        """A command of the environment in the working folder; permissions hold for root, too."""
        own = {"PYTHONPATH": "", "ZOO_CACHE": str(self.work.with_name("compiled"))} | more
        return subprocess.run(
            [str(self.python.with_name(command[0])), *command[1:]],
            cwd=self.work,
            env=environment(hub.address, self.home, **own),
            preexec_fn=obey_permissions,
            capture_output=True,
            text=True,
            timeout=300,
        )


def obey_permissions() -> None:
    """Takes the right to ignore permissions (CAP_DAC_OVERRIDE) from what this process becomes, where it has it."""
    ctypes.CDLL(None).prctl(24, 1, 0, 0, 0)  # PR_CAPBSET_DROP


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Installed:
    """zoo comes from the wheel, what it needs from the environment of the tests; the working folder has two inputs."""
    base = tmp_path_factory.mktemp("installed")
    python, work = base / "env/bin/python", base / "work"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", base / "env"], check=True)
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--no-deps", "--no-index", str(wheel)]
    subprocess.run(pip, check=True, capture_output=True)
    (packages,) = (base / "env").glob("lib/python*/site-packages")
    (packages / "others.pth").write_text(sysconfig.get_paths()["purelib"])
    work.mkdir()
    digit = load_digits(return_X_y=True)[0][3].reshape(8, 8) * 15
    Image.fromarray(digit.astype("uint8")).save(work / "digit.png")
    soundfile.write(work / "tone.wav", np.sin(np.arange(8000) / 10).astype("float32") / 4, 16000)
    return Installed(python, work, base / "home")


@pytest.fixture(scope="module")
def own_files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("own") / "vit.test"
    model = randomise(zoo.create_model("vit_micro", **SMALL))
    save: dict[str, Any] = {"preset": "vit_micro", "preprocess": ImagePreprocess(size=16), "labels": ["ant", "bee"]}
    zoo.save_model(model, folder, **save)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


LOAD = """
import json, os, sys
from pathlib import Path
import zoo

assert Path(zoo.__file__).is_relative_to(sys.prefix), zoo.__file__
sums = {}
for name in json.loads(sys.argv[1]):
    model = zoo.load_model(name, check=True)
    sums[name] = sum(weight.double().sum().item() for weight in model.parameters())
label, probability = zoo.load_checkpoint("vit_micro.digits")("digit.png")[0]
writable = os.access(os.environ["HF_HOME"], os.W_OK)
print(json.dumps({"sums": sums, "label": label, "writable": writable}))
"""
COMMANDS = (
    ("zoo list", "checkpoints"),
    ("zoo list checkpoints", "squeezeformer_micro.spoken_digits"),
    ("zoo info vit_micro.digits", 'zoo.load_model("vit_micro.digits")'),
    ("zoo classify predict vit_micro.digits digit.png", "digit.png"),
    (f"zoo classify predict {OWN}@v1.0 digit.png", "digit.png"),
    ("zoo transcribe predict squeezeformer_micro.spoken_digits tone.wav", "tone.wav"),
    ("zoo detect predict rtdetr_micro.blood_cells digit.png", "digit.png"),
    ("zoo evaluate vit_micro.digits", "accuracy"),
    ("zoo generate sample dit_micro.digits --steps 2 --each 1", ""),
)


def loaded(installed: Installed, hub: Hub, **more: str) -> tuple[dict[str, float], bool]:
    """Every name loads and passes its probe: the sums of the weights, and whether the cache can be written."""
    names = json.dumps([OWN, f"{OWN}@v1.0", f"hf:{OWN}", *index(), "zoo:vit_micro.digits"])
    found = json.loads(installed.run(hub, "python", "-c", LOAD, names, **more))
    assert found["label"] == "3"
    return found["sums"], found["writable"]


def check_commands(installed: Installed, hub: Hub, **more: str) -> None:
    for command, answer in COMMANDS:
        assert answer in installed.run(hub, *command.split(), **more), command
    assert json.loads((installed.work / "runs/sample/samples.json").read_text())
    shutil.rmtree(installed.work / "runs")


def permit(home: Path, writing: bool) -> None:
    """Makes all below a folder read-only, or not."""
    for path in (home, *home.rglob("*")):
        if not path.is_symlink():
            path.chmod(path.stat().st_mode | 0o200 if writing else path.stat().st_mode & ~0o222)


def test_names_load_from_the_hub_offline_and_from_a_read_only_cache(installed: Installed, own_files: dict[str, bytes]):
    installed.home.mkdir()
    with hub_on_loopback() as hub:
        hub.put(OWN, own_files, tag="v1.0")
        for name, entry in index().items():
            folder = ROOT / "checkpoints" / name
            hub.put(entry["repository"], {path.name: path.read_bytes() for path in folder.iterdir()})
        sums, writable = loaded(installed, hub)
        assert writable and len(hub.seen("GET /lfs/")) >= len(index()), "they came from the Hub"
        check_commands(installed, hub)
        permit(installed.home, writing=False)
        try:
            hub.log.clear()
            assert loaded(installed, hub) == (sums, False) and not hub.seen("GET")
        finally:
            permit(installed.home, writing=True)
    assert loaded(installed, hub, HF_HUB_OFFLINE="1") == (sums, True)
    permit(installed.home, writing=False)
    try:
        check_commands(installed, hub, HF_HUB_OFFLINE="1")
        assert loaded(installed, hub) == (sums, False), "the Hub is gone, and the client was not told"
    finally:
        permit(installed.home, writing=True)


def test_a_name_that_the_cache_lacks_gives_one_line(installed: Installed, own_files: dict[str, bytes], tmp_path: Path):
    empty = installed._replace(home=tmp_path / "empty")
    empty.home.mkdir(mode=0o555)
    with hub_on_loopback() as hub:
        hub.put("zoo-models/vit_micro.digits", own_files)  # not the files of the index
        refusals = {
            "vit_micro.digits": (installed._replace(home=tmp_path / "other"), {}, "is not that of checkpoint"),
            "dit_micro.digits": (installed._replace(home=tmp_path / "other"), {}, "no such repository"),
            "squeezeformer_micro.spoken_digits": (empty, {"HF_HUB_OFFLINE": "1"}, "it is not in the cache"),
            "zoo:vit_micro.digits": (empty, {}, "choose another cache"),
        }
        for name, (where, more, why) in refusals.items():
            done = where.start(hub, "zoo", "classify", "predict", name, "digit.png", **more)
            assert done.returncode == 1 and why in done.stderr and done.stderr.count("\n") == 1, (name, done.stderr)

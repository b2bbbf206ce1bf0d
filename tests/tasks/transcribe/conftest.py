"""What the tests of the commands of speech share."""

from pathlib import Path

import pytest

from hearing import TEXTS, Checkpoints, Ear, record
from listening import LETTERS, PREPROCESS, talkative
from transcribing import speak
from zoo import weights
from zoo.weights import save_model


@pytest.fixture(scope="module")
def faulty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("faulty")
    paths = speak(root, "train", range(12), {3: "A" * 300, 5: "GH " * 80})
    paths[1].write_bytes(paths[1].read_bytes()[:3000])
    paths = speak(root, "dev", range(20, 28), {0: "", 2: "A ZEBRA", 4: "AB" * 200})
    paths[6].write_bytes(b"no sound")
    return root


@pytest.fixture
def ear(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Ear:
    """The model "ear"; the test runs beside a folder of recordings, which is sorted."""
    monkeypatch.chdir(tmp_path)
    checkpoints = Checkpoints()
    monkeypatch.setattr(weights, "load_checkpoint", checkpoints)
    for name, text in TEXTS.items():
        record(Path("sounds", name), text)
    record(Path("sounds/.hidden.wav"), "c")
    Path("sounds/notes.txt").write_text("no sound")
    return checkpoints.made["ear"][0]


@pytest.fixture(scope="module")
def ctc(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ctc") / "model"
    return save_model(talkative(LETTERS, "ctc"), folder, preprocess=PREPROCESS, labels=LETTERS)

"""What the tests of the commands share."""

from pathlib import Path

import pytest

from training import SHORT, fit


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a run leaves in the current folder by mistake is gone with the test."""
    monkeypatch.chdir(tmp_path)
    for folder in ("checkpoints/vit", "seen/best"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "config.json").write_text('{"family": "vit"}')


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short run on synthetic images."""
    root = tmp_path_factory.mktemp("run")
    fit(root, *SHORT, "--trainer.max_epochs=1")
    return root

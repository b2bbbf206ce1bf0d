"""What the tests of `zoo classify predict` share."""

from pathlib import Path

import pytest

from classifying import noise, save


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save(tmp_path_factory.mktemp("checkpoint") / "model")


@pytest.fixture
def images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Pictures of every kind below ./images, which is sorted; the test runs beside it."""
    monkeypatch.chdir(tmp_path)
    folder = Path("images")
    made = [noise(folder / "b/deep/RGB.JPG", 0, size=(96, 80)), noise(folder / "b/grey.png", 1, "L")]
    made += [noise(folder / "deep.png", 2, "I;16"), noise(folder / "rgba.png", 3, "RGBA", (40, 9))]
    noise(folder / ".hidden.png", 4)
    noise(folder / "b/.hidden/inside.png", 5)
    (folder / "notes.txt").write_text("no picture")
    return made

"""What the tests of the commands of speech share."""

from pathlib import Path

import pytest

from transcribing import speak


@pytest.fixture(scope="module")
def faulty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("faulty")
    paths = speak(root, "train", range(12), {3: "A" * 300, 5: "GH " * 80})
    paths[1].write_bytes(paths[1].read_bytes()[:3000])
    paths = speak(root, "dev", range(20, 28), {0: "", 2: "A ZEBRA", 4: "AB" * 200})
    paths[6].write_bytes(b"no sound")
    return root

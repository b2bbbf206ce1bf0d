"""What the tests of checkpoints share."""

from pathlib import Path

import pytest

from checkpoint_cases import save


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save(tmp_path / "good")

"""Runs that are killed at any moment, or whose disk is full: the same or the printed command ends the same."""

from collections.abc import Callable
from pathlib import Path

import pytest

from killing import Whole, check_moments, check_operations, full, kill, whole_of
from training import PLAIN_FLAGS, fit

pytestmark = pytest.mark.slow

FLAGS = [*PLAIN_FLAGS, "--trainer.limit_train_batches=2", "--trainer.limit_val_batches=1", "--trainer.max_epochs=2"]
FLAGS += ["--model.backbone.depth=1", "--model.average=0.9"]


def run(folder: Path, *flags: str) -> None:
    fit(folder, *FLAGS, *flags)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Whole:
    return whole_of(run, tmp_path_factory.mktemp("whole"))


@pytest.mark.parametrize("strike", [kill, full])
def test_any_file_operation_may_be_the_last(strike: Callable[[], None], whole: Whole, tmp_path: Path):
    """Every file operation takes 7 minutes, with ZOO_TEST_KILLS=1."""
    check_operations(run, strike, whole, tmp_path, 15)


@pytest.mark.parametrize("workers", [0, 2])
def test_any_moment_may_be_the_last(workers: int, tmp_path: Path):
    flags = [f"--data.workers={workers}", "--trainer.max_epochs=3"]
    check_moments(lambda folder, *more: run(folder, *flags, *more), tmp_path)

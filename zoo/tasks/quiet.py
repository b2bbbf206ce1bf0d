"""What Lightning says on its own account is not shown, and warnings are printed in one line."""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import zoo
from zoo.text import one_line

# Warnings of Lightning about intended behaviour.
NOISE = (
    "LightningCLI's args parameter",
    ".*isinstance.treespec, LeafSpec",
    ".*in eval mode at the start",
    "Be aware that when using `ckpt_path`, callbacks",
    "Checkpoint directory .* exists and is not empty",
    "The number of training batches .* is smaller than the logging interval",
    "You're resuming from a checkpoint that ended before the epoch ended",
    "The '.*_dataloader' does not have many workers",
    "GPU available but not used",
    ".*sync_dist=True",
)
LOGGERS = ("pytorch.utilities.rank_zero", "fabric.utilities.seed", "fabric.utilities.distributed")


def from_zoo(record: logging.LogRecord) -> bool:
    """Whether a message comes from this package and not from Lightning."""
    return Path(record.pathname).is_relative_to(Path(zoo.__file__).parent)


def warning_line(message: Warning | str, *_: object) -> str:
    """A warning as it is printed: its message, without file and line."""
    return f"warning: {one_line(message, most=1000)}\n"


@contextmanager
def quiet(verbose: bool = False) -> Iterator[None]:
    """While it is open, warnings are one line each, without those of NOISE; and unless verbose, only this package logs
    to Lightning's loggers."""
    loggers = [] if verbose else [logging.getLogger(f"lightning.{part}") for part in LOGGERS]
    plain = warnings.formatwarning
    with warnings.catch_warnings():
        warnings.formatwarning = warning_line
        for message in NOISE:
            warnings.filterwarnings("ignore", message=message)
        for logger in loggers:
            logger.addFilter(from_zoo)
        try:
            yield
        finally:
            warnings.formatwarning = plain
            for logger in loggers:
                logger.removeFilter(from_zoo)

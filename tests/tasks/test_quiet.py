"""What is shown of warnings and of Lightning's own messages."""

import logging
import warnings

import pytest

from zoo.tasks.quiet import quiet


def test_warnings_are_one_line_without_those_of_lightning(monkeypatch: pytest.MonkeyPatch):
    plain, lines = warnings.formatwarning, list[str]()
    monkeypatch.setattr(warnings, "showwarning", lambda *given, **_: lines.append(warnings.formatwarning(*given[:4])))
    with warnings.catch_warnings(), quiet():
        warnings.filterwarnings("default", message="skipped")
        for text in ("skipped a.png:\nit is empty", "GPU available but not used", "`isinstance(treespec, LeafSpec)`"):
            warnings.warn(text, stacklevel=1)
    assert lines == ["warning: skipped a.png: it is empty\n"] and warnings.formatwarning is plain


@pytest.mark.parametrize("verbose", [False, True])
def test_lightning_speaks_only_if_verbose(verbose: bool):
    logger = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    record = logger.makeRecord(logger.name, logging.INFO, "/elsewhere/trainer.py", 1, "GPU available", (), None)
    with quiet(verbose):
        assert bool(logger.filter(record)) == verbose
    assert logger.filter(record)

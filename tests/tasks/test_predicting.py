from pathlib import Path

import pytest

from zoo.tasks.predicting import make_output


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path: Path):
    make_output(tmp_path / "new/folder")
    assert list((tmp_path / "new/folder").iterdir()) == []
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="--output must be a folder; .*file is a file"):
        make_output(tmp_path / "file")
    with pytest.raises(OSError, match="^cannot write to .*file/folder: Not a directory$"):
        make_output(tmp_path / "file/folder")

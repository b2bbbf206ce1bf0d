"""`zoo app` as a command: its arguments, what is refused in one line, and what it imports."""

import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from training import refused
from zoo import quick
from zoo.tasks import predicting
from zoo.tasks.app import command
from zoo.tasks.app.shelf import Shelf


def test_without_gradio_one_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(predicting, "find_spec", lambda name: None if name == "gradio" else SimpleNamespace())
    assert refused("app") == 'zoo app needs gradio; run: pip install "zoo[app]"'


def test_what_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(predicting, "find_spec", lambda name: SimpleNamespace())
    assert refused("app", "nowhere").startswith("checkpoint 'nowhere' not found")
    (tmp_path / "best").mkdir()
    (tmp_path / "best" / "config.json").write_text("{}")
    assert refused("app", str(tmp_path)).endswith(f"is a run, not a checkpoint; did you mean {tmp_path / 'best'}?")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        number = taken.getsockname()[1]
        wanted = f"cannot listen at 127.0.0.1:{number}: Address already in use; give another --host or --port"
        assert refused("app", "--port", str(number)) == wanted
        assert command.port_at("127.0.0.1", None) in command.PORTS
        monkeypatch.setattr(command, "PORTS", range(number, number + 1))
        with pytest.raises(OSError, match=f"127.0.0.1, ports {number} to {number}: Address already in use"):
            command.port_at("127.0.0.1", None)
    assert refused("app", "--host", "nowhere.invalid", "--port", "7860").startswith("cannot listen at nowhere.invalid")


@pytest.mark.parametrize("text", ["0", "-1", "65536", "http"])
def test_ports(text: str, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as stop:
        command.main(["--port", text])
    said = capsys.readouterr().err
    assert stop.value.code == 2 and said.startswith("zoo app: error: ") and said.count("\n") == 1


def test_every_checkpoint_of_the_zoo_is_offered_with_its_task():
    shelf = Shelf("cpu")
    assert command.offered().keys() >= quick.index().keys()
    for name, task in command.offered().items():
        assert shelf.task(name) == task


def test_help_and_the_package_import_nothing_heavy():
    code = "import sys\nfrom zoo.__main__ import main\ntry: main(['app', '--help'])\nexcept SystemExit: pass\n"
    code += "print(*sys.modules)"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "\nexample:\n  zoo app RUN/best" in shown
    assert not {"torch", "gradio", "numpy", "PIL"} & {*shown.splitlines()[-1].split()}


def test_the_parts_behind_the_widgets_do_not_need_gradio():
    code = (
        "import sys\nimport zoo.tasks.app.command\nfrom zoo.tasks.app import classify, detect, generate, transcribe\n"
    )
    code += "print('gradio' in sys.modules)"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert shown == "False\n"

"""The page of `zoo app` on a server, without a browser."""

import json
import subprocess
import sys
import time
import urllib.request
from importlib.util import find_spec
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(find_spec("gradio") is None, reason="gradio is not installed")

CODE = """
from zoo.tasks.app import command, layout
layout.CLEANED = (1, 1)
command.main(["--no-browser", "--device", "cpu"])
"""


@pytest.mark.daily(3)
def test_old_files_are_deleted_while_it_runs():
    with subprocess.Popen([sys.executable, "-c", CODE], stderr=subprocess.PIPE, text=True) as app:
        try:
            assert app.stderr is not None
            address = app.stderr.readline().split()[5].rstrip(";")
            body = b'--x\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\n\r\nhello\r\n--x--\r\n'
            kind = {"Content-Type": "multipart/form-data; boundary=x"}
            asked = urllib.request.Request(f"{address}gradio_api/upload", body, kind)
            with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(asked) as answer:
                path = Path(json.load(answer)[0])
            assert path.read_bytes() == b"hello"
            limit = time.monotonic() + 20
            while path.exists():
                assert time.monotonic() < limit
                time.sleep(0.1)
        finally:
            app.terminate()

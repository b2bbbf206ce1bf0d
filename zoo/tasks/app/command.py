"""`zoo app`: a local web app that runs checkpoints, and compares two of them."""

from __future__ import annotations

import argparse
import os
import signal
import socket
import sys
from contextlib import suppress
from tempfile import TemporaryDirectory
from threading import Event

from zoo import quick
from zoo.tasks import predicting as files
from zoo.tasks.predicting import Parser, count
from zoo.text import reason

FIRST = "vit_micro.digits"  # the checkpoint that is shown where none is given
PORTS = range(7860, 7960)  # of which the first free one is the default
HOST = "address to listen at; whoever can reach it can load any checkpoint that you can (default: %(default)s)"


def parser() -> Parser:
    made = Parser(
        "zoo app",
        "Opens a web app that runs checkpoints: classes with a contribution map, boxes,\n"
        "words as they come, generated images; two checkpoints side by side, fused or\n"
        "not, with milliseconds. Nothing leaves this machine; a name on the Hub is\n"
        "downloaded when it is chosen.",
        "zoo app RUN/best vit_micro.digits",
    )
    more = "checkpoints to offer beside those of the zoo: folders, or OWNER/NAME on the Hub"
    made.add_argument("names", metavar="NAME", nargs="*", help=more)
    made.add_argument("--port", metavar="P", type=port, help="of the app (default: the first free one from 7860)")
    made.add_argument("--host", metavar="H", default="127.0.0.1", help=HOST)
    files.add_device(made)
    made.add_argument("--no-browser", action="store_true", help="print the address, and open no browser")
    return made


def port(text: str) -> int:
    """A port, as an argument's type."""
    value = count(text)
    if value > 65535:
        raise argparse.ArgumentTypeError(f"must be at most 65535, got '{text}'")
    return value


def main(arguments: list[str]) -> None:
    """Runs the app until Ctrl-C or SIGTERM. ValueError or OSError if it cannot start."""
    given = parser().parse_intermixed_args(arguments)
    files.check_packages("zoo app", ("gradio",), "app")
    chosen = port_at(given.host, given.port)
    from zoo.tasks.app.shelf import Shelf

    shelf = Shelf(files.device_for(given.device))
    tasks = {name: shelf.task(name) for name in given.names} | offered()
    with TemporaryDirectory(prefix="zoo-app-") as folder:  # of the files that are given to the app
        for name in ("NO_PROXY", "no_proxy"):  # gradio asks its own address whether it runs
            own = [os.environ.get(name), "127.0.0.1", "localhost", given.host]
            os.environ[name] = ",".join(each for each in own if each)
        os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "GRADIO_TEMP_DIR": folder}  # read while it is imported
        from zoo.tasks.app import layout

        first = [*given.names, FIRST][0]
        app, address = layout.launched(shelf, tasks, first, given.host, chosen, not given.no_browser)
        files.report(f"the app runs at {address}; Ctrl-C ends it")
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        with suppress(KeyboardInterrupt):
            Event().wait()
        app.close(verbose=False)
    sys.stdout.flush()
    os._exit(0)  # threads of the server that still answer can abort an interpreter that shuts down


def offered() -> dict[str, str]:
    """The task of each checkpoint of the zoo and in ./checkpoints that has one, by name."""
    known = quick.known_checkpoints().items()
    return {name: task for name, found in known if "error" not in found and (task := quick.task_of(found))}


def port_at(host: str, wanted: int | None) -> int:
    """The wanted port, or the first free one of PORTS; OSError if the address cannot be used, or no port is free."""
    fault: OSError | None = None
    for number in (wanted,) if wanted else PORTS:
        with socket.socket() as tried:
            tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                tried.bind((host, number))
                return number
            except OSError as error:
                fault = error
    where = f"{host}:{wanted}" if wanted else f"{host}, ports {PORTS.start} to {PORTS.stop - 1}"
    raise OSError(f"cannot listen at {where}: {reason(fault)}; give another --host or --port")

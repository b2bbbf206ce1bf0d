"""What the tests of kills share: a run in a child process, killed after a while."""

import os
import signal
import time
from collections.abc import Callable

import torch


def in_child(action: Callable[[], None], most: float | None = None) -> int:
    """Runs action in a forked process, killed after `most` seconds; its exit status, negative for a signal."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            torch.set_num_threads(1)
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, 1)
            os.dup2(null, 2)
            action()
            status = 0
        except SystemExit as stop:
            status = 1 if isinstance(stop.code, str) else int(stop.code or 0)
        finally:
            os._exit(status)
    if most is not None:
        time.sleep(most)
        os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

"""A zoo of vision and speech models whose parts are chosen by name."""

import gc
import sys
import threading
from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# Where each public name lives. They are imported at first use, so that `zoo --help` need not load torch.
_HOMES = {
    "create_model": "zoo.models",
    "list_models": "zoo.models",
    "maps": "zoo.models.maps",
    "rollout": "zoo.models.maps",
    "advance": "zoo.layer",
    "fuse": "zoo.fusion",
    "refresh_statistics": "zoo.norms",
    "graft": "zoo.weights",
    "load_checkpoint": "zoo.weights",
    "load_model": "zoo.weights",
    "publish": "zoo.weights.hub",
    "save_model": "zoo.weights",
    "MIXERS": "zoo.mixers",
    "NORMS": "zoo.norms",
    "CHANNELS": "zoo.channels",
    "POSITIONS": "zoo.positions",
    "FFNS": "zoo.ffns",
    "PLACEMENTS": "zoo.choices",
}

if TYPE_CHECKING:
    from zoo.channels import CHANNELS
    from zoo.choices import PLACEMENTS
    from zoo.ffns import FFNS
    from zoo.fusion import fuse
    from zoo.layer import advance
    from zoo.mixers import MIXERS
    from zoo.models import create_model, list_models
    from zoo.models.maps import maps, rollout
    from zoo.norms import NORMS, refresh_statistics
    from zoo.positions import POSITIONS
    from zoo.weights import graft, load_checkpoint, load_model, save_model
    from zoo.weights.hub import publish

__all__ = [
    "CHANNELS",
    "FFNS",
    "MIXERS",
    "NORMS",
    "PLACEMENTS",
    "POSITIONS",
    "advance",
    "create_model",
    "fuse",
    "graft",
    "list_models",
    "load_checkpoint",
    "load_model",
    "maps",
    "publish",
    "refresh_statistics",
    "rollout",
    "save_model",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'zoo' has no attribute '{name}'")
    # Imported modules stay alive: collecting garbage while they load frees nothing and takes 0.1 s, since it visits all
    # of PyTorch's objects. Only the main thread pauses it, so that no two threads undo each other's pause.
    pausing = _HOMES[name] not in sys.modules and gc.isenabled()
    pausing = pausing and threading.current_thread() is threading.main_thread()
    if pausing:
        gc.disable()
    try:
        return getattr(import_module(_HOMES[name]), name)
    finally:
        if pausing:
            gc.enable()


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])

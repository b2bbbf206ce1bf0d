"""Fixed tables, such as sines of positions, computed once and kept in memory up to a bound in bytes."""

import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode

from zoo.tensors import compiling

LIMIT = 128 * 2**20
"""Most bytes of tables that are kept; the least recently used are dropped first."""


class _Kept:
    """A table and, for one that grows with length, the position of its first row."""

    def __init__(self, tensor: Tensor, start: int = 0) -> None:
        self.tensor, self.start = tensor, start

    @property
    def size(self) -> int:
        return self.tensor.numel() * self.tensor.element_size()


_kept: OrderedDict[tuple[Any, ...], _Kept] = OrderedDict()
_lock = threading.Lock()


def _keep(key: tuple[Any, ...], entry: _Kept) -> None:
    if entry.size > LIMIT // 2:
        return
    with _lock:
        _kept[key] = entry
        _kept.move_to_end(key)
        while sum(each.size for each in _kept.values()) > LIMIT:
            _kept.popitem(last=False)


def _found(key: tuple[Any, ...]) -> _Kept | None:
    with _lock:
        if key in _kept:
            _kept.move_to_end(key)
        return _kept.get(key)


def _transient() -> bool:
    """Whether tensors computed now must not outlive the call, because a mode makes special ones."""
    return _get_current_dispatch_mode() is not None


def table(make: Callable[..., Tensor], *shape: Any, device: torch.device) -> Tensor:
    """The result of make(*shape, device), computed once for each shape; the compiler traces it each time."""
    if compiling():
        return make(*shape, device)
    if _transient():
        return make(*shape, torch.device("cpu")).to(device)  # made on the CPU: not every device has fp64
    key = (make, device, *shape)
    if (entry := _found(key)) is None:
        with torch.inference_mode(False), torch.no_grad():
            entry = _Kept(make(*shape, torch.device("cpu")).to(device))
        _keep(key, entry)
    return entry.tensor


def rows(make: Callable[..., Tensor], start: int, stop: int, *shape: Any, device: torch.device) -> Tensor:
    """Rows start..stop - 1 of the endless table make(start, stop, *shape, device), whose rows depend only on their
    position. One copy is kept, of all the rows asked for so far, and sliced."""
    if compiling():
        return make(start, stop, *shape, device)
    if _transient():
        return make(start, stop, *shape, torch.device("cpu")).to(device)
    key = (make, device, *shape)
    entry = _found(key)
    if entry is None or start < entry.start or stop > entry.start + len(entry.tensor):
        first, last = start, stop
        if entry is not None:  # grow by at least half, for lengths that increase one by one
            margin = len(entry.tensor) // 2
            first = entry.start if start >= entry.start else min(start, entry.start - margin)
            end = entry.start + len(entry.tensor)
            last = end if stop <= end else max(stop, end + margin)
            if (last - first) * entry.size > LIMIT // 2 * len(entry.tensor):  # too long to be kept
                first, last = start, stop
        with torch.inference_mode(False), torch.no_grad():
            entry = _Kept(make(first, last, *shape, torch.device("cpu")).to(device), first)
        _keep(key, entry)
    return entry.tensor[start - entry.start : stop - entry.start]

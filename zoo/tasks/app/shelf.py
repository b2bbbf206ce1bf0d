"""The checkpoints of the app: loaded once, as they were saved or fused, and asked one at a time."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable
from threading import Lock
from typing import TYPE_CHECKING, Any, TypeVar

from zoo.tasks import predicting as files

if TYPE_CHECKING:
    from zoo.weights import Checkpoint

Answer = TypeVar("Answer")
KEPT = 6  # models in memory
TRIES, ENOUGH = 5, 0.3  # a short answer is repeated, so often or for so many seconds


class Shelf:
    """Checkpoints by name. What asks a model does so by `timed`, so that no other question slows it."""

    def __init__(self, device: str) -> None:
        self.device = device
        self._kept: OrderedDict[tuple[str, bool], Checkpoint] = OrderedDict()
        self._loading, self._asking = Lock(), Lock()

    def take(self, task: str, name: str, fused: bool) -> Checkpoint:
        """A checkpoint of a task, with its norms folded if asked for; ValueError if it cannot be used."""
        with self._loading:
            found = self._loaded(name, False)
            files.check_task(task, found, name)
            return self._loaded(name, True) if fused else found

    def task(self, name: str) -> str:
        """The task of a checkpoint; ValueError if it cannot be loaded, or has none."""
        with self._loading:
            found = self._loaded(name, False)
        files.check_complete(found, name)
        if found.model.config.task is None:
            raise ValueError(f"no command predicts with {name}")
        return found.model.config.task

    def _loaded(self, name: str, fused: bool) -> Checkpoint:
        if not name or not name.strip():
            raise ValueError("choose a checkpoint")
        key = (name.strip(), fused)
        if key not in self._kept:
            if fused:
                found = self._loaded(name, False)
                made = found._replace(model=files.fused(found.model))
            else:
                made = files.load(key[0])
                made.model.to(self.device)
            self._kept[key] = made
            while len(self._kept) > KEPT:
                self._kept.popitem(last=False)
        self._kept.move_to_end(key)
        return self._kept[key]

    def timed(self, ask: Callable[[], Answer], repeat: bool = True) -> tuple[Answer, float]:
        """An answer, and its milliseconds. A short one is asked for again, and the least time counts: the first call of
        a model takes longer."""
        with self._asking:
            least, begun = float("inf"), time.perf_counter()
            for _ in range(TRIES if repeat else 1):
                start = time.perf_counter()
                answer: Any = ask()
                end = time.perf_counter()
                least = min(least, end - start)
                if end - begun > ENOUGH:
                    break
            return answer, 1000 * least

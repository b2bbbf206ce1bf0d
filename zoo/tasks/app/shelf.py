"""The checkpoints of the app: loaded once, as they were saved or fused, and asked one at a time."""

from __future__ import annotations

import time
from collections import OrderedDict, defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from threading import Lock
from typing import TYPE_CHECKING, TypeVar

from zoo.tasks import predicting as files

if TYPE_CHECKING:
    from zoo.weights import Checkpoint

Answer = TypeVar("Answer")
KEPT = 6  # models in memory
TRIES, ENOUGH = 5, 0.3  # a short answer is repeated, so often or for so many seconds


@dataclass(frozen=True)
class Took:
    """The milliseconds of an answer in so many parts, each the least of so many calls at least."""

    milliseconds: float = 0.0
    calls: int = 1
    parts: int = 1

    def __add__(self, other: Took) -> Took:
        calls = min(self.calls, other.calls)
        return Took(self.milliseconds + other.milliseconds, calls, self.parts + other.parts)


class Shelf:
    """Checkpoints by name. What asks a model does so by `timed`, so that no other question slows it."""

    def __init__(self, device: str) -> None:
        self.device = device
        self._kept: OrderedDict[tuple[str, bool], Checkpoint] = OrderedDict()
        self._loading: defaultdict[tuple[str, bool], Lock] = defaultdict(Lock)
        self._keeping, self._asking = Lock(), Lock()

    def take(self, task: str, name: str, fused: bool) -> Checkpoint:
        """A checkpoint of a task, with its norms folded if asked for; ValueError if it cannot be used."""
        found = self._loaded(name, False)
        files.check_task(task, found, name)
        return self._loaded(name, True) if fused else found

    def task(self, name: str) -> str:
        """The task of a checkpoint; ValueError if it cannot be loaded, or has none."""
        found = self._loaded(name, False)
        files.check_complete(found, name)
        if found.model.config.task is None:
            raise ValueError(f"no command predicts with {name}")
        return found.model.config.task

    def _loaded(self, name: str, fused: bool) -> Checkpoint:
        """A checkpoint that is in memory or is loaded now, which may take long and lets others be loaded meanwhile."""
        if not name or not name.strip():
            raise ValueError("choose a checkpoint")
        key = (name.strip(), fused)
        with self._keeping:
            loading = self._loading[key]
        with loading:
            with self._keeping:
                if key in self._kept:
                    self._kept.move_to_end(key)
                    return self._kept[key]
            if fused:
                plain = self._loaded(name, False)
                found = plain._replace(model=files.fused(plain.model))
            else:
                found = files.load(key[0])
                found.model.to(self.device)
            with self._keeping:
                self._kept[key] = found
                while len(self._kept) > KEPT:
                    self._kept.popitem(last=False)
            return found

    def timed(self, ask: Callable[[], Answer], repeat: bool = True) -> tuple[Answer, Took]:
        """An answer, and how long it took. A short one is asked for again, and the least time counts: the first call of
        a model takes longer."""
        with self._asking:
            times: list[float] = []
            while True:
                start = time.perf_counter()
                answer = ask()
                times.append(time.perf_counter() - start)
                if not repeat or len(times) == TRIES or sum(times) > ENOUGH:
                    return answer, Took(1000 * min(times), len(times))

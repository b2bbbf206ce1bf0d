"""The base of every preprocessing: plain fields that a checkpoint stores, and a call from a raw input to a tensor."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar, Self, TypeGuard

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Preprocess:
    """Turns a raw input into a model's input; its plain fields are stored in `config.json`.

    Called on one raw input it gives that input prepared, without a batch axis. `shared` names the fields that the
    config of the model has too, with the same value. `raw` is the name of a raw input in a line of code, and
    `file` that of a file that holds one; the path of such a file is a raw input too. Models whose input is of the kind
    `replaces` can have it instead of the usual one.
    """

    replaces: ClassVar[str | None] = None
    shared: ClassVar[tuple[str, ...]] = ()
    raw: ClassVar[str] = "raw"
    file: ClassVar[str] = "file"

    def __call__(self, raw: Any, /) -> Any:
        raise TypeError(f"{type(self).__name__} prepares nothing")

    def parts(self, raw: Any, /) -> Iterator[Any]:
        """The prepared input in parts for the model: one, or several segments of a long input."""
        yield self(raw)

    def sample(self, generator: torch.Generator) -> Tensor:
        """A random raw input, for a probe."""
        raise TypeError(f"{type(self).__name__} has no sample")

    def to_dict(self) -> dict[str, Any]:
        """Every field by name, in JSON's types."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """The inverse of `to_dict`; an omitted field has its default.

        Raises:
            ValueError: `values` is not a mapping, has an unknown key, or a value out of range.
        """
        if not isinstance(values, Mapping):
            raise ValueError(f"preprocess must be a mapping, got {type(values).__name__}")
        allowed = [field.name for field in fields(cls)]
        unknown = [str(key) for key in values if key not in allowed]
        if unknown:
            raise ValueError(f"unknown preprocess key {', '.join(unknown)}; allowed: {', '.join(allowed)}")
        return cls(**values)


def check_integer(name: str, value: object, most: int | None = None) -> None:
    """ValueError if a field is not an integer from 1 to `most`."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1 or (most is not None and value > most):
        allowed = ">= 1" if most is None else f"from 1 to {most}"
        raise ValueError(f"{name} must be an integer {allowed}, got {_short(value)}")


def is_number(value: object) -> TypeGuard[int | float]:
    """Whether a field is a finite number."""
    return (
        isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= 1e308 and math.isfinite(value)
    )


def _short(value: object) -> str:
    if isinstance(value, int) and abs(value) >= 10**15:
        return f"an integer of {value.bit_length()} bits"
    return repr(value)

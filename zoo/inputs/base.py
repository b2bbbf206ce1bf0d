"""What every preprocessing is: plain fields that a checkpoint stores, and a call from a raw input to a tensor."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar, Self

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Preprocess:
    """What is done to a raw input before a model sees it, as plain fields that `config.json` holds.

    Called on one raw input it gives that input prepared, without a batch axis. `shared` names the fields that the
    config of the model has too, with the same value. `raw` is the name of a raw input in a line of code.
    """

    shared: ClassVar[tuple[str, ...]] = ()
    raw: ClassVar[str] = "raw"

    def __call__(self, raw: Any, /) -> Any:
        raise TypeError(f"{type(self).__name__} prepares nothing")

    def sample(self, generator: torch.Generator) -> Tensor:
        """A random raw input, for a probe."""
        raise TypeError(f"{type(self).__name__} has no sample")

    def to_dict(self) -> dict[str, Any]:
        """Every field by name, in types that JSON knows."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """The inverse of `to_dict`; a field that is left out has its default.

        Raises:
            ValueError: `values` is no mapping, has an unknown key, or a value out of its range.
        """
        if not isinstance(values, Mapping):
            raise ValueError(f"preprocess must be a mapping, not {type(values).__name__}")
        allowed = [field.name for field in fields(cls)]
        unknown = [str(key) for key in values if key not in allowed]
        if unknown:
            raise ValueError(f"unknown preprocess key {', '.join(unknown)}; allowed: {', '.join(allowed)}")
        return cls(**values)

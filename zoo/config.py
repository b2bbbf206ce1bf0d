"""What a model is, as frozen dataclasses: the choices that all families share, and the rules that refuse some pairs."""

import functools
import types
import typing
from dataclasses import dataclass, fields
from typing import Any, ClassVar

from torch import nn

from zoo.channels import CHANNELS
from zoo.ffns import FFNS
from zoo.layer import check, parse
from zoo.mixers import CONVS, CROSSES, MIXERS
from zoo.norms import NORMS
from zoo.positions import POSITIONS

# What fills which site, for branches that mix tokens and for feed-forward. `before` precedes the branch, `after`
# follows it, `total` follows the sum, `stream` lets the sum start from what `before` gave, or from x times a learned
# scale; others are the branch's own.
_PRE, _POST = {"before": "norm"}, {"total": "norm"}
PLACEMENTS: dict[str, tuple[dict[str, str], dict[str, str]]] = {
    "pre": (_PRE, _PRE),
    "post": (_POST, _POST),
    "res_post": ({"after": "norm"}, {"after": "norm"}),
    "res_scale": (_PRE | {"stream": "scale"}, _PRE | {"stream": "scale"}),
    "peri": (_PRE | {"after": "norm"}, _PRE | {"after": "norm"}),
    "sub": (_PRE | {"inner": "norm"}, _PRE | {"inner": "norm"}),
    "hybrid": ({"query": "norm", "key": "norm", "value": "norm"}, _PRE | {"stream": "before"}),
    "normformer": (_PRE | {"after": "norm", "inner": "heads"}, _PRE | {"inner": "norm"}),
    "scaled": ({"before": "affine"} | _POST, {"before": "affine"} | _POST),
}
OUTER = ("before", "after", "total", "stream")
FEED_FORWARD = ("ffn", "half")
WORDS = ("mixer", "cross", "conv", *FEED_FORWARD, "norm")
TABLES = {"mixer": MIXERS, "cross": CROSSES, "conv": CONVS, "conv_norm": NORMS, "ffn": FFNS, "norm": NORMS}
TABLES |= {"channel": CHANNELS, "position": POSITIONS, "placement": PLACEMENTS}


@functools.cache
def _kinds(config: type) -> dict[str, Any]:
    return typing.get_type_hints(config)


def _fits(value: Any, kind: Any) -> bool:
    if isinstance(kind, types.UnionType):
        return any(_fits(value, each) for each in typing.get_args(kind))
    if typing.get_origin(kind) is tuple:
        return isinstance(value, tuple) and all(_fits(each, typing.get_args(kind)[0]) for each in value)
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    return isinstance(value, kind) and (kind is bool or not isinstance(value, bool))


def _frozen(value: Any) -> Any:
    return tuple(_frozen(each) for each in value) if isinstance(value, list | tuple) else value


@dataclass(frozen=True, kw_only=True)
class Config:
    """What a model is, whole, in flat fields; ValueError where a field is of a wrong type. Lists become tuples."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = _frozen(getattr(self, field.name))
            object.__setattr__(self, field.name, value)
            kind = _kinds(type(self))[field.name]
            if not _fits(value, kind):
                raise ValueError(f"{field.name} takes {getattr(kind, '__name__', kind)}, not {value!r}")

    def build(self) -> nn.Module:
        """The model that this config describes."""
        raise TypeError(f"{type(self).__name__} describes no model")


@dataclass(frozen=True, kw_only=True)
class BlockConfig(Config):
    """The choices that every family shares; a family adds its own fields.

    Wrong names, wrong options and pairs of choices that would ignore each other are ValueErrors at once.
    """

    axes: ClassVar[int] = 2  # 2: tokens lie on H x W; 1: along time

    dim: int
    depth: int
    heads: int
    layout: tuple[str, ...] = ("mixer", "ffn")
    mixer: str = "softmax"
    cross: str = "softmax"
    conv: str = "glu"
    conv_norm: str = "batchnorm"
    ffn: str = "mlp"
    norm: str = "layernorm"
    placement: str = "pre"
    channel: str = "none"
    position: str = "sincos"
    modulate: bool = False
    drop_path: float = 0.0
    dropout: float = 0.0
    layer_scale: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if min(self.dim, self.depth, self.heads) < 1:
            raise ValueError(f"dim, depth and heads are at least 1, not {self.dim}, {self.depth} and {self.heads}")
        for name in ("drop_path", "dropout"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise ValueError(f"{name} lies in 0..1, not {getattr(self, name)}")
        for field, table in TABLES.items():
            try:
                if field == "placement":
                    if self.placement not in table:
                        raise ValueError(f"there is no '{self.placement}'; choose from: {', '.join(sorted(table))}")
                else:
                    check(table, getattr(self, field))
            except ValueError as error:
                raise ValueError(f"{field}: {error}") from None
        if not self.layout:
            raise ValueError("layout is empty; the usual one is mixer, ffn")
        for word in self.words:
            if word not in WORDS:
                raise ValueError(f"layout: there is no '{word}'; choose from: {', '.join(WORDS)}, or join two with +")
        for entry in self.layout:
            if "+" in entry and not {"half", "norm"}.isdisjoint(entry.split("+")):
                raise ValueError(f"layout: half and norm stand alone, not as in '{entry}'")
        self._check_pairs()

    @property
    def words(self) -> list[str]:
        """The layout's words, one by one."""
        return [word for entry in self.layout for word in entry.split("+")]

    @property
    def writes(self) -> frozenset[str]:
        """The fields of the Context that this model sets, the mask among them; a family adds its own."""
        written = POSITIONS[parse(self.position)[0]].writes | {"mask"}
        return written | ({"cond"} if self.modulate else set()) | ({"memory"} if "cross" in self.words else set())

    @property
    def head_dim(self) -> int:
        """The width of one head of the mixer, which rotary positions turn."""
        return check(MIXERS, self.mixer).get("head_dim") or self.dim // self.heads

    def _check_pairs(self) -> None:
        for field in fields(self):
            words = {"ffn": FEED_FORWARD, "conv_norm": ("conv",)}.get(field.name, (field.name,))
            if field.name not in ("mixer", "cross", "conv", "conv_norm", "ffn") or not {*words}.isdisjoint(self.words):
                continue
            if (value := getattr(self, field.name)) != field.default:
                raise ValueError(f"{field.name} '{value}' would be ignored: the layout has no {' or '.join(words)}")
        bare = CONVS[parse(self.conv)[0]].bare
        if bare and {*self.words} <= {"conv", "norm"}:
            raise ValueError(f"layout: conv '{self.conv}' stands bare and needs a branch with norms beside it")
        if bare and self.conv_norm != "batchnorm":
            raise ValueError(f"conv_norm '{self.conv_norm}' would be ignored: conv '{self.conv}' has no norm")
        if "mixer" not in self.words and self.writes & {"rotary", "bias"}:
            raise ValueError(f"position '{self.position}' would be ignored: the layout has no mixer")
        tokens = self.writes & {"prefix", "mask", "visible"}
        needs = {"mixer": self.writes - {"cond", "memory"}, "conv": tokens, "cross": tokens | self.writes & {"code"}}
        needs |= {"channel": tokens, "position": tokens, "norm": self.writes & {"visible"}}
        needs |= {"conv_norm": self.writes & {"visible"}} if "conv" in self.words else {}
        for field, needed in needs.items():
            if field in ("mixer", "conv", "cross") and field not in self.words:
                continue
            name = parse(getattr(self, field))[0]
            row = TABLES[field][name]
            if field in ("mixer", "conv") and self.axes not in row.dimensions:
                works = "along time" if row.dimensions == (1,) else "on pictures"
                able = [other for other, each in TABLES[field].items() if self.axes in each.dimensions]
                raise ValueError(f"{field} '{name}' works {works} only; choose another {field} ({', '.join(able)})")
            if name == "none" or not row.mixes or not (unread := sorted(needed - row.reads)):
                continue
            if self.writes & {"rotary", "bias"} & set(unread):
                source = f"position '{self.position}'"
            else:
                source = "this model" + (", which has prefix tokens," if "prefix" in unread else "")
                source += ", which works in chunks," if "visible" in unread else ""
            able = [
                other
                for other, each in TABLES[field].items()
                if (needed <= each.reads or not each.mixes or other == "none") and self.axes in each.dimensions
            ]
            raise ValueError(
                f"{field} '{name}' does not read {' and '.join(unread)}, which {source} sets; "
                f"choose another {field} ({', '.join(able)}) or drop what sets it"
            )

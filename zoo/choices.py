"""The choices of one block: its words, the sites of norms in each placement, and the choices that are refused
because one would ignore another."""

import functools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from zoo.channels import CHANNELS
from zoo.ffns import FFNS
from zoo.layer import ANYWHERE, Place, Site
from zoo.mixers import CONVS, CROSSES, MIXERS
from zoo.modulations import MODULATIONS
from zoo.norms import NORMS
from zoo.positions import POSITIONS
from zoo.spec import check, parse
from zoo.text import listed, unknown

# The layer in each site, for branches that mix tokens and for feed-forward; block.py draws the sites.
_PRE, _POST = {"before": "norm"}, {"total": "norm"}
PLACEMENTS: dict[str, tuple[dict[str, str], dict[str, str]]] = {
    "pre": (_PRE, _PRE),
    "post": (_POST, _POST),
    "res_post": ({"after": "norm"}, {"after": "norm"}),
    "res_scale": (_PRE | {"stream": "scale"}, _PRE | {"stream": "scale"}),
    "peri": (_PRE | {"after": "norm"}, _PRE | {"after": "norm"}),
    "sub": (_PRE | {"inner": "norm"}, _PRE | {"inner": "norm"}),
    "sub_ffn": (_PRE, _PRE | {"inner": "norm"}),
    "hybrid": ({"query": "norm", "key": "norm", "value": "norm"}, _PRE | {"stream": "before"}),
    "crate": (_PRE, _PRE | {"stream": "before"}),
    "normformer": (_PRE | {"after": "norm", "inner": "heads"}, _PRE | {"inner": "norm"}),
    "scaled": ({"before": "affine"} | _POST, {"before": "affine"} | _POST),
}
PAPERS = {
    "pre": "2010.11929",
    "post": "1706.03762",
    "res_post": "2111.09883",
    "res_scale": "2210.13452",
    "peri": "2502.02732",
    "sub": "2210.06423",
    "sub_ffn": "2303.11331",
    "hybrid": "2503.04598",
    "crate": "2306.01129",
    "normformer": "2110.09456",
    "scaled": "2206.00888",
}
"""The arXiv number of each placement's paper."""
OUTER = ("before", "after", "total", "stream")  # sites of the residual; others are the branch's own
FEED_FORWARD = ("ffn", "half")
WORDS = ("mixer", "cross", "conv", *FEED_FORWARD, "norm")
TABLES: dict[str, Mapping[str, Any]] = {"mixer": MIXERS, "cross": CROSSES, "conv": CONVS, "conv_norm": NORMS}
TABLES |= {"ffn": FFNS, "norm": NORMS, "channel": CHANNELS, "position": POSITIONS, "modulation": MODULATIONS}
TABLES["placement"] = PLACEMENTS

# The words of the layout that a choice is for; the others are for every block.
USES = {"mixer": ("mixer",), "cross": ("cross",), "conv": ("conv",), "conv_norm": ("conv",), "ffn": FEED_FORWARD}


class Filling(NamedTuple):
    """The layer in one site of a Block: a norm, the norm of a convolution, an affine map or a scale for each head."""

    site: str
    what: str
    size: Site


class Plan(NamedTuple):
    """The placement of the norms of one residual: its own sites, and those of each branch."""

    stream: str  # "", or the stream to which the branch's result is added instead of x: "before" or "scale"
    outer: tuple[Filling, ...]
    inner: tuple[tuple[Filling, ...], ...]


def words_of(layout: Iterable[str]) -> list[str]:
    """The words of a layout, one by one."""
    return [word for entry in layout for word in entry.split("+")]


@dataclass(frozen=True, kw_only=True)
class BlockConfig:
    """One block, every choice a single name. Wrong names, wrong options and pairs of choices that would ignore each
    other are ValueErrors at once."""

    dim: int
    heads: int
    place: Place = ANYWHERE
    layout: tuple[str, ...] = ("mixer", "ffn")
    mixer: str = "softmax"
    cross: str = "softmax"
    conv: str = "glu"
    conv_norm: str = "batchnorm"
    ffn: str = "mlp"
    norm: str = "layernorm"
    placement: str = "pre"
    channel: str = "none"
    modulation: str = "none"
    position: str = "none"
    dropout: float = 0.0
    layer_scale: float | None = None
    writes: frozenset[str] = frozenset({"mask"})  # the fields of the Context that the model and its position set

    def __post_init__(self) -> None:
        # Blocks that differ in where they stand alone are checked once.
        first = replace(self.place, index=0, order=0, last=True)
        _check(self if self.place == first else replace(self, place=first))

    @property
    def head_width(self) -> int:
        """The width of one head of the mixer, which rotary positions turn."""
        if "mixer" not in words_of(self.layout):
            return self.dim // self.heads
        return MIXERS[parse(self.mixer)[0]].head_width_of(self.dim, self.heads, **check(MIXERS, self.mixer))

    def row(self, word: str) -> tuple[str, type, dict[str, Any]]:
        """The field, the row and the options of a word of the layout."""
        name = "ffn" if word in FEED_FORWARD else word
        spec = getattr(self, name)
        return name, TABLES[name][parse(spec)[0]], check(TABLES[name], spec)

    def plan(self, entry: str) -> Plan:
        """Where the placement puts norms for an entry of the layout: a branch, or some joined by +."""
        outer, inner = [], []
        for word in entry.split("+"):
            name, row, options = self.row(word)
            try:
                sites = row.sites_of(self.dim, self.heads, **options)
            except ValueError as error:
                raise ValueError(f"{name} '{getattr(self, name)}': {error}") from None
            wanted = {} if row.bare else PLACEMENTS[self.placement][word in FEED_FORWARD]
            outer.append({site: what for site, what in wanted.items() if site in OUTER})
            own = {"norm": "conv_norm"} if word == "conv" and "norm" in sites else {}
            own |= {site: what for site, what in wanted.items() if site not in OUTER}
            for site, what in own.items():
                branch = f"{name} '{getattr(self, name)}'"
                if site not in sites:
                    has = ", ".join(each for each in sites if each != "norm") or "none"
                    raise ValueError(f"placement '{self.placement}' needs the site '{site}'; {branch} has: {has}")
                if what == "heads" and not sites[site].heads:
                    raise ValueError(f"placement '{self.placement}' scales heads, but {branch} has none")
            inner.append(tuple(Filling(site, what, sites[site]) for site, what in own.items()))
        if any(each != outer[0] for each in outer):
            raise ValueError(
                f"placement '{self.placement}' treats the branches of '{entry}' differently, but they share one norm"
            )
        whole = Site(self.dim)
        around = tuple(Filling(site, what, whole) for site, what in outer[0].items() if site != "stream")
        return Plan(outer[0].get("stream", ""), around, tuple(inner))


@functools.lru_cache(maxsize=4096)
def _check(block: BlockConfig) -> None:
    """ValueError if a name or an option is invalid, or if choices would ignore each other."""
    for name, table in TABLES.items():
        spec = getattr(block, name)
        try:
            if table is not PLACEMENTS:
                axes = block.place.axes
                check(table, spec, [row for row, kind in table.items() if axes in getattr(kind, "dimensions", (axes,))])
            elif spec not in table:
                raise ValueError(unknown("name", spec, table))
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
    _check_pairs(block)
    for entry in block.layout:
        if entry != "norm":
            block.plan(entry)


def _check_pairs(block: BlockConfig) -> None:
    words, writes = words_of(block.layout), block.writes
    bare = CONVS[parse(block.conv)[0]].bare
    if bare and {*words} <= {"conv", "norm"}:
        raise ValueError(f"layout: conv '{block.conv}' has no norm of its own; join it to a branch with norms")
    if bare and block.conv_norm != "batchnorm":
        raise ValueError(f"conv_norm '{block.conv_norm}' would be ignored: conv '{block.conv}' has no norm")
    if "mixer" not in words and writes & {"rotary", "bias"}:
        raise ValueError(f"position '{block.position}' would be ignored: the layout has no mixer")
    if parse(block.modulation)[0] != "none":
        for name in ("norm", "conv_norm") if "conv" in words and not bare else ("norm",):
            if NORMS[parse(getattr(block, name))[0]].batch_statistics:
                able = ", ".join(other for other, row in NORMS.items() if not row.batch_statistics)
                raise ValueError(
                    f"{name} '{getattr(block, name)}' takes statistics over samples that modulation "
                    f"'{block.modulation}' treats differently; choose another {name} ({able})"
                )
    seen = writes & {"visible", "order"}
    tokens = writes & {"prefix", "mask"} | seen
    needs = {"mixer": writes - {"cond", "memory"}, "conv": tokens, "cross": tokens - seen | writes & {"code"}}
    needs |= {"channel": tokens, "position": tokens, "norm": seen}
    needs |= {"conv_norm": seen} if "conv" in words else {}
    for name, needed in needs.items():
        if name in ("mixer", "conv", "cross") and name not in words:
            continue
        spec, table = getattr(block, name), TABLES[name]
        row, axes, options = table[parse(spec)[0]], block.place.axes, check(table, spec)
        if name in ("mixer", "conv") and axes not in (kinds := row.dimensions_of(**options)):
            works = "along time" if kinds == (1,) else "on images"
            able = [other for other, each in table.items() if axes in each.dimensions]
            raise ValueError(f"{name} '{spec}' works {works} only; choose another {name} ({listed(able)})")
        if name == "mixer" and row.causal_of(**options) and "order" not in writes:
            able = [other for other, each in table.items() if axes in each.dimensions and not each.causal]
            raise ValueError(
                f"mixer '{spec}' needs a causal model; set causal=True, which a ViT has, or choose another mixer "
                f"({listed(able)})"
            )
        unread = sorted(needed - row.reads_of(**options))
        if parse(spec)[0] == "none" or not row.mixes or not unread:
            continue
        if writes & {"rotary", "bias"} & set(unread):
            source = f"position '{block.position}'"
        elif unread == ["order"]:
            source = "causal=True"
        else:
            source = "this model" + (", which has prefix tokens," if "prefix" in unread else "")
            if "visible" in unread:
                source += ", which denoises groups of queries," if "memory" in writes else ", which works in chunks,"
        able = [
            other
            for other, each in table.items()
            if (needed <= each.reads_of() or not each.mixes or other == "none")
            and axes in each.dimensions
            and ("order" in writes or not each.causal)
        ]
        instead = f"choose another {name} ({listed(able)}) or " if able else ""
        raise ValueError(
            f"{name} '{spec}' does not read {' and '.join(unread)}, which {source} sets; {instead}drop what sets it"
        )

"""The card of a checkpoint: README.md in the Hub's format, made from config.json alone."""

import re
from collections.abc import Mapping
from typing import Any

from zoo.config import Config, field_names
from zoo.inputs import Preprocess
from zoo.outputs import LABELS
from zoo.quick import literal
from zoo.text import one_line, plain
from zoo.weights.figures import Figure

CARD = """---
{front}
---

# {title}

{text}

| field | value |
|---|---|
| parameters | {parameters} |
{rows}
{figures}
Source: {source}.{base}{datasets} License of the weights: {license}. Written by zoo {version}.

```python
import zoo

# this folder; on the Hub OWNER/{title}
checkpoint = zoo.load_checkpoint({name})
{given}{answer}model, preprocess, {labels}, config = checkpoint
{call}
```
"""


FIGURES = """
| data | split | metric | value | n | 95 % interval |
|---|---|---|---|---|---|
{rows}
{commands}"""

# What opens HTML that holds everything up to its end, and that end, in lower case.
_HTML = {r"<!--": "-->", r"<\?": "?>", r"<!\[cdata\[": "]]>", r"<![a-z]": ">"}
_RAW = ("</pre>", "</script>", "</style>", "</textarea>")  # each of them ends all of them
_HTML |= {rf"<{end[2:-1]}(?=[\s>]|$)": end for end in _RAW}
_FENCE = re.compile(r"(`{3,})[^`]*$|(~{3,})")
_ITEM = re.compile(r"\s*([-*+]|\d+[.)])(\s|$)")
_ELEMENTS = ("details", "div", "table", "template", "noscript")


def closed(text: str) -> str:
    """A text in Markdown with its open fences of code, comments and elements of HTML closed at its end, so that what
    follows it is seen. What a list may hold is closed before a line that is less indented, and a fence straight after a
    tag gets an empty line before it."""
    lines, shown, start, end, listed, tagged = list[str](), list[str](), "", "", False, False
    for line in text.split("\n"):
        if end and listed and line.strip() and len(line) - len(line.lstrip()) < len(start):
            lines.append(start + end)
            end = ""
        if end:
            end = "" if _ends(line, end) else end
        else:
            shown.append(line.lower())
            listed = listed or _ITEM.match(line) is not None
            start, end = _opened(line)
            lines += [""] * (tagged and bool(end))
            tagged = bool(line.strip()) and not end and (tagged or re.match(" *</?[A-Za-z]", line) is not None)
        lines.append(line)
    lines += [start + end] if end else []
    whole = "\n".join(shown)
    missing = {name: len(re.findall(rf"<{name}\b", whole)) - whole.count(f"</{name}>") for name in _ELEMENTS}
    ends = [f"</{name}>" for name, number in missing.items() for _ in range(number)]
    return "\n".join([*lines, *([""] if ends else []), *ends])


def _opened(line: str) -> tuple[str, str]:
    """The indentation of what a line opens and does not close, and what closes it."""
    rest = line.lower().lstrip(" ")
    indent = line[: len(line) - len(rest)]
    if len(indent) > 3:
        return "", ""
    if fence := _FENCE.match(rest):
        return indent, fence[1] or fence[2]
    end = next((end for start, end in _HTML.items() if re.match(start, rest)), "")
    return indent, "" if end and _ends(rest, end) else end


def _ends(line: str, end: str) -> bool:
    if end[0] in "`~":
        return re.fullmatch(rf" {{0,3}}{end[0]}{{{len(end)},}}\s*", line) is not None
    return any(each in line.lower() for each in (_RAW if end in _RAW else (end,)))


def _cell(value: object) -> str:
    """A cell of a table, in one line, with `|` escaped."""
    return one_line(value).replace("|", "\\|") if str(value) else ""


def _figures(figures: list[Figure]) -> str:
    """The table of figures, and the commands that measure them again."""
    if not figures:
        return ""
    rows = []
    for each in figures:
        interval = "" if each["interval"] is None else "{:.4f} to {:.4f}".format(*each["interval"])
        cells = (each["data"], each["split"], each["metric"], f"{each['value']:.4f}", each["n"] or "", interval)
        rows.append(f"| {' | '.join(map(_cell, cells))} |")
    commands = dict.fromkeys(one_line(each["command"]) for each in figures if each["command"])
    said = "".join(f"\nMeasured by `{command.replace('`', '')}`.\n" for command in commands)
    return FIGURES.format(rows="\n".join(rows), commands=said)


def _results(name: str, task: str, figures: list[Figure]) -> dict[str, Any]:
    """Figures in the form of the Hub's model index."""
    from huggingface_hub import EvalResult

    results = [
        EvalResult(
            task_type=task,
            dataset_type=one_line(each["data"] or "unknown"),
            dataset_name=one_line(each["data"] or "unknown"),
            dataset_split=one_line(each["split"]) if each["split"] else None,
            metric_type=one_line(each["metric"]),
            metric_value=each["value"],
        )
        for each in figures
    ]
    return {"model_name": name, "eval_results": results} if results else {}


def model_card(config: Config, written: Mapping[str, Any], preprocess: Preprocess | None, name: str) -> str:
    """README.md of a checkpoint, in Markdown with the Hub's front matter.

    Args:
        config: that of the model, with its task, its call and the fields to show.
        written: config.json.
        preprocess: from a raw input to the model's input.
        name: of the checkpoint.
    """
    from huggingface_hub import ModelCardData

    title = plain(name)
    front = ModelCardData(
        library_name="zoo",
        license=written["license"],
        pipeline_tag=config.pipeline_tag,
        tags=list(dict.fromkeys(["zoo", written["family"], *config.tags])),
        **_results(title, config.pipeline_tag, written["figures"]),
    )
    rows = {field: config.described(field) for field in config.shown or field_names(config)}
    rows |= {"fused": "yes" if written["fused"] else "no", "dtype": written["dtype"]}
    if preprocess is None:
        given, prepared = "# it has no preprocess, so prepare the model's inputs yourself", config.argument
    else:
        given, prepared = f"{preprocess.raw} = {literal(preprocess.file)}", f"preprocess({preprocess.raw})[None]"
    call, base = config.call(prepared), written["base"]
    made_from = ""
    if base is not None and base["address"]:
        commit = f" at {one_line(base['commit'])}" if base["commit"] else ""
        made_from = f" Made from {one_line(base['address'])}{commit}."
    return CARD.format(
        front=front.to_yaml(),
        title=title,
        name=literal(name),
        text=closed("\n".join(map(plain, written["card"].split("\n"))))
        or f"A `{written['preset'] or written['family']}` model built with zoo.",
        parameters=f"{written['parameters']:,}",
        rows="\n".join(f"| {_cell(key)} | {_cell(value)} |" for key, value in rows.items()),
        figures=_figures(written["figures"]),
        source=one_line(written["source"]) if written["source"] else "not stated",
        base=made_from,
        datasets=f" Data: {one_line(', '.join(written['datasets']))}." if written["datasets"] else "",
        license=written["license"],
        version=written["zoo"],
        labels="labels" if config.labels is None else LABELS[config.labels].variable,
        given=f"{given}\n" if prepared in call else "",
        answer=f"answer = checkpoint({preprocess.raw})\n" if preprocess is not None and config.answers else "",
        call=call,
    )

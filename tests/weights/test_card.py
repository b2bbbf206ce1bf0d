"""The text of a card, which anyone may write, never hides what the zoo writes below it. Rendered as Markdown."""

import random
from html.parser import HTMLParser
from pathlib import Path

import huggingface_hub
import pytest
from markdown_it import MarkdownIt

import zoo
from helpers import randomise
from zoo.inputs.images import ImagePreprocess
from zoo.weights import load_model, save_model
from zoo.weights.card import closed

BELOW = "| field | value |\n|---|---|\n| parameters | 1 |\n\nSource: x\n\n```python\nimport zoo\n```\n"
PARTS = ["```", "~~~", "````", "  ```", "   ~~~", "    ```", "```python", " ```x`y", "```  ", " ```", "> ```", "- ```"]
PARTS += [
    "a",
    "- a",
    "  - b",
    "1. c",
    "   d",
    "     e",
    "",
    "",
    "> q",
    "*",
    "---",
    "===",
    "# h",
    "[x]: y",
    "`` a",
    "\\",
]
PARTS += ["<!--", "  <!--", "-->", "a <!-- b", "<!-- a --> b", "- <!--", "<!-->", "<?x", "?>", "<![CDATA[", "]]>"]
PARTS += ["<pre>", "</pre>", "<script>", "</script>", "<textarea", "<!DOCTYPE", "<div>", "</div>", "<b", "<b "]
PARTS += ["| a | b |", "|---|---|", "\\"]
TEXTS = {
    "fence": "Use it:\n\n```python\nimport zoo",
    "longer fence": "`````\n```\n````",
    "tildes": "~~~ sh\nzoo list\n```",
    "fence in a list": "- a\n\n  ```\nb\n```\nc",
    "comment": "Good.\n<!-- to do",
    "comment around a fence": "<!--\n```\n",
    "script": "<script>\nalert(1)",
    "details": "<details>\n<summary>more\n\n```\nx",
    "front matter": "---\nlicense: other\n---\n\nText\n---",
}


def rendered(text: str) -> str:
    return MarkdownIt("commonmark", {"html": True}).enable("table").render(text)


class Open(HTMLParser):
    """The elements of HTML that are open where the marked text comes."""

    def __init__(self, page: str, mark: str) -> None:
        super().__init__()
        self.stack, self.mark, self.found = list[str](), mark, None
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.stack.append(tag)

    def handle_endtag(self, tag):
        while tag in self.stack and self.stack.pop() != tag:
            pass

    def handle_data(self, data):
        if self.mark in data:
            self.found = [*self.stack]


def test_texts_of_many_parts_leave_the_rest_as_it_is():
    below = rendered(BELOW)
    for seed in range(3000):
        draw = random.Random(seed)
        text = "\n".join(draw.choice(PARTS) for _ in range(draw.randint(1, 9)))
        assert rendered(f"# t\n\n{closed(text)}\n\n{BELOW}").endswith(below), (seed, text)


def test_a_text_that_is_whole_is_not_touched():
    for text in (
        "",
        "a",
        "```\n<!--\n<details>\n```",
        "<!-- ``` -->",
        "- a\n\n  ```\n  b\n  ```\n\nc",
        "`<!--`",
        "a\n---",
    ):
        assert closed(text) == text


@pytest.mark.parametrize("case", TEXTS)
def test_cards(case: str, tmp_path: Path):
    model = randomise(zoo.create_model("vit_micro", dim=16, depth=1, heads=2, image=16, patch=8, classes=2))
    given = {"preprocess": ImagePreprocess(size=16), "labels": ["a", "b"], "license": "mit"}
    folder = save_model(model, tmp_path / "x", card=TEXTS[case], **given)
    card = huggingface_hub.ModelCard.load(folder / "README.md")
    assert card.data.license == "mit" and card.data.library_name == "zoo"
    page = rendered(card.text)
    assert "<td>parameters</td>" in page and '<pre><code class="language-python">import zoo' in page
    assert Open(page, "Source: not stated").found == ["p"]
    assert load_model(folder).about["card"] == TEXTS[case], "config.json has the text as it was given"

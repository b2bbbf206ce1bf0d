"""The page of a checkpoint as a static Space of the Hub, beside the repository of the model."""

from __future__ import annotations

import re
from collections.abc import Sequence
from tempfile import TemporaryDirectory
from typing import Any

from huggingface_hub.utils import yaml_dump

from zoo.tasks import predicting
from zoo.tasks.page.command import Options, page_of
from zoo.weights.format import read_config
from zoo.weights.hub import publish
from zoo.weights.hub.publishing import listed
from zoo.weights.hub.uploading import Files, Upload, check_token
from zoo.weights.names import locate

MARK = "zoo-page"  # the tag of a Space that this module wrote
README = """---
{front}---

The model `{repository}` as a page that runs in your browser: nothing you give it leaves your machine. Made by
`zoo publish --page`.
"""


class Space(Upload):
    """One run against the Space that has a page."""

    kind = "space"
    created = {"space_sdk": "static"}
    holds = "a page of the zoo"
    allowed = re.compile(r"\.gitattributes|README\.md|index\.html|style\.css")  # the last one is the Hub's own

    def check_held(self, commit: str, held: Sequence[str]) -> None:
        """ValueError if a page stands there that is neither one of the zoo nor what the Hub puts into a new Space."""
        if not {"README.md", "index.html"} & {*held}:
            return
        if "README.md" in held and f"\n- {MARK}\n" in self.fetched("README.md", commit).read_text("utf-8", "replace"):
            return
        if len(self.ask(self.api.list_repo_commits, repo_type=self.kind, revision=commit)) > 1:
            raise ValueError(
                f"{self.name} holds a page that is not of the zoo; choose another name, or delete it there"
            )

    def check(self, private: bool) -> None:
        """ValueError if a Space of this name exists that must not be written."""
        if self.ask(self.api.repo_exists, repo_type=self.kind):
            self.look(private)

    def run(self, private: bool) -> str:
        """The address of the Space, after it has the files."""
        self.create(private)
        head, held = self.look(private)
        if not self.unchanged(head):
            head = self.commit(head, [path for path in held if path == "style.css"]).oid
            if not self.unchanged(head):
                raise OSError(f"{self.name} has other files than those of its commit {head[:8]}")
        return self.address


def publish_with_page(
    name: str, repository: str, *, dry_run: bool, tag: str | None, message: str | None, private: bool, options: Options
) -> str:
    """As `zoo.publish`, and puts the page of `zoo page` into a static Space of the same name.

    The page is made and the Space is checked before anything is uploaded. A repetition commits nothing that is there.

    Args:
        options: of the page.

    Returns:
        The addresses of the repository and the Space in two lines; with `dry_run` what both would get.

    Raises:
        ValueError: as `zoo.publish` does; or the model cannot have a page, or the Space holds something else.
        OSError: as `zoo.publish` does; a line that says so where the model is published, and its page is not.
    """
    given: dict[str, Any] = {"tag": tag, "message": message, "private": private}
    planned = publish(name, repository, dry_run=True, **given)
    if not dry_run:
        check_token(None)
    title = repository.partition("/")[2]
    files = space_files(name, repository, page_of(name, title, options))
    with TemporaryDirectory(prefix="zoo-publish-", ignore_cleanup_errors=True) as cache:
        space = Space(repository, files, message or f"Publish the page of {title} with zoo", None, cache)
        if dry_run:
            readme = files["README.md"]
            assert isinstance(readme, bytes)
            return "\n".join([planned, "", *listed(files, space.name), "", "README.md", readme.decode().rstrip()])
        space.check(private)
        address = publish(name, repository, **given)
        predicting.report(f"published {address}; now its page")
        try:
            return f"{address}\n{space.run(private)}"
        except (ValueError, OSError) as error:
            raise OSError(f"{address} is published, but its page is not; repeat the command: {error}") from error


def space_files(name: str, repository: str, page: bytes) -> Files:
    """What the Space holds: the page, and a README.md with the Hub's settings."""
    front: dict[str, Any] = {"title": repository.partition("/")[2], "sdk": "static", "pinned": False}
    front |= {"models": [repository], "tags": [MARK], "license": read_config(locate(name) / "config.json")["license"]}
    readme = README.format(front=yaml_dump(front), repository=repository)
    return {"README.md": readme.encode(), "index.html": page}

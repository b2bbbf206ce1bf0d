"""A checkpoint becomes one commit on the Hub, is downloaded and probed again, and only then tagged."""

import filecmp
import re
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from huggingface_hub.utils import validate_repo_id, yaml_dump

from zoo.text import counted, one_line
from zoo.weights.files import FILES, CheckpointError, file_of
from zoo.weights.format import read_config
from zoo.weights.hub.downloading import download
from zoo.weights.hub.uploading import Files, Upload, check_token, size_of
from zoo.weights.names import locate
from zoo.weights.read import read_checkpoint

RESULTS = ".eval_results/zoo_"  # results that a later upload replaces; others in that folder are left alone


def publish(
    name: str | Path,
    repository: str,
    *,
    dry_run: bool = False,
    pr: bool = False,
    tag: str | None = None,
    message: str | None = None,
    private: bool = False,
    token: str | bool | None = None,
) -> str:
    """Uploads a checkpoint in one commit, downloads it again, checks its probe, and only then makes the tag.

    It can be repeated after any interruption: nothing that is on the Hub already is uploaded or tagged again.

    Args:
        name: of the checkpoint, as `zoo.load_checkpoint` takes it.
        repository: "owner/name" on the Hub; it is created if it does not exist, unless with `pr`.
        dry_run: upload nothing; needs no network and no token.
        pr: open a pull request instead of writing to `main`.
        tag: a tag for this upload, so that "owner/name@tag" always loads it.
        message: title of the commit or the pull request, in one line; otherwise it names the checkpoint.
        private: create the repository as private.
        token: of the Hub; None or True is the stored one or HF_TOKEN.

    Returns:
        The address of the repository or the pull request; with `dry_run` a list of what would be uploaded.

    Raises:
        ValueError: the checkpoint is incomplete or its probe fails, a name is invalid, no token is found, the
            repository holds something other than a checkpoint of the zoo, or its tag is on another commit.
        OSError: the Hub refuses or cannot be reached, or gives back something else; one line that says what was done.
    """
    if not isinstance(repository, str) or "/" not in repository:
        raise ValueError(f"the name on the Hub must be OWNER/NAME, got '{one_line(repository, 100)}'")
    validate_repo_id(repository)
    if tag is not None and not re.fullmatch(r"\w[\w.+-]*", tag):
        raise ValueError(f"a tag must be letters, digits and . + - _, got '{tag}'")
    if message is not None and (not message.strip() or one_line(message, 200) != message):
        raise ValueError(f"the message must be one line of 1 to 200 characters, got '{one_line(message, 60)}'")
    if tag is not None and pr:
        raise ValueError("a pull request cannot be tagged; publish with a tag after it is merged")
    folder = locate(name).resolve()
    files = _files(folder, repository)
    if dry_run:
        return _listing(files, repository)
    check_token(token)
    with TemporaryDirectory(prefix="zoo-publish-", ignore_cleanup_errors=True) as cache:
        title = message or f"Publish {folder.name} with zoo"
        return _Model(repository, files, title, token, cache).run(pr, tag, private)


def _files(folder: Path, repository: str) -> Files:
    """What is uploaded, after the checkpoint has been checked."""
    paths = {file: file_of(folder, file) for file in FILES}
    if not read_config(paths["config.json"])["files"]:
        raise CheckpointError(
            f"{folder} has an older format, without the hashes of its files; save it again by "
            "zoo.save_model(zoo.load_model(FOLDER), FOLDER), then publish it"
        )
    config = read_checkpoint(folder, check=True).config
    return paths | _results(config["figures"])


def _results(figures: Sequence[Mapping[str, Any]]) -> dict[str, bytes]:
    """The files of `.eval_results`, one a figure. The Hub knows only data sets of its own there, as owner/name."""
    found: dict[str, list[dict[str, Any]]] = {}
    for figure in figures:
        if not re.fullmatch(r"[\w.-]+/[\w.-]+", figure["data"]):
            continue
        notes = [figure["metric"], f"n = {figure['n']}"]
        if figure["interval"] is not None:
            notes.append("95 % interval {} to {}".format(*figure["interval"]))
        dataset = {"id": figure["data"], "task_id": figure["split"]}
        words = " ".join((figure["data"], figure["split"], figure["metric"])).lower()
        entries = found.setdefault(re.sub("[^a-z0-9]+", "_", words).strip("_"), [])
        entries.append({"dataset": dataset, "value": figure["value"], "notes": "; ".join(notes)})
    return {f"{RESULTS}{name}.yaml": yaml_dump(entries).encode() for name, entries in found.items()}


def listed(files: Files, repository: str) -> list[str]:
    """What a repository would get: lines with the size of each file."""
    sizes = {path: size_of(data) for path, data in files.items()}
    lines = [f"{repository} would get {counted(len(files), 'file')} of {sum(sizes.values()):,} bytes:"]
    return lines + [f"{size:>14,}  {path}" for path, size in sorted(sizes.items())]


def _listing(files: Files, repository: str) -> str:
    """The files with their sizes, and the text of those that are made for the Hub."""
    assert isinstance(card := files["README.md"], Path)
    text = card.read_text(encoding="utf-8")
    front = text[: text.find("\n---", 3) + 4] if text.startswith("---") else ""
    lines = [*listed(files, repository), "", "README.md begins with", front]
    for path, data in files.items():
        if isinstance(data, bytes):
            lines += ["", path, data.decode().rstrip()]
    return "\n".join(lines)


class _Model(Upload):
    """One run of `publish` against the Hub."""

    kind = "model"
    holds = "a checkpoint of the zoo"
    allowed = re.compile(rf"({'|'.join(map(re.escape, FILES))}|\.gitattributes|\.eval_results/.*)")

    def run(self, pr: bool, tag: str | None, private: bool) -> str:
        api, repository, address = self.api, self.repository, self.address
        if not pr:
            self.create(private)
        head, held = self.look(private)
        tags = {each.name: each.target_commit for each in self.ask(api.list_repo_refs).tags} if tag else {}
        revision = None
        if pr and (number := self.pull_request()):
            revision, address = f"refs/pr/{number}", f"{address}/discussions/{number}"
            head = self.info(revision).sha
        changed = not self.unchanged(head)
        if tag in tags and (changed or tags[tag] != head):
            raise ValueError(f"{repository} has the tag '{tag}' on commit {tags[tag][:8]} already; choose another tag")
        if changed:
            stale = [path for path in held if path.startswith(RESULTS) and path not in self.files]
            commit = self.commit(head, stale, revision, create_pr=pr and revision is None)
            head, address = commit.oid, commit.pr_url or address
        self.check(head)
        if tag is not None and tag not in tags:
            self.ask(
                partial(api.create_tag, tag=tag, revision=head),
                before=f"the upload stands as commit {head[:8]} of {address}, but has no tag '{tag}'; repeat the "
                "command to make it: ",
            )
        return address

    def foreign(self, held: Sequence[str]) -> list[str]:
        found = super().foreign(held)
        return found or ([] if "config.json" in held else [path for path in held if path in FILES])

    def check_held(self, commit: str, held: Sequence[str]) -> None:
        if "config.json" not in held:
            return
        path = self.fetched("config.json", commit)
        try:
            read_config(path)
        except CheckpointError as error:
            why = str(error).replace(str(path), "its config.json")
            raise ValueError(f"{self.name} holds no checkpoint of this zoo ({why}); choose another name") from error

    def pull_request(self) -> int | None:
        """The number of the open pull request that an earlier run made."""
        author = self.ask(lambda name: self.api.whoami())["name"]
        kind: dict[str, Any] = {"discussion_type": "pull_request", "discussion_status": "open", "author": author}
        found = self.ask(lambda name: [*self.api.get_repo_discussions(name, **kind)])
        return next((each.num for each in found if each.title == self.title), None)

    def check(self, commit: str) -> None:
        """OSError unless the Hub gives back what was uploaded, and its probe passes."""
        said = f"{self.repository} has the upload as commit {commit[:8]}, but it failed its check and was not tagged"
        try:
            folder = download(self.repository, commit, token=self.token, cache_dir=self.cache)
            read_checkpoint(folder, check=True)
        except CheckpointError as error:
            raise OSError(f"{said}: {error}; repeat the command") from error
        for path in folder.iterdir():
            here = self.files[path.name]
            if isinstance(here, Path) and not filecmp.cmp(path, here, shallow=False):
                raise OSError(f"{said}: {path.name} differs from {here}; repeat the command")

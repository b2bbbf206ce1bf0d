"""One run of an upload: a repository of the Hub gets files in one commit, unless it has them already."""

import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token

import zoo
from zoo.weights.hub.downloading import git_blob, sha256_of
from zoo.weights.hub.errors import LOG_IN, explain

Files = Mapping[str, bytes | Path]  # what a repository will hold, by its path there


def check_token(token: str | bool | None) -> None:
    """ValueError if there is no token: None and True mean the stored one or HF_TOKEN."""
    if token is False or (not isinstance(token, str) and get_token() is None):
        raise ValueError(f"no token of the Hub found; {LOG_IN}")


def size_of(data: bytes | Path) -> int:
    return len(data) if isinstance(data, bytes) else data.stat().st_size


class Upload:
    """One run against a repository of one kind.

    Args:
        repository: "owner/name".
        files: what it will hold.
        title: of the commit.
        token: of the Hub; None or True is the stored one or HF_TOKEN.
        cache: a folder for what is downloaded.
    """

    kind: ClassVar[str]  # of the repository, as the client names it
    created: ClassVar[dict[str, str]] = {}  # arguments of its creation
    holds: ClassVar[str]  # what it may hold, in words
    allowed: ClassVar[re.Pattern[str]]  # the paths that it may hold

    def __init__(self, repository: str, files: Files, title: str, token: str | bool | None, cache: str) -> None:
        self.repository, self.files, self.title, self.token, self.cache = repository, files, title, token, cache
        self.api = HfApi(token=token, library_name="zoo", library_version=zoo.__version__)

    @property
    def name(self) -> str:
        """The path of the repository on the Hub: OWNER/NAME, or spaces/OWNER/NAME."""
        return self.repository if self.kind == "model" else f"{self.kind}s/{self.repository}"

    @property
    def address(self) -> str:
        return f"{self.api.endpoint}/{self.name}"

    def ask(self, call: Callable[..., Any], before: str = "", **given: Any) -> Any:
        """The Hub's answer about this repository; OSError of one line if it gives none."""
        try:
            return call(self.repository, **given)
        except Exception as error:  # the client raises its own errors, those of its network library, and the system's
            why = explain(error, self.repository, self.token)
            raise OSError(f"{before or f'cannot publish to {self.name}: '}{why}") from error

    def info(self, revision: str | None = None) -> Any:
        return self.ask(self.api.repo_info, repo_type=self.kind, revision=revision)

    def create(self, private: bool) -> None:
        """Creates the repository if it does not exist."""
        given: dict[str, Any] = {"repo_type": self.kind, "private": private or None, "exist_ok": True}
        self.ask(self.api.create_repo, **given, **self.created)

    def look(self, private: bool) -> tuple[str, list[str]]:
        """The newest commit and its files; ValueError if they are not of this kind, or public against `private`."""
        info = self.info()
        held = [each.rfilename for each in info.siblings or []]
        if private and not info.private:
            raise ValueError(f"{self.name} exists and is public; make it private in its settings first")
        if foreign := self.foreign(held):
            more = f" and {len(foreign) - 5} more" if len(foreign) > 5 else ""
            raise ValueError(
                f"{self.name} holds something other than {self.holds}: {', '.join(foreign[:5])}{more}; "
                "choose another name, or delete these files there"
            )
        self.check_held(info.sha, held)
        return info.sha, held

    def foreign(self, held: Sequence[str]) -> list[str]:
        """The files that such a repository does not have."""
        return [path for path in held if not self.allowed.fullmatch(path)]

    def check_held(self, commit: str, held: Sequence[str]) -> None:
        """ValueError if the files of a commit, whose names are allowed, are someone else's."""
        raise NotImplementedError

    def fetched(self, path: str, commit: str) -> Path:
        fetch = partial(self.api.hf_hub_download, repo_type=self.kind, revision=commit, cache_dir=self.cache)
        return Path(self.ask(fetch, filename=path))

    def unchanged(self, commit: str) -> bool:
        """Whether the files of a commit are those to be uploaded."""
        given: dict[str, Any] = {"paths": [*self.files], "revision": commit, "repo_type": self.kind}
        found = self.ask(self.api.get_paths_info, **given)
        return {each.path for each in found} == self.files.keys() and all(map(self.same, found))

    def same(self, there: Any) -> bool:
        here = self.files[there.path]
        if there.lfs is not None:
            own = hashlib.sha256(here).hexdigest() if isinstance(here, bytes) else sha256_of(here)
            return there.lfs.sha256 == own
        return there.blob_id == git_blob(here if isinstance(here, bytes) else here.read_bytes())

    def commit(self, head: str, stale: Sequence[str], revision: str | None = None, create_pr: bool = False) -> Any:
        """One commit on top of `head`, without the files that are `stale`."""
        operations = [CommitOperationAdd(path, data) for path, data in self.files.items()]
        return self.ask(
            self.api.create_commit,
            operations=operations + [CommitOperationDelete(path) for path in stale],
            commit_message=self.title,
            revision=revision,
            create_pr=create_pr,
            parent_commit=head,
            repo_type=self.kind,
        )

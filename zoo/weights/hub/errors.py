"""What an error of the Hub's client means and what to do about it, in one line."""

import re
from collections.abc import Iterator

from huggingface_hub import constants, get_token
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)

from zoo.text import one_line, reason

OFFLINE = "downloads are off; allow them once (no local_files_only, HF_HUB_OFFLINE=0)"
LOG_IN = "log in with `hf auth login` or set HF_TOKEN"
NETWORK = ("httpx", "httpx2", "httpcore", "httpcore2", "requests", "urllib3")  # where the client's versions get errors


def explain(error: BaseException, repository: str, token: str | bool | None = None) -> str:
    """The reason for an error of the client, and what to do; one line.

    Args:
        error: what a call about this repository raised.
        repository: "owner/name".
        token: the token of the call; None if it was the stored one.
    """
    for each in _chain(error):
        if isinstance(each, HfHubHTTPError):
            return _answer(each, repository, bool(get_token() if token is None else token))
        if isinstance(each, OfflineModeIsEnabled) or (
            isinstance(each, LocalEntryNotFoundError) and each.__cause__ is None
        ):
            return f"it is not in the cache, and {OFFLINE}"
        if type(each).__module__.partition(".")[0] in NETWORK:
            return f"no connection to {constants.ENDPOINT} ({reason(each)}); check the network and try again"
        if isinstance(each, OSError) and each.strerror and not isinstance(each, ConnectionError):
            place = f"{each.filename}: " if each.filename else ""
            return f"{place}{reason(each)}; choose another cache by cache_dir or HF_HOME"
    if "Consistency check failed" in str(error):
        return "the connection broke before a file was complete; try again"
    return one_line(error)


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def _answer(error: HfHubHTTPError, repository: str, known: bool) -> str:
    """What the Hub's answer means; `known`: whether a token was sent."""
    page = f"{constants.ENDPOINT}/{repository}"
    status = error.response.status_code
    said = one_line(error.server_message or error)
    if isinstance(error, GatedRepoError):
        return f"access is restricted: ask for it at {page}" + ("" if known else f", then {LOG_IN}")
    if isinstance(error, RepositoryNotFoundError):
        hint = "your token may not read it" if known else f"{LOG_IN} if it is private"
        return f"the Hub has no such repository, or it is private; check the name, or {hint}"
    if status == 401:
        return f"the Hub refuses the token ({said}); {LOG_IN}"
    if status == 403:
        return f"the token lacks the permission ({said}); see {constants.ENDPOINT}/settings/tokens"
    if status == 412:
        return "the repository changed meanwhile; try again"
    if status == 429:
        return f"too many requests; wait {_wait(error)} and try again" + ("" if known else f", or {LOG_IN}")
    if status >= 500:
        return f"the Hub has a fault (status {status}); try again later"
    return f"the Hub answered {status}: {said}"


def _wait(error: HfHubHTTPError) -> str:
    headers = error.response.headers
    found = re.search(r"\bt=(\d+)", headers.get("ratelimit", "")) or re.match(r"(\d+)", headers.get("retry-after", ""))
    return f"{found[1]} seconds" if found else "some minutes"

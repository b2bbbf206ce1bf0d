"""`zoo publish --page`: the page of `zoo page` becomes a static Space, or nothing is uploaded."""

import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import SpaceCard

import hub_server
from hub_server import READER, WRITER, Hub, Repo, point_to
from paging import config, stand_in
from training import refused
from zoo.__main__ import main
from zoo.tasks.page import document
from zoo.tasks.page.command import Options
from zoo.weights import FILES

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=")  # of the client's HTTP library

MODEL, NAME = "vit_micro.digits", "owner/digits"
SPACE = f"spaces/{NAME}"
ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def runtime(tmp_path_factory: pytest.TempPathFactory) -> str:
    return stand_in(tmp_path_factory.mktemp("runtime"))


@pytest.fixture
def hub(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> Hub:
    monkeypatch.setenv("HF_TOKEN", WRITER)
    return hub


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """Pages that are made at once, for tests of what the Hub is asked; the calls that made them."""
    made: list[tuple[Any, ...]] = []

    def page_of(*given: Any) -> bytes:
        made.append(given)
        return b"<!doctype html>\n" + str(given).encode()

    monkeypatch.setattr("zoo.tasks.page.space.page_of", page_of)
    return made


def held(hub: Hub, name: str) -> dict[str, bytes]:
    repo = hub.repos[name]
    return {path: data for path, data in repo.commits[repo.branches["main"]].items() if path != ".gitattributes"}


@pytest.mark.slow
def test_the_page_of_zoo_page_becomes_a_static_space(hub: Hub, runtime: str, tmp_path: Path, capsys, monkeypatch):
    """The real page, which the Hub keeps in LFS for its size."""
    monkeypatch.setattr(hub_server, "LARGE", 1_000_000)
    main(["publish", MODEL, NAME, "--page", "--runtime", runtime])
    assert capsys.readouterr().out.splitlines() == [f"{hub.address}/{NAME}", f"{hub.address}/{SPACE}"]
    space = hub.repos[SPACE]
    assert space.sdk == "static" and not space.private and len(space.messages) == 2
    assert held(hub, NAME).keys() >= set(FILES)
    files = held(hub, SPACE)
    assert files.keys() == {"README.md", "index.html"}, "the Hub's own style.css is gone"
    path = tmp_path / "digits" / "page.html"
    path.parent.mkdir()
    main(["page", MODEL, "--runtime", runtime, "--output", str(path)])
    wanted = path.read_text("utf-8").replace("<title>vit_micro.digits<", "<title>digits<")
    page = files["index.html"].decode()
    assert config(page) == config(wanted) and "<title>digits</title>" in page
    assert len(page) == len(wanted) - len("vit_<wbr>micro.<wbr>digits") + len("digits"), "titled after the repository"
    assert hub.seen("PUT /upload/"), "the page went to LFS"
    card = SpaceCard(files["README.md"].decode()).data.to_dict()
    assert (card["title"], card["sdk"], card["pinned"]) == ("digits", "static", False)
    assert (card["models"], card["license"]) == ([NAME], "apache-2.0")
    hub.log.clear()
    main(["publish", MODEL, NAME, "--page", "--runtime", runtime])
    assert len(space.messages) == 2 and not hub.seen("/commit/|/tag/|PUT"), "the same page again"


def test_a_new_page_replaces_the_old_one(hub: Hub, quick: list[Any]):
    main(["publish", MODEL, NAME, "--page", "--private", "--tag", "v1", "--message", "A first one"])
    space = hub.repos[SPACE]
    assert space.private and hub.repos[NAME].private and hub.repos[NAME].tags and not space.tags
    assert space.messages[1:] == hub.repos[NAME].messages[1:] == ["A first one"]
    main(["publish", MODEL, NAME, "--page", "--runtime", "elsewhere", "--webgpu"])
    assert len(space.messages) == 3 and quick[-1][2] == Options("elsewhere", webgpu=True)
    assert b"elsewhere" in held(hub, SPACE)["index.html"]
    assert len(hub.repos[NAME].messages) == 2, "of the model nothing changed"
    assert [each[:2] for each in quick] == [(MODEL, "digits")] * 2


def test_dry_run_lists_both_and_asks_nothing(hub: Hub, quick: list[Any], monkeypatch: pytest.MonkeyPatch, capsys):
    monkeypatch.delenv("HF_TOKEN")
    main(["publish", MODEL, NAME, "--page", "--dry-run"])
    text = capsys.readouterr().out
    assert hub.log == [] and f"{NAME} would get" in text and f"{SPACE} would get 2 files of" in text
    front = yaml.safe_load(text.split("\nREADME.md\n---\n")[1].split("\n---\n")[0])
    assert front["sdk"] == "static" and "index.html" in text


@pytest.mark.daily(3)
def test_what_has_no_page_is_not_uploaded(hub: Hub, runtime: str, monkeypatch: pytest.MonkeyPatch):
    wanted = "zoo page: dit_micro.digits is for `zoo generate`, which is not yet supported, only "
    more = ["--page", "--runtime", runtime]
    assert refused("publish", "dit_micro.digits", NAME, *more) == wanted + "classify, detect, transcribe"
    monkeypatch.setattr(document, "LARGEST", 1_000_000)
    assert refused("publish", MODEL, NAME, *more).endswith("and 1 MB is allowed")
    assert refused("publish", MODEL, NAME, "--page", "--runtime", "nowhere").startswith("--runtime nowhere: ")
    assert refused("publish", MODEL, NAME, "--page", "--pr").startswith("a pull request has no page; ")
    assert refused("publish", MODEL, NAME, "--runtime", runtime) == "--runtime is for --page"
    assert refused("publish", MODEL, NAME, "--webgpu") == "--webgpu is for --page"
    assert refused("publish", MODEL, "digits", *more).startswith("the name on the Hub must be OWNER/NAME")
    assert hub.log == []


def test_rights_and_network(hub: Hub, quick: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HF_TOKEN", READER)
    assert "lacks the permission" in refused("publish", MODEL, NAME, "--page")
    monkeypatch.delenv("HF_TOKEN")
    quick.clear()
    assert "no token of the Hub found; log in with" in refused("publish", MODEL, NAME, "--page")
    assert not quick and not hub.repos, "no page is made for nothing"
    point_to("http://127.0.0.1:9", tmp_path / "home", monkeypatch)
    monkeypatch.setenv("HF_TOKEN", WRITER)
    assert "no connection to" in refused("publish", MODEL, NAME, "--page")


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({"app.py": b""}, "something other than a page of the zoo: app.py; choose another name, or delete these files"),
        ({"index.html": b"mine"}, "a page that is not of the zoo; choose another name, or delete it"),
    ],
)
def test_another_space_is_left_alone(files: dict[str, bytes], words: str, hub: Hub, quick: list[Any]):
    hub.put(SPACE, files)
    assert refused("publish", MODEL, NAME, "--page") == f"{SPACE} holds {words} there"
    assert NAME not in hub.repos and len(hub.repos[SPACE].messages) == 2


def test_a_public_space_does_not_become_private(hub: Hub, quick: list[Any]):
    hub.repos[SPACE] = Repo(template=hub_server.TEMPLATE)
    assert f"{SPACE} exists and is public" in refused("publish", MODEL, NAME, "--page", "--private")
    assert NAME not in hub.repos


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ({"where": "POST /api/spaces/.*/commit/", "status": 503}, "status 503"),
        ({"where": "POST /api/spaces/.*/commit/", "lost": True}, "no connection to"),
        ({"where": "POST /api/spaces/.*/preupload/", "status": 403}, "lacks the permission"),
    ],
)
def test_a_fault_of_the_space_is_told_and_a_repetition_succeeds(
    fault: dict[str, Any], words: str, hub: Hub, quick: list[Any]
):
    """The Space has been created by then, with the files that the Hub puts into a new one."""
    hub.fail(**fault)
    line = refused("publish", MODEL, NAME, "--page")
    assert line.startswith(f"{hub.address}/{NAME} is published, but its page is not; repeat the command: ")
    assert f"cannot publish to {SPACE}: " in line and words in line
    hub.faults.clear()
    main(["publish", MODEL, NAME, "--page"])
    assert len(hub.repos[NAME].messages) == len(hub.repos[SPACE].messages) == 2
    assert held(hub, SPACE).keys() == {"README.md", "index.html"}


def test_the_script(hub: Hub, quick: list[Any], monkeypatch: pytest.MonkeyPatch, capsys):
    monkeypatch.setattr(sys, "argv", ["scripts/publish", MODEL, NAME, "--page", "--dry-run"])
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    runpy.run_path(str(ROOT / "scripts/publish"), run_name="__main__")
    assert f"{SPACE} would get 2 files" in capsys.readouterr().out

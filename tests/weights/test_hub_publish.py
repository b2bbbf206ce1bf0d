import json
import os
import runpy
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import yaml
from huggingface_hub import ModelCard

import zoo
from helpers import randomise
from hub_server import READER, WRITER, Hub, Repo, environment
from zoo.__main__ import main
from zoo.inputs.images import ImagePreprocess
from zoo.weights import FILES, load_checkpoint, load_model, save_model
from zoo.weights.hub import publish, publishing

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=")  # of the client's HTTP library

NAME = "owner/vit.test"
SMALL = {"dim": 16, "depth": 1, "heads": 2, "image": 16, "patch": 8, "classes": 2}
SCRIPT = Path(__file__).parents[2] / "scripts" / "publish"
FIGURES = [
    {
        "data": "zoo/digits",
        "split": "test",
        "metric": "top-1",
        "value": 0.5,
        "n": 9,
        "interval": [0.25, 0.75],
        "command": "",
    },
    {"data": "my photos", "split": "val", "metric": "top-1", "value": 0.125, "n": 8, "interval": None, "command": ""},
]


def save(folder: Path, seed: int = 0) -> Path:
    model = randomise(zoo.create_model("vit_micro", **SMALL), seed)
    return save_model(model, folder, preset="vit_micro", preprocess=ImagePreprocess(size=16), labels=["ant", "bee"])


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return save(tmp_path_factory.mktemp("a") / "vit.test"), save(tmp_path_factory.mktemp("b") / "vit.test", seed=1)


@pytest.fixture
def folder(made: tuple[Path, Path], tmp_path: Path) -> Path:
    return shutil.copytree(made[0], tmp_path / "vit.test")


@pytest.fixture
def hub(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> Hub:
    monkeypatch.setenv("HF_TOKEN", WRITER)
    return hub


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def published(hub: Hub, revision: str = "main") -> dict[str, bytes]:
    repo = hub.repos[NAME]
    return {path: data for path, data in repo.commits[repo.commit_of(revision)].items() if path != ".gitattributes"}


def refusal(*arguments: Any, **more: Any) -> str:
    with pytest.raises((ValueError, OSError)) as error:
        publish(*arguments, **more)
    assert "\n" not in str(error.value) and len(str(error.value)) < 600
    return str(error.value)


def give_figures(folder: Path, figures: list[Any]) -> None:
    save_model(load_model(folder), folder, figures=figures)


def test_one_commit_a_check_and_then_the_tag(hub, folder):
    assert publish(folder, NAME, tag="v1") == f"{hub.address}/{NAME}"
    repo = hub.repos[NAME]
    assert published(hub).keys() == set(FILES) and not repo.private
    assert all(published(hub)[name] == data for name, data in contents(folder).items() if name != "README.md")
    assert repo.messages == ["initial commit", "Publish vit.test with zoo"] and repo.tags == {
        "v1": repo.branches["main"]
    }
    order = [next(i for i, line in enumerate(hub.log) if word in line) for word in ("/commit/", "GET /lfs", "/tag/")]
    assert order == sorted(order), "commit, fresh download, tag"
    assert load_checkpoint(f"{NAME}@v1", check=True).labels == ("ant", "bee")


def test_a_repetition_changes_nothing(hub, folder):
    publish(folder, NAME, tag="v1")
    hub.log.clear()
    assert publish(folder, NAME, tag="v1") == f"{hub.address}/{NAME}"
    assert len(hub.repos[NAME].messages) == 2 and not hub.seen("/commit/|/tag/|PUT")
    publish(folder, NAME, tag="v2")
    assert len(hub.repos[NAME].messages) == 2 and hub.repos[NAME].tags["v2"] == hub.repos[NAME].tags["v1"]


def test_a_tag_never_moves(hub, made):
    publish(made[0], NAME, tag="v1")
    repo, before = hub.repos[NAME], dict(hub.repos[NAME].tags)
    hub.log.clear()
    assert "has the tag 'v1' on commit" in refusal(made[1], NAME, tag="v1") and not hub.seen("/commit/|PUT")
    publish(made[1], NAME, tag="v2")
    assert "choose another tag" in refusal(made[1], NAME, tag="v1")
    assert repo.tags == before | {"v2": repo.branches["main"]} and len(repo.messages) == 3
    assert published(hub)["model.safetensors"] == contents(made[1])["model.safetensors"]


@pytest.mark.parametrize(
    ("files", "words"),
    [
        (
            {"pytorch_model.bin": b"", **{f"{i}.txt": b"" for i in range(6)}},
            ["0.txt", "and 2 more", "delete these files"],
        ),
        ({"README.md": b"# mine"}, ["README.md"]),
        ({"config.json": b'{"architectures": ["ViTModel"]}', "model.safetensors": b""}, ["its config.json is not"]),
    ],
)
def test_a_repository_that_holds_something_else_is_refused(hub, folder, files, words):
    hub.put(NAME, files)
    line = refusal(folder, NAME)
    assert all(word in line for word in [NAME, "choose another name", *words]), line
    assert published(hub) == files


def test_private(hub, folder):
    publish(folder, NAME, private=True)
    assert hub.repos[NAME].private
    publish(folder, NAME)
    hub.repos["owner/public"] = Repo()
    assert "owner/public exists and is public" in refusal(folder, "owner/public", private=True)
    assert len(hub.repos["owner/public"].messages) == 1


def test_dry_run_needs_neither_network_nor_token(hub, folder, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    give_figures(folder, FIGURES)
    text = publish(folder, NAME, dry_run=True)
    size = (folder / "model.safetensors").stat().st_size
    assert hub.log == [] and f"{NAME} would get 5 files" in text and f"{size:>14,}  model.safetensors" in text
    assert "model-index:" in text and ".eval_results/zoo_zoo_digits_test_top_1.yaml" in text


def test_figures_become_a_model_index_and_results(hub, folder):
    give_figures(folder, FIGURES)
    publish(folder, NAME)
    files = published(hub)
    card = ModelCard(files["README.md"].decode())
    found = [
        (each.dataset_name, each.dataset_split, each.metric_type, each.metric_value) for each in card.data.eval_results
    ]
    assert found == [(each["data"], each["split"], each["metric"], each["value"]) for each in FIGURES]
    assert card.data.model_name == folder.name and card.data.eval_results[0].task_type == "image-classification"
    assert files["README.md"] == (folder / "README.md").read_bytes()
    (path,) = [path for path in files if path.startswith(".eval_results/")]
    assert yaml.safe_load(files[path]) == [
        {
            "dataset": {"id": "zoo/digits", "task_id": "test"},
            "value": 0.5,
            "notes": "top-1; n = 9; 95 % interval 0.25 to 0.75",
        }
    ]
    publish(folder, NAME)
    assert len(hub.repos[NAME].messages) == 2, "the same texts again"
    hub.put(NAME, {".eval_results/theirs.yaml": b"[]"})
    give_figures(folder, FIGURES[1:])
    publish(folder, NAME)
    assert {path for path in published(hub) if "/" in path} == {".eval_results/theirs.yaml"}, "only own results go"


def test_a_pull_request_is_opened_once(hub, made, monkeypatch):
    assert "no such repository" in refusal(made[0], NAME, pr=True), "nothing is created"
    publish(made[0], NAME)
    monkeypatch.setenv("HF_TOKEN", READER)
    assert publish(made[1], NAME, pr=True) == publish(made[1], NAME, pr=True) == f"{hub.address}/{NAME}/discussions/1"
    assert len(hub.repos[NAME].messages) == 3
    assert published(hub)["model.safetensors"] == contents(made[0])["model.safetensors"]
    assert published(hub, "refs/pr/1")["model.safetensors"] == contents(made[1])["model.safetensors"]
    publish(made[0], NAME, pr=True)
    assert published(hub, "refs/pr/1") == published(hub) and len(hub.repos[NAME].pulls) == 1
    assert "after it is merged" in refusal(made[0], NAME, pr=True, tag="v1")


def test_a_model_is_pushed_with_the_arguments_of_the_hub(hub, folder, monkeypatch):
    model: Any = load_model(folder)
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(ValueError, match="no token of the Hub found"):
        model.push_to_hub(NAME)
    with pytest.raises(ValueError, match="no token of the Hub found"):
        model.push_to_hub(NAME, token=False)
    assert hub.log == []
    given = {"commit_message": "A first one", "private": True, "tag": "v1", "token": WRITER}
    assert model.push_to_hub(NAME, **given) == f"{hub.address}/{NAME}"
    repo = hub.repos[NAME]
    assert repo.messages == ["initial commit", "A first one"] and repo.private and repo.tags.keys() == {"v1"}
    monkeypatch.setenv("HF_TOKEN", WRITER)
    randomise(model, 5)
    for _ in range(2):
        assert model.push_to_hub(NAME, commit_message="Mend it", create_pr=True, token=True).endswith("discussions/1")
    assert [each["title"] for each in repo.pulls] == ["Mend it"] and len(repo.messages) == 3
    for name in ("owner/..", "owner/", "a/b/c", "", "a", None, 3):
        with pytest.raises(ValueError, match="^Repo id|the name on the Hub must be OWNER/NAME"):
            model.push_to_hub(name)
    with pytest.raises(TypeError, match="'pr'"):
        model.push_to_hub(NAME, pr=True)


def test_the_message_of_a_commit(hub, folder, capsys):
    main(["publish", str(folder), NAME, "--message", "A second: ä"])
    assert capsys.readouterr().out == f"{hub.address}/{NAME}\n" and hub.repos[NAME].messages[1:] == ["A second: ä"]
    for message in ("", " ", "a\nb", "x" * 201, "\x1b[31m"):
        assert "the message must be one line of 1 to 200 characters" in refusal(folder, NAME, message=message)


def test_a_pull_request_without_changes_is_not_opened(hub, folder):
    publish(folder, NAME)
    assert publish(folder, NAME, pr=True) == f"{hub.address}/{NAME}" and not hub.repos[NAME].pulls


FAULTS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "create": ({"where": "repos/create", "status": 500}, ["cannot publish", "try again later"]),
    "upload": ({"where": "PUT", "status": 500}, ["cannot publish", "status 500"]),
    "dropped upload": ({"where": "PUT", "lost": True}, ["no connection to"]),
    "commit": ({"where": "/commit/", "status": 503}, ["cannot publish", "status 503"]),
    "lost answer": ({"where": "/commit/", "lost": True}, ["no connection to", "try again"]),
    "too many": ({"where": "/commit/", "status": 429, "headers": {"Retry-After": "60"}}, ["wait 60 seconds"]),
    "changed meanwhile": ({"where": "/commit/", "status": 412}, ["changed meanwhile; try again"]),
    "no way back": ({"where": "GET /lfs", "status": 500}, ["as commit", "failed its check", "repeat the command"]),
    "altered": (
        {"where": "GET /lfs", "alter": lambda data: data[::-1]},
        ["failed its check", "differs from its sha256"],
    ),
    "tag": ({"where": "/tag/", "status": 500}, ["the upload stands as commit", "no tag 'v1'; repeat the command"]),
}


@pytest.mark.parametrize("case", FAULTS)
def test_a_fault_gives_one_line_and_a_repetition_succeeds(case, hub, folder):
    fault, words = FAULTS[case]
    hub.fail(**fault)
    line = refusal(folder, NAME, tag="v1")
    assert all(word in line for word in [NAME, *words]), line
    assert NAME not in hub.repos or not hub.repos[NAME].tags
    hub.faults.clear()
    publish(folder, NAME, tag="v1")
    repo = hub.repos[NAME]
    assert (
        len(repo.messages) == 2 and repo.tags == {"v1": repo.branches["main"]} and published(hub).keys() == set(FILES)
    )


def test_an_upload_never_overwrites_one_that_came_between(hub, made):
    publish(made[0], NAME)
    hub.fail("PUT", meanwhile=lambda: hub.put(NAME, {"README.md": b"theirs"}), times=1)
    assert "changed meanwhile; try again" in refusal(made[1], NAME)
    assert published(hub)["README.md"] == b"theirs"
    publish(made[1], NAME)
    assert published(hub)["README.md"] == (made[1] / "README.md").read_bytes()


def test_another_checkpoint_than_the_uploaded_one_is_no_success(hub, made, monkeypatch):
    monkeypatch.setattr(publishing, "download", lambda *given, **more: made[1])
    line = refusal(made[0], NAME, tag="v1")
    assert "differs from" in line and "failed its check and was not tagged" in line
    assert not hub.repos[NAME].tags


def test_passing_faults_end_in_success(hub, folder):
    for where in ("PUT", "/preupload/", "objects/batch", "GET /lfs"):
        hub.fail(where, 429, headers={"Retry-After": "0"}, times=2)
    publish(folder, NAME)
    assert published(hub).keys() == set(FILES)


def test_rights(hub, folder, monkeypatch):
    assert "refuses the token" in refusal(folder, NAME, token="hf_wrong")
    assert "lacks the permission" in refusal(folder, NAME, token=READER)
    monkeypatch.delenv("HF_TOKEN")
    hub.log.clear()
    assert "no token of the Hub found; log in with `hf auth login`" in refusal(folder, NAME) and hub.log == []
    publish(folder, NAME, token=WRITER)
    assert "lacks the permission" in refusal(folder, NAME, token=READER, tag="v1"), "of the repository that exists"


def spoil(folder: Path) -> None:
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    safetensors.torch.save_file(tensors | {"head.bias": tensors["head.bias"] + 1}, folder / "model.safetensors")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda folder: (folder / "README.md").unlink(), "has no README.md"),
        (lambda folder: (folder / "probe.safetensors").unlink(), "has no probe.safetensors"),
        (spoil, "model.safetensors|is off by"),
    ],
)
def test_a_checkpoint_is_checked_before_the_hub_is_asked(
    hub, folder, tmp_path, change: Callable[[Path], object], words: str
):
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    change(copy)
    assert any(word in refusal(copy, NAME) for word in words.split("|")) and hub.log == []


@pytest.mark.parametrize("format", [1, 2, 3])
def test_an_older_format_is_saved_again_before_it_is_published(hub, folder, format):
    path = folder / "config.json"
    config = json.loads(path.read_text())
    for name in ("license", "card", "figures", "dtype", "cost", "parameters", "datasets", "base", "files"):
        config.pop(name)
    config |= {"format": format} | ({"tokenizer": None} if format == 2 else {})
    path.write_text(json.dumps(config))
    line = refusal(folder, NAME, dry_run=True)
    assert str(folder) in line and "has an older format" in line and "zoo.save_model(zoo.load_model(FOLDER)" in line
    assert refusal(folder, NAME) == line and hub.log == []
    save_model(load_model(folder), folder)
    publish(folder, NAME)
    assert published(hub)["config.json"] == path.read_bytes()


def test_names_are_checked_before_the_hub_is_asked(hub, folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "'nothing' not found" in refusal("nothing", NAME)
    for name in ("name", "", None, 3, b"owner/name"):
        assert "must be OWNER/NAME" in refusal(folder, name)
    assert "Repo id" in refusal(folder, "owner/name@v1")
    for tag in ("", "a b", "../x", "-x"):
        assert "a tag must be letters" in refusal(folder, NAME, tag=tag)
    assert hub.log == []


def test_the_sha256_in_config_is_checked(hub, folder):
    config = json.loads((folder / "config.json").read_text())
    config["files"]["model.safetensors"]["sha256"] = "0" * 64
    (folder / "config.json").write_text(json.dumps(config))
    assert "is not the file that config.json describes: its sha256 differs" in refusal(folder, NAME)
    assert hub.log == []


def test_commands(hub, folder, capsys, monkeypatch):
    main(["publish", str(folder), NAME, "--tag", "v1", "--private"])
    assert capsys.readouterr().out == f"{hub.address}/{NAME}\n" and hub.repos[NAME].private
    assert os.access(SCRIPT, os.X_OK) and SCRIPT.read_text().startswith("#!/usr/bin/env python3\n")
    sys_argv, sys.argv = sys.argv, ["scripts/publish", str(folder), NAME, "--dry-run"]
    try:
        monkeypatch.syspath_prepend(str(SCRIPT.parent))
        runpy.run_path(str(SCRIPT), run_name="__main__")
    finally:
        sys.argv = sys_argv
    assert f"{NAME} would get 4 files" in capsys.readouterr().out
    with pytest.raises(SystemExit) as error:
        main(["publish", str(folder), "name"])
    assert error.value.code == "zoo: error: the name on the Hub must be OWNER/NAME, got 'name'"


@pytest.mark.slow
@pytest.mark.parametrize("where", ["PUT", "/commit/", "GET /lfs", "/tag/"])
def test_a_killed_upload_can_be_repeated(where, hub, folder, tmp_path):
    """Wherever it is killed, readers see a whole checkpoint or none."""
    fault = hub.fail(where, slow=3.0)
    command = [sys.executable, "-m", "zoo", "publish", str(folder), NAME, "--tag", "v1"]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen(command, env=environment(hub.address, tmp_path / "home", HF_TOKEN=WRITER), **pipes)
    hub.wait_for(where, 60.0)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=10)
    fault.times = 0
    assert published(hub).keys() in (set(), set(FILES))
    publish(folder, NAME, tag="v1")
    repo = hub.repos[NAME]
    assert repo.tags == {"v1": repo.branches["main"]} and published(hub).keys() == set(FILES)
    assert len(repo.messages) == 2 and load_checkpoint(f"{NAME}@v1", check=True)

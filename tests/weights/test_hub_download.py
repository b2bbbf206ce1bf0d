import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

import zoo
from helpers import randomise
from hub_server import READER, WRITER, Hub, environment
from zoo.__main__ import main
from zoo.inputs.images import ImagePreprocess
from zoo.models.vit import ViT
from zoo.weights import FILES, CheckpointError, load_checkpoint, save_model
from zoo.weights.hub import download, downloading
from zoo.weights.hub.errors import explain

NAME = "owner/vit.test"
SMALL = {"dim": 16, "depth": 1, "heads": 2, "image": 16, "patch": 8, "classes": 2}
MODEL = f"(GET|HEAD) /({NAME}/resolve/.*/model.safetensors|lfs/.*)"


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("made") / "vit.test"
    model = randomise(zoo.create_model("vit_micro", **SMALL))
    save_model(model, folder, preset="vit_micro", preprocess=ImagePreprocess(size=16), labels=["ant", "bee"])
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def hub(hub: Hub, files: dict[str, bytes]) -> Hub:
    hub.put(NAME, files, tag="v1.0")
    return hub


def refusal(*arguments: Any, **more: Any) -> str:
    with pytest.raises(CheckpointError) as error:
        download(*arguments, **more)
    assert "\n" not in str(error.value) and len(str(error.value)) < 500
    return str(error.value)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def blob(folder: Path, file: str = "model.safetensors") -> Path:
    return (folder / file).resolve()


def test_config_comes_first_and_the_rest_of_the_same_commit(hub, files):
    folder = download(NAME)
    assert folder.name == hub.repos[NAME].branches["main"]
    assert contents(folder).items() <= files.items() and {"config.json", "model.safetensors"} <= contents(folder).keys()
    asked = [line.split()[1] for line in hub.log]
    assert asked[:2] == [f"/{NAME}/resolve/main/config.json"] * 2, "HEAD and GET"
    assert all(f"/resolve/{folder.name}/" in path or path.startswith("/lfs/") for path in asked[2:])
    hub.log.clear()
    assert download(NAME) == folder and hub.log == [f"HEAD /{NAME}/resolve/main/config.json"]
    hub.log.clear()
    assert download(NAME, folder.name) == folder and hub.log == [], "a commit that the cache has needs no network"
    assert download(NAME, "v1.0") == folder
    assert load_checkpoint(f"{NAME}@v1.0", check=True).labels == ("ant", "bee")


def test_a_branch_that_moves_during_a_download_gives_the_older_checkpoint(hub, files):
    other = dict.fromkeys(FILES, b"other")
    hub.fail("HEAD .*(README|safetensors)", meanwhile=lambda: hub.put(NAME, other), times=1)
    folder = download(NAME)
    assert contents(folder).items() <= files.items()
    hub.put(NAME, files)
    assert download(NAME).name == hub.repos[NAME].branches["main"] != folder.name


@pytest.mark.parametrize("config", [b"{", b'{"architectures": ["ViTModel"]}', b'{"format": 99, "zoo": "9.9"}'])
def test_a_config_is_judged_before_any_weight_is_fetched(hub, config):
    hub.put(NAME, {"config.json": config})
    assert "config.json" in refusal(NAME) and not hub.seen("safetensors|lfs")


def test_only_files_of_a_checkpoint_that_config_names_are_fetched():
    stated = {name: {"size": 1, "sha256": ""} for name in ("model.safetensors", "../../../escape")}
    assert downloading._files({"files": stated}) == {"model.safetensors": stated["model.safetensors"]}
    assert [*downloading._files({})] == [name for name in FILES if name != "config.json"]


def stating(monkeypatch: pytest.MonkeyPatch, **stated: Any) -> None:
    files = {"model.safetensors": stated}
    monkeypatch.setattr(downloading, "read_config", lambda path: json.loads(path.read_bytes()) | {"files": files})


def test_size_and_sha256_in_config_are_checked(hub, files, monkeypatch):
    from hashlib import sha256

    model = files["model.safetensors"]
    right = sha256(model).hexdigest()
    stating(monkeypatch, size=len(model), sha256=right)
    assert {path.name for path in download(NAME).iterdir()} == {"config.json", "model.safetensors"}
    for size, digest in ((len(model) + 1, right), (len(model), "0" * 64)):
        stating(monkeypatch, size=size, sha256=digest)
        assert f"model.safetensors of {NAME} differs from its sha256" in refusal(NAME)


def test_a_branch_that_moves_between_two_requests_for_a_file(hub, files):
    """The client stores the new bytes under the hash of the old ones."""
    old, other = hub.repos[NAME].branches["main"], files["config.json"].replace(b'"ant"', b'"cow"')
    hub.fail("GET .*config.json", meanwhile=lambda: hub.put(NAME, {"config.json": other}), times=1)
    assert contents(download(NAME))["config.json"] == other
    assert contents(download(NAME, old))["config.json"] == files["config.json"]


FAULTS = {
    "invalid token": ({}, {"token": "hf_wrong"}, "refuses the token", "hf auth login"),
    "gated": ({"gated": True}, {}, "ask for it at http://127.0.0.1:", "hf auth login"),
    "gated for this user": ({"gated": True}, {"token": READER}, "access is restricted: ask for it at", f"/{NAME}"),
    "private": ({"private": True}, {}, "check the name", "hf auth login"),
    "private for this user": ({"private": True}, {"token": READER}, "check the name", "your token may not read it"),
    "revision": ({}, {"revision": "v1.1"}, "unknown revision 'v1.1'; did you mean v1.0?", "v1.0, main"),
    "403": ({"where": "config", "status": 403}, {}, "lacks the permission", "/settings/tokens"),
    "429": ({"where": "config", "status": 429, "headers": {"Retry-After": "7"}}, {}, "wait 7 seconds", "log in"),
    "429 of weights": ({"where": MODEL, "status": 429, "headers": {"Retry-After": "7"}}, {}, "wait 7 seconds", ""),
    "500": ({"where": "config", "status": 500}, {}, "status 500", "try again later"),
    "503 of weights": ({"where": MODEL, "status": 503}, {}, "status 503", "try again later"),
    "dropped": ({"where": "GET /lfs", "drop": 0}, {}, "no connection to http://127.0.0.1:", "try again"),
    "altered": ({"where": "GET /lfs", "alter": lambda data: data[::-1]}, {}, "differs from its sha256", ""),
    "altered config": (
        {"where": "GET .*config", "alter": lambda data: b" " + data[1:]},
        {},
        f"config.json of {NAME} differs",
        "",
    ),
}


@pytest.mark.parametrize("case", FAULTS)
def test_a_fault_gives_one_line_and_leaves_a_cache_that_works(case, hub, files, tmp_path):
    fault, given, *words = FAULTS[case]
    repo = hub.repos[NAME]
    if "where" in fault:
        hub.fail(**fault)
    else:
        vars(repo).update(fault)
    line = refusal(NAME, **given)
    assert all(word in line for word in [NAME, *words] if word not in ("", NAME)), line
    assert all(path.read_bytes() == files[path.name] for path in tmp_path.rglob("snapshots/*/*") if path.exists())
    hub.faults.clear()
    folder = download(NAME, token=WRITER)
    assert contents(folder).items() <= files.items() and load_checkpoint(folder, check=True)


def test_what_is_not_there(hub, files):
    assert "check the name" in refusal("owner/vit.tset")
    line = refusal("owner/vit.tset", token=READER)
    assert "no such repository" in line and "vit.tset" in line
    hub.put("owner/half", {name: files[name] for name in ("config.json", "README.md")})
    assert "it has no model.safetensors" in refusal("owner/half")
    hub.put("owner/other", {"README.md": b"# other"})
    assert "it has no config.json, so it is not a complete checkpoint" in refusal("owner/other")
    assert "a--b" in refusal("owner/a--b") and "owner/a--b" not in "".join(hub.log)


@pytest.mark.parametrize("status", [429, 500])
def test_passing_faults_end_in_success(hub, files, status):
    hub.fail("HEAD .*config", status, headers={"Retry-After": "0"}, times=3)
    hub.fail("HEAD .*safetensors", status, headers={"Retry-After": "0"}, times=2)
    assert contents(download(NAME)).items() <= files.items()


def test_a_dropped_connection_resumes(hub, files, monkeypatch):
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1000)
    hub.fail("GET /lfs", drop=3000, times=2)
    assert contents(download(NAME)).items() <= files.items()
    (model,) = {line.split()[1] for line in hub.seen("GET /lfs.*bytes=6000-")}
    assert [line.split()[2:] for line in hub.seen(f"GET {model}")] == [[], ["bytes=3000-"], ["bytes=6000-"]]


def test_no_network(hub, files, monkeypatch):
    folder = download(NAME)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", "http://127.0.0.1:9/{repo_id}/{revision}/{filename}")
    assert download(NAME) == folder, "the cache is used"
    assert "check the network and try again" in refusal(NAME, cache_dir=folder.parents[4] / "empty")


DAMAGES = {
    "truncated": lambda data: data[:-100],
    "altered": lambda data: data[:-1] + bytes([data[-1] ^ 1]),
    "empty": lambda data: b"",
    "longer": lambda data: data + b"\0",
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("file", ["model.safetensors", "config.json"])
def test_a_damaged_file_in_the_cache_is_fetched_again(hub, files, file, damage, monkeypatch):
    folder = download(NAME)
    blob(folder, file).write_bytes(DAMAGES[damage](files[file]))
    line = refusal(NAME, local_files_only=True)
    assert f"{file} is truncated or altered" in line and "allow them once" in line
    with monkeypatch.context() as patch:
        patch.setattr(constants, "HF_HUB_OFFLINE", True)
        assert "HF_HUB_OFFLINE=0" in refusal(NAME)
    hub.fail(f"HEAD .*{file}", 500, times=2)
    assert "status 500" in refusal(NAME, folder.name), "of a commit, only the damaged file is asked for"
    hub.faults.clear()
    assert download(NAME) == folder and contents(folder).items() <= files.items()


def test_offline(hub, files, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE=0" in refusal(NAME) and "local_files_only" in refusal(NAME, local_files_only=True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    folder = download(NAME, "v1.0")
    hub.log.clear()
    assert download(NAME, "v1.0", local_files_only=True) == folder
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert download(NAME, "v1.0") == folder and hub.log == []
    (folder / "model.safetensors").unlink()
    assert "it is not in the cache" in refusal(NAME, "v1.0")


def test_force_download(hub, files):
    folder = download(NAME)
    hub.log.clear()
    assert ViT.from_pretrained(NAME, revision="v1.0", force_download=True).labels == ("ant", "bee")
    assert len(hub.seen("GET /lfs")) == len(files) - 2 and len(hub.seen("GET .*config.json")) == 1
    hub.log.clear()
    ViT.from_pretrained(NAME)
    assert not hub.seen("GET /lfs") and contents(folder).items() <= files.items()
    for name in (NAME, f"hf:{NAME}", "timm:resnet18"):
        with pytest.raises(ValueError, match="force_download"):
            load_checkpoint(name, force_download=True, local_files_only=True)
    with pytest.raises(CheckpointError, match="force_download has no effect, so omit it"):
        load_checkpoint("timm:resnet18", force_download=True)


def test_nothing_is_written_to_a_cache_that_is_complete(hub, tmp_path):
    cache = tmp_path / "shared"
    folder = download(NAME, cache_dir=cache)
    places = [cache, *cache.rglob("*")]
    before = {place: place.lstat().st_mtime_ns for place in places}
    for place in places:
        if not place.is_symlink():
            place.chmod(0o555 if place.is_dir() else 0o444)
    assert download(NAME, cache_dir=cache) == download(NAME, cache_dir=cache, local_files_only=True) == folder
    assert {place: place.lstat().st_mtime_ns for place in [cache, *cache.rglob("*")]} == before
    for place in places:
        if not place.is_symlink():
            place.chmod(0o755)


def test_a_cache_that_cannot_be_written(hub, tmp_path):
    (tmp_path / "file").write_text("")
    line = refusal(NAME, cache_dir=tmp_path / "file" / "cache")
    assert "Not a directory" in line and "HF_HOME" in line
    full = explain(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), NAME)
    assert full == "No space left on device; choose another cache by cache_dir or HF_HOME"


SCRIPT = """
import sys
from zoo.weights.hub import download
print(download(sys.argv[1]))
"""


def start(hub: Hub, home: Path, **more: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", SCRIPT, NAME]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, env=environment(hub.address, home, **more), **pipes)


def test_a_killed_download_leaves_a_cache_that_works(hub, files, tmp_path):
    """The process has the environment of a user; the killed one had config.json and a part of the weights."""
    home = tmp_path / "home"
    fault = hub.fail("GET /lfs", slow=1.0)
    process = start(hub, home)
    hub.wait_for("GET /lfs")
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=10)
    assert [*(home / "hub").rglob("*.incomplete")] and not [*(home / "hub").rglob("model.safetensors")]
    assert "it is not in the cache" in refusal(NAME, local_files_only=True)
    fault.times = 0
    folder = download(NAME)
    assert contents(folder).items() <= files.items() and load_checkpoint(NAME, check=True)
    shutil.rmtree(home)


@pytest.mark.slow
def test_processes_in_parallel_get_whole_checkpoints(hub, files, tmp_path):
    hub.fail("GET /lfs", slow=0.05)
    processes = [start(hub, tmp_path / "home") for _ in range(3)]
    outputs = [process.communicate(timeout=100) for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0], outputs
    (folder,) = {Path(out.strip()) for out, _ in outputs}
    assert contents(folder).items() <= files.items() and load_checkpoint(folder, check=True)
    offline = start(hub, tmp_path / "home", HF_HUB_OFFLINE="1")
    out, error = offline.communicate(timeout=100)
    assert offline.returncode == 0 and Path(out.strip()) == folder, error


def test_a_model_made_from_one_on_the_hub_names_its_owner(hub, tmp_path):
    for name in (f"{NAME}@v1.0", f"hf:{NAME}"):
        model: Any = zoo.load_model(name)
        model.head.weight.data += 1
        assert load_checkpoint(save_model(model, tmp_path / "new")).config["base"]["address"] == name
    assert zoo.load_model(NAME, classes=5).about["base"]["address"] == NAME
    main(["convert", NAME, f"{tmp_path}/converted", "--norm=rmsnorm"])
    assert load_checkpoint(tmp_path / "converted").config["source"] == f"zoo convert {NAME} --norm rmsnorm"

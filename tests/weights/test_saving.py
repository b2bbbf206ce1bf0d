"""What is refused before it is saved, what is saved, and what a full disk or a kill leaves of it."""

import copy
import os
import pickle
import resource
import shutil
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import nn

import zoo
from checkpoint_cases import FIGURE, LABELS, PREPROCESS, build, contents, old, save
from zoo.aside import aside
from zoo.outputs.tokens import train_pieces
from zoo.weights import load_checkpoint, load_model, save_model


def test_refused_models(folder):
    """What cannot be saved is said before anything is written, and the old checkpoint stays."""
    before = contents(folder)

    def refused(message: str, model: Any = None, **more: Any) -> None:
        with pytest.raises(ValueError, match=message) as error:
            save(folder, model, **more)
        assert "\n" not in str(error.value)
        assert contents(folder) == before and os.listdir(folder.parent) == [folder.name]

    refused("4 names, but the model has 5 classes", labels=LABELS[:4])
    refused("labels must be a list of names, one for each class, got str", labels="abcde")
    refused("makes 3 channels, but the model takes 1", build(channels=1))
    refused("unknown preset 'vit_giant'", preset="vit_giant")
    refused("needs a model of the zoo, got a Linear", nn.Linear(3, 3))
    refused("needs a model of the zoo, got a Wrapped", type("Wrapped", (nn.Sequential,), {})(build()))
    refused("float64", build().double())
    model = build()
    model.head.weight.data[0, 0] = torch.inf
    refused("'head.weight' is NaN or infinite", model)
    model = build(norm="batchnorm")
    for name, buffer in model.named_buffers():
        if name.endswith("running_var"):
            buffer.fill_(1e6)  # which float16 does not have
    refused("running_var' is NaN or infinite", model.half())
    model = build()
    model.head = nn.Linear(32, 6)
    refused(r"does not describe it.*\[6\], expected \[5\].*previous one is untouched", model)
    model = build()
    model.norm.eps = 1.0
    refused("does not describe it.*is off by", model)
    model = build()
    model.blocks[0] = torch.compile(model.blocks[0], backend=never)
    refused("'blocks.0' is compiled on its own; put blocks.0._orig_mod in its place", model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantized = torch.ao.quantization.quantize_dynamic(build(), {nn.Linear})
    refused("is quantized, which checkpoints do not support; save the model before quantizing it", quantized)
    refused(r"unknown preset '\['a'\]", preset=["a"])
    refused("source must be a string, got int", source=1)
    refused("license must be a string, got int", license=1)
    refused("license must be a name such as apache-2.0, got 'a b'", license="a b")
    refused("datasets must be a list of names", datasets="insects")
    refused("base must have the fields address, commit, layout", base={"address": "x"})
    for changes, words in (
        ({"value": torch.nan}, "value must be a finite number, got nan"),
        ({"value": "0.5"}, "value must be a finite number"),
        ({"n": -1}, "n must be an integer >= 0, got -1"),
        ({"interval": [0.1]}, "interval must be two finite numbers or null"),
        ({"data": None}, "data must be a string, got NoneType"),
    ):
        refused(r"figures\[1\]: " + words, figures=[FIGURE, FIGURE | changes])
    refused(r"figures\[0\] must have the fields data, split, metric", figures=[{"accuracy": 0.5}])
    refused("figures must be a list, got dict", figures={"accuracy": 0.5})


def never(*given: Any) -> Any:
    pytest.fail("the model was compiled")


@pytest.mark.parametrize("way", ["wrapped", "in place"])
def test_a_compiled_model_is_saved_without_being_compiled(way, tmp_path):
    model = build()
    if way == "in place":
        model.compile(backend=never)
    compiled = torch.compile(model, backend=never) if way == "wrapped" else model
    loaded = load_model(save(tmp_path / "x", compiled), check=True)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in loaded.state_dict().items())
    assert way == "wrapped" or compiled._compiled_call_impl is not None


@pytest.mark.parametrize(
    "change", [lambda model: model, zoo.fuse, copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))]
)
def test_what_a_checkpoint_says_travels_with_its_model(change, tmp_path):
    said = {"license": "mit", "source": "a | b", "figures": [FIGURE | {"data": "a | b"}], "datasets": ["insects"]}
    said |= {"card": "Insects.\n\n## Data\n\n| n | mean |\n|---|---|\n| 3 | 0.5 |\n\nMore."}
    start = save(tmp_path / "start", build(), **said)
    again = load_checkpoint(save_model(change(load_model(start)), tmp_path / "again"), check=True)
    assert (again.labels, again.preprocess, again.config["preset"]) == (tuple(LABELS), PREPROCESS, "vit_micro")
    assert again.config["source"] == "a | b"
    cards = [(tmp_path / name / "README.md").read_text() for name in ("start", "again")]
    assert cards[0].replace("start", "again").replace("| fused | no |", "") == cards[1].replace(
        f"| fused | {'yes' if change is zoo.fuse else 'no'} |", ""
    )
    other = save_model(
        load_model(start), tmp_path / "other", labels=[*"abcde"], preprocess=replace(PREPROCESS, crop=0.5)
    )
    assert load_checkpoint(other).labels == tuple("abcde") and load_checkpoint(other).preprocess.crop == 0.5
    model: Any = load_model(start)
    model.labels = model.preprocess = None
    bare = load_checkpoint(save_model(model, tmp_path / "bare"), check=True)
    assert bare.labels is None and bare.preprocess is None


def test_a_card_that_someone_changed_is_read_as_far_as_possible(folder):
    old(folder, 2)
    for text in ("", "no title", "# only a title", "# x\n\n| a | b | c |\n| parameters |", "\0", "| fused | no |"):
        (folder / "README.md").write_text(text)
        about = load_model(folder).about
        assert (about["license"], about["figures"], about["source"]) == ("unknown", [], "")
    (folder / "README.md").write_bytes(b"\xff")
    assert load_model(folder).about["card"] == ""
    (folder / "README.md").unlink()
    assert load_model(folder).about["card"] == ""


def test_a_checkpoint_without_preprocess_or_labels_is_remarked(tmp_path):
    for missing, words in (
        ({"preprocess": None}, "without preprocess, so it takes no files, only prepared inputs; give it to save_model"),
        ({"labels": None}, "without labels, so its outputs have no names; give them to save_model"),
        ({"preprocess": None, "labels": None}, "without preprocess and labels, so it takes no files, .* and its outp"),
    ):
        with pytest.warns(UserWarning, match=f"^x was saved {words}") as seen:
            save(tmp_path / "x", build(), **missing)
        assert len(seen) == 1 and seen[0].filename == save.__code__.co_filename
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        save(tmp_path / "x", build())
        save(tmp_path / "y", build(classes=0), preprocess=None, labels=None)


def test_a_tokenizer_travels_with_its_model(tmp_path):
    small = {"dim": 16, "depth": 1, "heads": 2, "mels": 16, "vocabulary": 13}
    tokenizer = train_pieces(["the cat sat on the mat"] * 4, 12)
    start = save_model(zoo.create_model("conformer_ctc_s", **small), tmp_path / "start", labels=tokenizer)
    assert load_checkpoint(save_model(copy.deepcopy(load_model(start)), tmp_path / "again")).labels == tokenizer


def test_odd_texts_stay_whole(tmp_path):
    """Names of folders may hold anything: bytes that are no UTF-8, line breaks, a terminal's commands."""
    labels = ["a\udcff", "b\nc", "\x1b[31m", "|", "\u202e"]
    folder = tmp_path / "x\ny|\x1b"
    figures = [FIGURE | {"data": "a|b\ne", "command": "c`d\x1b"}]
    save(folder, build(), labels=labels, source="a\x1b\udcff\nb", figures=figures)
    assert load_checkpoint(folder, check=True).labels == tuple(labels)
    card = (folder / "README.md").read_text(encoding="utf-8")
    for part in (
        "| a\\|b e | val |",
        "Measured by `cd\\x1b`.",
        "# x\\ny|\\x1b\n",
        "Source: a\\x1b\\udcff b.",
    ):
        assert part in card
    assert "\x1b" not in card and "\nb" not in card.split("Source")[1].split("```")[0]


def test_only_checkpoints_are_replaced(folder, tmp_path):
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="holds notes.txt"):
        save(folder)
    assert (folder / "notes.txt").read_text() == "mine"
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "README.md").write_text("mine")
    with pytest.raises(ValueError, match="holds README.md"):
        save(tmp_path / "docs")
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match="is a file"):
        save(tmp_path / "file")
    with pytest.raises(OSError, match="cannot write the checkpoint .*file/below"):
        save(tmp_path / "file" / "below")
    assert (tmp_path / "file").read_text() == "mine"


def test_replaced(folder, tmp_path, monkeypatch):
    """Through a link, from within, with odd names, onto an empty or a broken folder."""
    (tmp_path / "link").symlink_to(folder)
    save(tmp_path / "link", build(classes=2), labels=["a", "b"])
    assert (tmp_path / "link").is_symlink() and load_checkpoint(folder, check=True).labels == ("a", "b")
    (folder / "model.safetensors").write_bytes(b"")
    save(folder)
    (tmp_path / "[a]*?").mkdir()
    monkeypatch.chdir(tmp_path)
    assert save(Path("[a]*?")) == tmp_path / "[a]*?"
    save(Path("[a]*?"))
    for name in ("link", folder, "[a]*?"):
        load_checkpoint(name, check=True)
    assert sorted(os.listdir(tmp_path)) == sorted(["link", "good", "[a]*?"])


class Killed(BaseException):
    pass


SITES: list[tuple[Any, str]] = [
    (Path, "mkdir"),
    (Path, "write_text"),
    (safetensors.torch, "save_file"),
    (shutil, "copymode"),
    (os, "fsync"),
    (os, "replace"),
]


def fail_from(
    monkeypatch: pytest.MonkeyPatch, sites: list[tuple[Any, str]], error: BaseException, calls: range
) -> list:
    """Makes those calls to the given functions fail whose number is in `calls`; returns the names called."""
    made: list[str] = []

    def failing(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*given: Any, **named: Any) -> Any:
            made.append(name)
            if len(made) - 1 in calls:
                raise error
            return real(*given, **named)

        return call

    for home, name in sites:
        monkeypatch.setattr(home, name, failing(name, getattr(home, name)))
    return made


def head_bias(folder: Path) -> list[float]:
    model: Any = load_checkpoint(folder, check=True).model
    return model.head.bias.tolist()


NO_SPACE = OSError(28, "No space left on device")


@pytest.mark.daily(3)
@pytest.mark.parametrize(
    ("error", "sites", "lasting"),
    [(NO_SPACE, SITES, False), (NO_SPACE, SITES, True), (SafetensorError("disk full"), SITES[2:3], False)],
)
def test_full_disk(error, sites, lasting, tmp_path, monkeypatch):
    """Whatever call fails, once or from then on: a line that says so, or a whole new checkpoint; never a broken one."""
    old, new, folder = build(dim=16, depth=1), build(dim=16, depth=1), tmp_path / "x"
    new.head.bias.data += 1.0
    reached, made, number = set(), [], 0
    for number in range(100):
        before = contents(save(folder, old))
        with monkeypatch.context() as patch:
            made = fail_from(patch, sites, error, range(number, 1000 if lasting else number + 1))
            try:
                save(folder, new)
            except OSError as raised:
                assert "\n" not in str(raised) and f"cannot write the checkpoint {folder}" in str(raised)
                assert "previous one is untouched" in str(raised)
                assert head_bias(folder) == old.head.bias.tolist()
                reached.add(made[number])
                if not lasting or made[number] != "replace":
                    assert contents(folder) == before and os.listdir(tmp_path) == ["x"]
                continue
        assert head_bias(folder) == new.head.bias.tolist()
        if len(made) <= number:
            break
    assert reached == {name for _, name in sites} and len(made) == number


def test_full_disk_at_the_first_save(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        fail_from(patch, SITES, NO_SPACE, range(4, 1000))
        with pytest.raises(OSError, match="No space left on device; nothing was left behind"):
            save(tmp_path / "x")
    assert os.listdir(tmp_path) == []


def test_file_size_limit(folder, tmp_path):
    """The system itself refuses to write on."""
    before = contents(folder)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with pytest.raises(OSError, match="File too large.*previous one is untouched"):
            save(folder)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert contents(folder) == before and os.listdir(tmp_path) == [folder.name]


@pytest.mark.daily(2)
def test_killed(tmp_path, monkeypatch):
    """Killed at any call, with nothing tidied up: a whole checkpoint loads, and the next save finds its way."""
    old, new, folder = build(dim=16, depth=1), build(dim=16, depth=1), tmp_path / "x"
    new.head.bias.data += 1.0
    seen, made, number = set(), [], 0
    for number in range(100):
        save(folder, old)
        with monkeypatch.context() as patch:
            made = fail_from(patch, [*SITES, (shutil, "rmtree")], Killed(), range(number, 1000))
            try:
                save(folder, new)
                break
            except Killed:
                pass
        bias = head_bias(folder)
        assert bias in (old.head.bias.tolist(), new.head.bias.tolist())
        seen.add((folder.is_dir(), bias == new.head.bias.tolist()))
        with monkeypatch.context() as patch:
            fail_from(patch, SITES[2:3], NO_SPACE, range(1))
            with pytest.raises(OSError, match="previous one is untouched"):
                save(folder, new)
        assert head_bias(folder) == bias
        save(folder, old)
        assert not list(tmp_path.glob(".*.previous"))
    assert len(made) == number > len(SITES)
    assert seen == {(True, False), (False, False), (True, True)}, "before, between and after the two renames"


def test_leftovers_are_removed_and_a_save_at_the_same_time_is_not(folder):
    shutil.copytree(folder, folder.parent / ".zoo-0000.new" / "files" / folder.name)
    with aside(folder.parent) as other:
        save(folder)
        assert sorted(os.listdir(folder.parent)) == [other.parent.name, "good"]
    assert os.listdir(folder.parent) == ["good"]

"""Every preset, with small sizes, adapted: no tensor is lost, grey is grey, sizes and known labels change no result.

Some of the presets, others each day, are in the quick tests.
"""

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor

import zoo
from helpers import randomise, relative
from shrinking import shrunk
from zoo.convert import from_timm
from zoo.inputs.images import ImagePreprocess
from zoo.models import PRESETS
from zoo.outputs.label_map import LabelMap
from zoo.outputs.tokens import Tokenizer, WordPieces, train_words
from zoo.weights import load_model, save_model

NAMES = ("ant", "bee", "cat")
OTHER = ("cat", "dog", "ant", "eel", "fox")  # two of them known, in other places, among another number
TASKS = {name: config.task for name, config in PRESETS.items()}


def cases(*tasks: str) -> list[str]:
    """The presets of these tasks."""
    chosen = [name for name in zoo.list_models() if TASKS[name] in tasks]
    assert chosen
    return chosen


def words(*names: str) -> WordPieces:
    """Pieces that are whole words, in this order behind the unknown one: the most frequent first."""
    return train_words([" ".join([name] * (len(names) - index)) for index, name in enumerate(names)])


def labels_of(name: str, names: tuple[str, ...]) -> Any:
    if TASKS[name] == "transcribe":
        return words(*names)
    return LabelMap(names, (*range(1, 1 + len(names)),)) if TASKS[name] == "detect" else names


def named(labels: Any) -> list[str]:
    if isinstance(labels, Tokenizer):
        return [*labels.pieces]  # pyright: ignore[reportAttributeAccessIssue]
    return [*getattr(labels, "names", labels)]


def kept(folder: Path, name: str, **more: Any) -> Path:
    """A checkpoint of a small preset with random weights and three names."""
    labels = labels_of(name, NAMES)
    if TASKS[name] == "transcribe":
        more |= {"vocabulary": labels.vocabulary}
    return save_model(shrunk(name, **more), folder / name, preset=name, labels=labels)


def relabelled(start: Path, name: str, names: tuple[str, ...], **more: Any) -> Any:
    labels = labels_of(name, names)
    return load_model(start, **{"tokenizer" if TASKS[name] == "transcribe" else "classes": labels}, **more)


def check_tensors(model: Any, source: Any) -> None:
    """Each tensor is finite, and that of the source or reported; what the source has more is reported, too."""
    state, old, report = model.state_dict(), source.state_dict(), model.loaded
    reported = [*report.taken, *report.resized, *report.new]
    assert sorted(reported) == sorted(state) and sorted(report.left_out) == sorted(old.keys() - state.keys())
    assert {name for name, _ in model.named_parameters()} <= state.keys()
    for key in report.taken:
        assert torch.equal(state[key], old[key]) and state[key].dtype == old[key].dtype, key
    assert not {*report.resized} - old.keys()
    buffers = dict(source.named_buffers())  # with those that no file holds
    for key, value in (*model.named_parameters(), *model.named_buffers()):
        assert not value.is_meta and bool(value.isfinite().all()), key
        if key in buffers and key not in state:
            assert torch.equal(value, buffers[key]), key


def images(model: Any, side: int = 0, channels: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    config, generator = model.config, torch.Generator().manual_seed(1)
    shape = (2, channels or config.channels, side or config.image, side or config.image)
    return torch.randn(shape, generator=generator, dtype=dtype)


@torch.no_grad()
def outputs(model: Any, x: Tensor, labels: Any = (0, 2)) -> dict[str, Tensor]:
    """What a model of images gives, by name."""
    if model.config.task == "generate":
        return {"output": model(x, torch.tensor([0.3, 0.8]).to(x), None if labels is None else torch.tensor(labels))}
    found = model(x)
    return found if isinstance(found, dict) else {"logits": found}


@pytest.mark.daily(20)
@pytest.mark.parametrize("name", cases("classify", "detect", "transcribe", "generate"))
def test_each_tensor_is_that_of_the_source_or_reported(name: str, tmp_path: Path):
    """With other names, and with another number of classes or pieces."""
    start = kept(tmp_path, name)
    source: Any = load_model(start)
    known = named(source.labels)
    model: Any = relabelled(start, name, OTHER)
    check_tensors(model, source)
    state, old, after = model.state_dict(), source.state_dict(), named(model.labels)
    assert model.loaded.resized and model.loaded.new == () and len(after) != len(known)
    pairs = [(known.index(each), index) for index, each in enumerate(after) if each in known]
    assert len(pairs) >= 2 and any(before != behind for before, behind in pairs)
    for key in model.loaded.resized:
        for before, behind in pairs:
            assert torch.equal(state[key][behind], old[key][before]), key
        assert torch.equal(state[key][len(after) :], old[key][len(known) :]), key
        assert len(state[key]) - len(after) == len(old[key]) - len(known)

    number = getattr(source.config, source.config.counted) + 4
    model = load_model(start, **{source.config.counted: number})
    check_tensors(model, source)
    assert model.loaded.new and not model.loaded.resized
    assert all(key.startswith(model.replaceable) for key in model.loaded.new)


@pytest.mark.daily(20)
@pytest.mark.parametrize("name", cases("classify", "detect", "generate"))
def test_channels_and_sizes_change_only_the_first_weight(name: str, tmp_path: Path):
    """Another size alone, then other channels, another size and other names together."""
    start = kept(tmp_path, name)
    source: Any = load_model(start)
    larger = {"image": source.config.image + 32}
    model: Any = load_model(start, **larger)
    check_tensors(model, source)
    assert model.loaded.taken == (*source.state_dict(),)
    channels = 3 if source.config.channels == 1 else 1
    if TASKS[name] == "generate":  # its output has the channels of its input
        with pytest.raises(ValueError, match=rf"do not fit channels={channels}: '\S*out.weight' differs"):
            load_model(start, channels=channels)
        return
    model = relabelled(start, name, OTHER, channels=channels, **larger)
    check_tensors(model, source)
    first = [key for key in model.loaded.resized if model.state_dict()[key].ndim == 4]
    assert len(first) == 1 and model.loaded.new == ()
    summed = source.state_dict()[first[0]].sum(1, keepdim=True)
    assert torch.allclose(model.state_dict()[first[0]], summed, rtol=1e-6, atol=1e-6)


@pytest.mark.daily(20)
@pytest.mark.parametrize("name", cases("classify", "detect"))
def test_one_channel_of_grey_gives_what_three_gave(name: str, tmp_path: Path):
    """In float64, which shows the map of the weights; float32 would show its rounding in the model, too."""
    start = kept(tmp_path, name)
    three, one = (load_model(start, dtype=torch.float64, **more) for more in ({}, {"channels": 1}))
    grey = images(three, channels=1, dtype=torch.float64)
    wanted = outputs(three, grey.expand(-1, 3, -1, -1))
    assert float(wanted["logits"].std()) > 1e-3, "the logits tell something"
    for key, found in outputs(one, grey).items():
        assert relative(found, wanted[key]) <= 1e-5, key


@pytest.mark.daily(20)
@pytest.mark.parametrize("name", cases("classify", "detect", "generate"))
def test_another_image_size_leaves_the_old_one_bit_for_bit(name: str, tmp_path: Path):
    start = kept(tmp_path, name)
    source: Any = load_model(start)
    model: Any = load_model(start, image=source.config.image + 32)
    old = images(source)
    wanted, found = outputs(source, old), outputs(model, old)
    assert all(torch.equal(found[key], each) for key, each in wanted.items())
    large = images(source, source.config.image + 32)
    wanted, found = outputs(source, large), outputs(model, large)
    assert all(bool(each.isfinite().all()) and torch.equal(found[key], each) for key, each in wanted.items())


# timm's models of the presets that it has, too, small sizes where timm takes them, and two sides of images. Its ViTs
# have a table of positions. Its DaViT attends to padding, so sides are multiples of its windows.
FLAT: dict[str, Any] = {"img_size": 48, "embed_dim": 32, "depth": 2, "num_heads": 2}
DAVIT: dict[str, Any] = {"embed_dims": (16, 32, 32, 64), "depths": (1, 1, 2, 1), "num_heads": (2, 2, 4, 4)}
THEIRS: dict[str, tuple[dict[str, Any], int, int]] = {
    **{f"vit_{size}_patch16_224": (FLAT, 48, 80) for size in ("tiny", "small", "base", "large")},
    **{f"deit_{size}_patch16_224": (FLAT, 48, 80) for size in ("tiny", "small", "base")},
    **{name: ({}, 48, 80) for name in ("poolformer_s12", "poolformer_s24", "convformer_s18", "caformer_s18")},
    "davit_tiny": (DAVIT, 224, 448),
}


@pytest.mark.daily(4)
@torch.no_grad()
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if sizes else [pytest.mark.slow]) for name, (sizes, *_) in THEIRS.items()]
)
def test_another_image_size_is_timms_resized_model(name: str, tmp_path: Path):
    torch.manual_seed(0)
    sizes, before, after = THEIRS[name]
    theirs = randomise(timm.create_model(name, **sizes, num_classes=5)).eval()
    ours = from_timm(theirs).eval()
    folder = save_model(ours, tmp_path / name, preprocess=ImagePreprocess(size=before), labels=[*"abcde"])
    model: Any = load_model(folder, image=after)
    assert model.preprocess.size == after and model.loaded.taken == (*model.state_dict(),)
    small, large = torch.randn(2, 3, before, before), torch.randn(2, 3, after, after)
    assert torch.equal(model(small), ours(small)) and relative(model(small), theirs(small)) <= 1e-4
    if "img_size" in sizes:
        larger: Any = sizes | {"img_size": after}
        resized = timm.create_model(name, **larger, num_classes=5)
        state = timm.models.vision_transformer.checkpoint_filter_fn(theirs.state_dict(), resized)  # pyright: ignore
        resized.load_state_dict(state)
        theirs = resized.eval()
    assert relative(model(large), theirs(large)) <= 1e-4


def scores(model: Any, x: Tensor) -> list[Tensor]:
    """Logits [..., labels and what is behind them] that do not depend on which classes there are."""
    if model.config.task == "transcribe":
        encoded, _ = model(x, torch.tensor([len(x[0]), 50]))
        if model.config.head == "ctc":
            return [encoded]
        return [model.head.joint(encoded, model.head.start(len(x))[0][:, None])]
    if hasattr(model, "rank"):  # which tokens become queries depends on the classes, their scores do not
        return [model.rank(*model.encode(x))[0]]
    return [outputs(model, x)["logits"]]


@pytest.mark.daily(20)
@torch.no_grad()
@pytest.mark.parametrize("name", cases("classify", "detect", "transcribe"))
def test_known_names_keep_their_logits_bit_for_bit(name: str, tmp_path: Path):
    """Among another number of classes, a matrix product may add in another order: in float64 rounded to float32, all
    bits are the same; in float32, all but the last ones."""
    start = kept(tmp_path, name)
    for dtype, exact in ((torch.float64, True), (torch.float32, False)):
        source: Any = load_model(start, dtype=dtype)
        model = relabelled(start, name, OTHER, dtype=dtype)
        speech = TASKS[name] == "transcribe"
        generator = torch.Generator().manual_seed(1)
        x = torch.randn(2, 70, 16, generator=generator, dtype=dtype) if speech else images(source, dtype=dtype)
        known, after = named(source.labels), named(model.labels)
        both = [each for each in after if each in known]
        for one, other in zip(scores(source, x), scores(model, x), strict=True):
            rest = range(len(known), one.shape[-1])  # blank, no object
            wanted = one[..., [*(known.index(each) for each in both), *rest]].float()
            found = other[..., [*map(after.index, both), *range(len(after), other.shape[-1])]].float()
            assert wanted.shape == found.shape and (not speech or len(rest) == 1)
            assert torch.equal(found, wanted) if exact else relative(found, wanted) < 1e-6


@pytest.mark.daily(20)
@pytest.mark.parametrize("name", cases("classify", "detect", "generate"))
def test_the_same_names_in_another_order_change_nothing_else(name: str, tmp_path: Path):
    """All outputs, those of queries and drawings included, in float32 bit for bit."""
    start = kept(tmp_path, name)
    order = (2, 0, 1)
    source, model = load_model(start), relabelled(start, name, tuple(NAMES[index] for index in order))
    x = images(source)
    for labels in ((0, 2), None):
        wanted = outputs(source, x, labels and [order[index] for index in labels])
        found = outputs(model, x, labels)
        if "logits" in wanted:
            rest = range(len(NAMES), wanted["logits"].shape[-1])
            wanted["logits"] = wanted["logits"][..., [*order, *rest]]
        assert all(torch.equal(found[key], each) for key, each in wanted.items())

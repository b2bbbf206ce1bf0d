"""Batches of speech: unreadable files, randomness, tokenizers, generated tones, and the data module itself."""

import inspect
import pickle
import random
from pathlib import Path
from typing import Any

import jsonargparse
import lightning
import numpy as np
import pytest
import soundfile
import torch
from torch import Tensor

from speech_sets import TRAIN, VAL, by_name, libri, texts, write_sets
from zoo.data import speech_sources as corpora
from zoo.data.augment import add_noise, change_speed
from zoo.data.speech import Batch, Clips, Speech, collate
from zoo.inputs.audio import RECIPES, read_audio
from zoo.outputs.tokens import train_characters, train_pieces


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return write_sets(tmp_path)


def states() -> list[str]:
    return [repr(random.getstate()), repr(np.random.get_state()), repr(torch.get_rng_state().tolist())]


# Unreadable files


def break_files(root: Path, names: tuple[str, ...]) -> None:
    for name in names:
        path = root / "train-clean-100/1/7" / f"{name}.flac"
        content = path.read_bytes()
        path.write_bytes({"1-7-0000": content[: len(content) // 2], "1-7-0001": b"", "1-7-0002": b"text"}[name])


@pytest.mark.parametrize("workers", [0, 1])
def test_unreadable_files_are_skipped_and_named(root: Path, workers: int):
    intact = by_name(libri(root).train_dataloader())
    names = ("1-7-0000", "1-7-0001", "1-7-0002")
    break_files(root, names)
    data = libri(root, workers=workers, shortest=0.4, val=["train-clean-100"])
    data.setup("fit")
    for loader, exact in ((data.train_dataloader(), True), (data.val_dataloader(), False)):
        batches = list(loader)
        found = by_name(batches)
        assert sorted(found) == sorted(intact.keys() - set(names))
        for name in found if exact else ():
            assert torch.equal(found[name][1], intact[name][1])
        skipped = sorted(line for batch in batches for line in batch.skipped)
        for line, name, reason in zip(skipped, names, ("lost sync", "is empty", "not recognised"), strict=True):
            assert line.startswith(f"{root}/train-clean-100/1/7/{name}.flac: ") and reason in line and "\n" not in line


def test_batch_of_unreadable_files_is_empty(root: Path):
    for path in (root / "dev-clean").rglob("*.flac"):
        path.write_bytes(b"")
    (batch,) = libri(root, mels=40).val_dataloader()
    assert batch.features.shape == (0, 0, 40) and batch.lengths.shape == (0,) and len(batch.skipped) == 2
    assert batch.lengths.dtype == torch.int64 and batch.texts == batch.names == ()


def test_other_errors_are_not_swallowed(root: Path, monkeypatch: pytest.MonkeyPatch):
    def fails(*arguments: Any) -> Tensor:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(corpora, "read_audio", fails)
    with pytest.raises(RuntimeError, match="out of memory"):
        next(iter(libri(root).train_dataloader()))


# Randomness


def test_speed_noise_and_dither_are_functions_of_seed_epoch_and_index():
    def epoch(number: int, seed: int = 0, workers: int = 0) -> dict[str, tuple[str, Tensor]]:
        torch.manual_seed(number + 17 * workers)
        data = Speech(seed=seed, workers=workers, speeds=[0.9, 1.0, 1.1], noise=(10.0, 40.0), limit=40, shortest=0.5)
        loader = data.train_dataloader()
        batches: Any = loader.batch_sampler
        batches.sampler.set_epoch(number)
        return by_name(loader)

    def same(first: dict[str, tuple[str, Tensor]], second: dict[str, tuple[str, Tensor]]) -> int:
        assert first.keys() == second.keys()
        return sum(torch.equal(first[name][1], second[name][1]) for name in first)

    first = epoch(0)
    assert same(first, epoch(0, workers=2)) == len(first)
    assert same(first, epoch(1)) == 0 and same(first, epoch(0, seed=1)) == 0
    lengths = {name: len(features) for name, (_, features) in first.items()}
    later = {name: len(features) for name, (_, features) in epoch(1).items()}
    assert 0.3 < np.mean([lengths[name] != later[name] for name in lengths]) < 0.95


def test_silent_and_clipped_utterances_are_named(tmp_path: Path):
    folder = tmp_path / "train/1/2"
    folder.mkdir(parents=True)
    sounds = {0: 0.5, 1: 0.0, 2: 5.0, 3: 0.0}
    for index, loudness in sounds.items():
        wave = loudness * np.sin(np.arange(8000) / 10)
        soundfile.write(folder / f"1-2-000{index}.flac", wave.clip(-1, 1), 16000)
    (folder / "1-2.trans.txt").write_text("1-2-0000 A\n1-2-0001 A\n1-2-0002 A\n1-2-0003 \n")
    data = Speech("librispeech", str(tmp_path), "train", "train", tokenizer="characters", speeds=[0.9])
    with pytest.warns(UserWarning, match="1 utterances with an empty transcript"):
        (batch,) = data.train_dataloader()
    assert batch.silent == ("1-2-0001",) and batch.clipped == ("1-2-0002",) and len(batch.names) == 3
    (batch,) = data.val_dataloader()
    assert batch.silent == ("1-2-0001",) and batch.clipped == ("1-2-0002",) and len(batch.names) == 4


def test_speed_is_that_of_the_waveform(root: Path):
    data = libri(root, speeds=[1.1], dither=0.0)
    waveform = read_audio(root / "train-clean-100/1/7/1-7-0003.flac")
    torch.testing.assert_close(
        by_name(data.train_dataloader())["1-7-0003"][1], RECIPES["nemo"](change_speed(waveform, 1.1))
    )
    slow = libri(root, speeds=[0.5, 1.0], seconds=3.0)
    for batch in slow.train_dataloader():
        assert batch.features.shape[0] * batch.features.shape[1] * 0.01 <= 3.0 or len(batch.lengths) == 1


def test_joined_utterances(root: Path, monkeypatch: pytest.MonkeyPatch):
    """The first is that of the index, others and silences follow; texts too, and the limit of a batch holds."""
    data = libri(root, joined=3, dither=0.0, seconds=14.0)
    alone = {
        name: text
        for batch in libri(root).train_dataloader()
        for name, text in zip(batch.names, batch.texts, strict=True)
    }
    seen, numbers = [], set[int]()
    for batch in data.train_dataloader():
        assert batch.features.shape[0] * batch.features.shape[1] * 0.01 <= 14.0 + 0.02 * len(batch.lengths)
        for name, text in zip(batch.names, batch.texts, strict=True):
            assert text.startswith(alone[name])
            rest, number = text.removeprefix(alone[name]).strip(), 1
            while rest:
                first = next(each for each in sorted(alone.values(), key=len, reverse=True) if rest.startswith(each))
                rest, number = rest.removeprefix(first).strip(), number + 1
            numbers.add(number)
            seen.append((name, text))
    assert numbers == {1, 2, 3} and {name for name, _ in seen} == {*alone}
    again = [
        (n, t)
        for batch in libri(root, joined=3, dither=0.0, seconds=14.0).train_dataloader()
        for n, t in zip(batch.names, batch.texts, strict=True)
    ]
    assert again == seen

    clips = Clips(data.training, data.preprocess, 0, joined=3)
    waveform = torch.ones(1600)
    monkeypatch.setattr(type(data.training), "waveform", lambda self, index, rate: waveform)
    torch.manual_seed(0)
    longest = max((clips.continued(waveform, "A")[0] for _ in range(20)), key=len)
    assert 2 * 1600 < len(longest) <= 3 * 1600 + 2 * 8000 and float(longest.sum()) == 3 * 1600


def test_noise_is_within_its_bounds(root: Path, monkeypatch: pytest.MonkeyPatch):
    ratios: list[float] = []

    def noted(waveform: Tensor, ratio: float, rate: int) -> Tensor:
        assert rate == 16000
        ratios.append(ratio)
        return add_noise(waveform, ratio, rate)

    monkeypatch.setattr("zoo.data.speech.add_noise", noted)
    waveform = read_audio(root / "train-clean-100/1/7/1-7-0003.flac")
    expected = RECIPES["nemo"](waveform)
    quiet = by_name(libri(root, noise=None, dither=0.0).train_dataloader())["1-7-0003"][1]
    assert torch.equal(quiet, expected) and not ratios
    noisy = by_name(libri(root, noise=(10.0, 20.0), dither=0.0).train_dataloader())["1-7-0003"][1]
    assert (noisy - expected).abs().mean() > 0.1
    assert len(set(ratios)) == len(TRAIN) and 10 <= min(ratios) < max(ratios) <= 20


def test_validation_has_none(root: Path):
    data = libri(root, speeds=[0.9], noise=[0.0, 10.0], dither=0.1, val=["train-clean-100"])
    waveform = read_audio(root / "train-clean-100/2/7/2-7-0000.wav")
    expected = RECIPES["nemo"](waveform)
    torch.testing.assert_close(by_name(data.val_dataloader())["2-7-0000"][1], expected)
    trained = by_name(libri(root, dither=0.1).train_dataloader())["2-7-0000"][1]
    assert (trained - expected).abs().mean() > 0.1


@pytest.mark.parametrize("workers", [0, 1])
def test_main_generators_are_left_alone(workers: int):
    data = Speech(workers=workers, limit=8)
    before = states()
    next(iter(data.train_dataloader()))
    next(iter(data.val_dataloader()))
    assert states() == before


@pytest.mark.filterwarnings("ignore")  # Lightning's own
def test_lightning_sets_the_epoch():
    class Recorder(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(()))
            self.seen: dict[int, list[tuple[str, ...]]] = {0: [], 1: []}
            self.validated = 0

        def training_step(self, batch: Batch) -> Tensor:
            assert isinstance(batch, Batch)
            self.seen[self.current_epoch].append(batch.names)
            return self.weight * 0

        def validation_step(self, batch: Batch) -> None:
            self.validated += len(batch.texts)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    data = Speech(limit=60, seconds=20)
    module = Recorder()
    lightning.Trainer(
        max_epochs=2,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
    ).fit(module, datamodule=data)
    for epoch in (0, 1):
        loader = data.train_dataloader()
        batches: Any = loader.batch_sampler
        batches.sampler.set_epoch(epoch)
        assert module.seen[epoch] == [batch.names for batch in loader]
    assert module.seen[0] != module.seen[1] and module.validated == 2 * 60


# Tokenizers


def test_tokenizers(root: Path):
    data = libri(root)
    assert data.tokenizer == train_characters(TRAIN)
    data = libri(root, tokenizer="pieces", pieces=28)
    assert data.tokenizer == train_pieces(TRAIN, 28)
    (root / "t.model").write_bytes(train_pieces(VAL, 10).model)
    data = libri(root, train=None, tokenizer=str(root / "t.model"))
    assert data.tokenizer == train_pieces(VAL, 10)
    with pytest.raises(ValueError, match="at most .* can be made"):
        _ = libri(root, tokenizer="pieces", pieces=1000).tokenizer
    with pytest.raises(ValueError, match="data.train is not given"):
        _ = libri(root, train=None).tokenizer
    assert len(Speech(tokenizer="characters").tokenizer.pieces) == 9 and len(Speech().tokenizer.pieces) == 128


def test_validation_needs_no_training_texts(root: Path):
    data = libri(root, train=None)
    data.setup("validate")
    assert len(by_name(data.val_dataloader())) == 2


# Synthetic


def test_synthetic_is_fixed_and_learnable():
    """The letter whose band is loudest, frame by frame and collapsed as in CTC, spells the text."""
    data = Speech(recipe="streaming")
    source = data.source("val")
    assert len(source) == 64 and len(data.source("train")) == 512
    assert set("".join(texts(source))) == set("ABCDEFGH ") and len(set(texts(source))) > 50
    right = 0
    for index in range(20):
        waveform = source.waveform(index, 16000)
        assert torch.equal(waveform, Speech().source("val").waveform(index, 16000))
        assert len(waveform) == pytest.approx(16000 * source.durations[index], abs=1)
        power = torch.stft(waveform, 512, 160, window=torch.hann_window(512), return_complex=True).abs() ** 2
        bins = [round(300 * 1.4**letter / 16000 * 512) for letter in range(8)]
        bands = torch.stack([power[place - 1 : place + 2].sum(0) for place in bins])
        heard = torch.where(bands.amax(0) > 40, bands.argmax(0), -1).tolist()
        spelt = "".join(
            "ABCDEFGH"[now] for before, now in zip([-1, *heard], heard, strict=False) if now not in (-1, before)
        )
        right += spelt == source.text(index).replace(" ", "")
    assert right >= 19
    assert not set(texts(data.source("train"))[:40]) <= set(texts(source))
    test = data.source("test")
    assert texts(test) != texts(source) and not torch.equal(test.waveform(0, 16000), source.waveform(0, 16000))


def test_synthetic_at_another_rate():
    """Each letter has its own pitch, in the middle of which nothing is louder."""
    source: Any = Speech().source("val")
    for index in range(5):
        waveform, end = source.waveform(index, 8000), 0.0
        assert len(waveform) == pytest.approx(8000 * source.durations[index], abs=1)
        for mark, seconds in source._script(index):
            middle, end = round(8000 * (end + seconds / 2)), end + seconds
            if mark in "ABCDEFGH":
                power = torch.fft.rfft(torch.hann_window(512) * waveform[middle - 256 : middle + 256]).abs()
                assert abs(power.argmax() * 8000 / 512 - 300 * 1.4 ** "ABCDEFGH".index(mark)) < 8000 / 512


# The module itself


def test_what_workers_get_pickles(root: Path):
    for data in (libri(root), Speech(limit=5)):
        loader = data.train_dataloader()
        again, gather = pickle.loads(pickle.dumps((loader.dataset, loader.collate_fn)))
        batch = gather([again[1, 2]])
        expected = loader.dataset[1, 2]
        assert torch.equal(batch.features[0], expected.features) and batch.texts == (expected.text,)


def test_collate_keeps_order(root: Path):
    clips = Clips(libri(root).source("train"), RECIPES["nemo"])
    batch = collate([clips[0, index] for index in (3, 0, 2)], 80)
    assert batch.lengths.tolist() == [80, 50, 70] and batch.texts == (TRAIN[3], TRAIN[0], TRAIN[2])


def test_recipes_and_mels():
    data = Speech(recipe="squeezeformer", mels=64, limit=4)
    assert data.preprocess.mels == 64 and data.preprocess.log == "db"
    assert next(iter(data.val_dataloader())).features.shape[2] == 64


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dataset": "voice"}, "unknown dataset 'voice'; allowed: librispeech, manifest, shards, synthetic"),
        ({"root": "x"}, "'synthetic' takes none of root, train"),
        ({"train": ["x"]}, "'synthetic' takes none of root, train"),
        ({"dataset": "librispeech"}, "'librispeech' needs root, a folder"),
        ({"recipe": "kaldi"}, "unknown recipe 'kaldi'; allowed: nemo, squeezeformer, streaming"),
        ({"mels": 0}, "mels must be an integer from 1 to 1024"),
        (
            {"tokenizer": "letters"},
            "tokenizer must be pieces, words, characters or the path of a .model file, got 'letters'",
        ),
        ({"seconds": 0.0}, "seconds must be > 0"),
        ({"padding": 1.0}, "padding must be >= 0 and < 1"),
        ({"batch": 0}, "batch must be >= 1"),
        ({"pieces": 1}, "pieces must be >= 2, got 1"),
        ({"workers": -1}, "workers must be >= 0, got -1"),
        ({"limit": 0}, "limit must be >= 1, got 0"),
        ({"shortest": 20.0}, "shortest must be >= 0 and < longest, got 20.0 and 20.0"),
        ({"speeds": []}, "speeds must hold at least one factor"),
        ({"speeds": [3.0]}, "a speed must be from 0.5 to 2 in steps of 0.01, got 3.0"),
        ({"noise": [10.0]}, "noise must be the lowest and the highest ratio in dB"),
        ({"noise": [30.0, 10.0]}, "noise must be the lowest and the highest ratio in dB"),
        ({"noise": [float("nan"), 10.0]}, "noise must be the lowest and the highest ratio in dB"),
        ({"dither": 1.0}, "dither must be >= 0 and < 1"),
    ],
    ids=str,
)
def test_wrong_values(options: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message) as error:
        Speech(**options)
    assert "\n" not in str(error.value)


def test_every_argument_is_described():
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(Speech, "data")
    shown = parser.format_help()
    for name in inspect.signature(Speech).parameters:
        assert f"--data.{name}" in shown
        (action,) = [action for action in parser._actions if action.dest == f"data.{name}"]
        assert action.help and len(action.help) >= 10, name
    given = parser.parse_args(
        ["--data.speeds=[0.9,1.0]", "--data.longest=null", "--data.noise=[10,40]", "--data.train=[a,b]"]
    )
    assert (
        given.data.speeds == [0.9, 1.0]
        and given.data.longest is None
        and given.data.noise == (10.0, 40.0)
        and given.data.train == ["a", "b"]
    )


def test_seed_is_that_of_seed_everything(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PL_GLOBAL_SEED", "11")
    assert Speech().seed == 11 and Speech(seed=3).seed == 3

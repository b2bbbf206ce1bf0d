"""Transcribed speech for training, validation and test: LibriSpeech's folders, manifests, generated tones."""

import functools
import os
import random
import zlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Literal, NamedTuple, Self

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from zoo.data.augment import add_noise, change_speed, check_speed
from zoo.data.buckets import DurationBatches, check_limits
from zoo.data.feature_cache import FeatureCache
from zoo.data.loading import DataModule, check_numbers, make_loader
from zoo.data.sampling import global_seed, seeded
from zoo.data.shards import is_packed
from zoo.data.speech_sources import CORPORA, Corpus
from zoo.inputs import Preprocess
from zoo.inputs.audio import RECIPES, AudioPreprocess, UnreadableAudio, pad_features
from zoo.outputs.tokens import Tokenizer, read_tokenizer, train_characters, train_pieces, train_words
from zoo.text import reason

TOKENIZERS: dict[str, Callable[[list[str], int], Tokenizer]] = {
    "pieces": train_pieces,
    "words": lambda texts, _: train_words(texts),
    "characters": lambda texts, _: train_characters(texts),
}
GAP = 0.5  # longest silence between utterances that are joined, in seconds
CLIPPED = 0.001  # an utterance with a larger share of samples at full scale counts as clipped


class Batch(NamedTuple):
    """Utterances of one step.

    `features` is float32 [B, T, mels], zero beyond each of `lengths`, int64 [B]; `texts` and `names` have B entries.
    `skipped` holds a line for each file that could not be read, with the reason; those utterances are
    missing from the others, and if every file of a batch is unreadable, B is 0. `silent` and `clipped` name those
    that can be read but are all zero although they have a transcript, or are clipped at full scale.
    """

    features: Tensor
    lengths: Tensor
    texts: tuple[str, ...]
    names: tuple[str, ...]
    skipped: tuple[str, ...]
    silent: tuple[str, ...] = ()
    clipped: tuple[str, ...] = ()


class Clip(NamedTuple):
    """One utterance: features [T, mels], or None and the reason `fault` if the file is unreadable; `silent` and
    `clipped` as in `Batch`."""

    features: Tensor | None
    text: str
    name: str
    fault: str = ""
    silent: bool = False
    clipped: bool = False


class Clips(Dataset[Clip]):
    """A corpus's utterances as features; a key is (epoch, index).

    With a seed, the utterances that follow in the same waveform (fewer than `joined`), speed, noise and dither are
    random, as a function of seed, epoch and index alone; without, they are off. With a cache,
    an utterance has the same dither in all epochs.
    """

    def __init__(
        self,
        corpus: Corpus,
        preprocess: AudioPreprocess,
        seed: int | None = None,
        speeds: tuple[float, ...] = (1.0,),
        noise: tuple[float, float] | None = None,
        dither: float = 0.0,
        joined: int = 1,
        cache: str | None = None,
    ):
        self.corpus, self.preprocess, self.seed = corpus, preprocess, seed
        dithered = () if seed is None or not dither else (seed, dither)
        self.cache = None if cache is None else FeatureCache(cache, preprocess, dithered)
        self.speeds, self.noise, self.dither, self.joined = speeds, noise, dither, joined

    def __len__(self) -> int:
        return len(self.corpus)

    def __getitem__(self, key: tuple[int, int]) -> Clip:
        epoch, index = key
        clip = self.decoded(index, epoch, index) if self.cache is None else self.cached(index, self.cache)
        return clip._replace(silent=clip.silent and bool(clip.text))

    def cached(self, index: int, cache: FeatureCache) -> Clip:
        """An utterance from the cache, or from its audio and then in the cache."""
        text, name = self.corpus.text(index), self.corpus.name(index)
        try:
            identity = self.corpus.identity(index)
        except UnreadableAudio as error:
            return Clip(None, text, name, str(error))
        if found := cache.read(identity):
            features, silent, clipped = found
            return Clip(features, text, name, silent=silent, clipped=clipped)
        made = self.decoded(index, zlib.crc32(identity.encode()))
        if made.features is not None:
            cache.write(identity, made.features, made.silent, made.clipped)
        return made

    def decoded(self, index: int, *numbers: int) -> Clip:
        """An utterance from its audio; the seed and `numbers` give its randomness."""
        text, name = self.corpus.text(index), self.corpus.name(index)
        try:
            waveform = self.corpus.waveform(index, self.preprocess.rate)
        except UnreadableAudio as error:
            return Clip(None, text, name, str(error))
        loudness = waveform.abs()
        silent = not bool(loudness.any())
        clipped = float((loudness >= 0.999).float().mean()) > CLIPPED
        if self.seed is None:
            return Clip(self.preprocess(waveform), text, name, silent=silent, clipped=clipped)
        with seeded(self.seed, *numbers):
            if self.joined > 1:
                waveform, text = self.continued(waveform, text)
            waveform = change_speed(waveform, self.speeds[int(torch.randint(len(self.speeds), ()))])
            if self.noise:
                waveform = add_noise(waveform, random.uniform(*self.noise), self.preprocess.rate)
            features = self.preprocess(waveform, dither=self.dither)
            return Clip(features, text, name, silent=silent, clipped=clipped)

    def continued(self, waveform: Tensor, text: str) -> tuple[Tensor, str]:
        """The utterance with up to joined - 1 others after it, each after a silence of up to GAP seconds."""
        rate = self.preprocess.rate
        for other in torch.randint(len(self.corpus), (int(torch.randint(self.joined, ())),)).tolist():
            silence = torch.zeros(int(GAP * rate * float(torch.rand(()))))
            try:
                waveform = torch.cat([waveform, silence, self.corpus.waveform(other, rate)])
            except UnreadableAudio:  # its own turn in the epoch reports it
                continue
            text = f"{text} {self.corpus.text(other)}"
        return waveform, text


def collate(clips: list[Clip], mels: int) -> Batch:
    """Pads and stacks what `Clips` returned; `mels` is for a batch without any."""
    read = [(clip.features, clip.text, clip.name) for clip in clips if clip.features is not None]
    skipped = tuple(clip.fault for clip in clips if clip.features is None)
    if not read:
        return Batch(torch.zeros(0, 0, mels), torch.zeros(0, dtype=torch.int64), (), (), skipped)
    features, texts, names = zip(*read, strict=True)
    silent, clipped = (tuple(clip.name for clip in clips if getattr(clip, kind)) for kind in ("silent", "clipped"))
    return Batch(*pad_features(features), texts, names, skipped, silent, clipped)


class Speech(DataModule):
    """Transcribed utterances in batches of type `Batch`, of similar duration each.

    Files that cannot be read are omitted from their batch and listed in it. The Trainer must run with
    `use_distributed_sampler=False`: the samplers split the set over ranks by themselves.

    Args:
        dataset: `librispeech` (folders as released: `root/SPLIT/speaker/chapter/speaker-chapter-utterance.flac` beside
            `speaker-chapter.trans.txt`, or the same below `root/LibriSpeech`), `manifest` (NeMo's files with one JSON
            object per line: audio_filepath, absolute or relative to the manifest, text, and optionally duration; with
            offset beside duration, in seconds, only that part of the file is read), `shards` (either of them, packed by
            `zoo shard`), or `synthetic` (generated tones, one for each of eight letters).
        root: folder of librispeech; for manifests, the folder that their names are relative to; the folder of shards or
            their address: http, https, or `pipe:` and a command that ends in a folder.
        train: folders, such as train-clean-100, or manifests to train on, one or a list of them, named alike in shards;
            a tokenizer is trained on their texts.
        val: folders, such as dev-clean, or manifests for validation.
        test: folders or manifests for testing.
        recipe: how features are made: nemo, squeezeformer or streaming; null for that of the checkpoint, or nemo.
        mels: mel bands; null for those of the checkpoint, or 80.
        tokenizer: `pieces`, `words` or `characters`, trained on the training texts, or the path of a sentencepiece
            .model file.
        pieces: number of word pieces to train.
        seconds: most seconds of audio in a batch, padding included, per device; a longer utterance has its own batch.
        padding: largest share of a batch that is padding, before the speed is changed.
        batch: most utterances in a batch, per device; null for no limit.
        shortest: shorter utterances, in seconds, are omitted from training.
        longest: longer utterances, in seconds, are omitted from training; null for no limit.
        speeds: factors from which that of a training utterance is drawn, between 0.5 and 2 in steps of 0.01.
        noise: lowest and highest ratio of signal to noise, in dB, between which that of a training utterance is drawn;
            null for no noise.
        dither: standard deviation of white noise on training waveforms, full scale being 1.
        joined: most utterances in one training waveform, the others drawn at random, with silences of up to 0.5 s
            between them; their number is random, too. For recordings of single words. Batches are planned for the
            longest waveform that this can give.
        workers: processes that read files; 0 reads in the main process; null for one per core if audio is in files.
        limit: most utterances of each split, taken at even distances; null for all.
        seed: seed of order, speed, noise and dither, together with epoch and index; null for that of
            seed_everything.
        cache: folder in which features are kept, so that later epochs and runs do not decode and transform audio again;
            about 32 KB for a second. Not with joined, speeds and noise, which change the waveform; the dither is drawn
            once. Null for none.
        changed: `ok` to resume a run on other data than it was started on; `refuse` otherwise.

    Attributes:
        preprocess: from a waveform to features.

    Raises:
        ValueError: an unknown name, or a value out of range.
    """

    preprocess: AudioPreprocess

    def __init__(
        self,
        dataset: str = "synthetic",
        root: str | None = None,
        train: list[str] | str | None = None,
        val: list[str] | str | None = None,
        test: list[str] | str | None = None,
        recipe: str | None = None,
        mels: int | None = None,
        tokenizer: str = "pieces",
        pieces: int = 128,
        seconds: float = 120.0,
        padding: float = 0.2,
        batch: int | None = None,
        shortest: float = 0.1,
        longest: float | None = 20.0,
        speeds: list[float] = [1.0],  # noqa: B006 (it is never changed, and --help shows it)
        noise: tuple[float, float] | None = None,
        dither: float = 1e-5,
        joined: int = 1,
        workers: int | None = None,
        limit: int | None = None,
        seed: int | None = None,
        cache: str | None = None,
        changed: Literal["refuse", "ok"] = "refuse",
    ):
        super().__init__(changed)
        if dataset not in CORPORA:
            raise ValueError(f"unknown dataset {dataset!r}; allowed: {', '.join(CORPORA)}")
        if dataset == "synthetic" and (root or train or val or test):
            raise ValueError("dataset 'synthetic' takes none of root, train, val and test")
        if dataset in ("librispeech", "shards") and root is None:
            raise ValueError(f"dataset {dataset!r} needs root, a folder")
        if recipe is not None and recipe not in RECIPES:
            raise ValueError(f"unknown recipe {recipe!r}; allowed: {', '.join(RECIPES)}")
        if tokenizer not in TOKENIZERS and not tokenizer.endswith(".model"):
            raise ValueError(
                f"tokenizer must be {', '.join(TOKENIZERS)} or the path of a .model file, got {tokenizer!r}"
            )
        check_limits(seconds, padding, batch)
        check_numbers({"pieces": (pieces, 2), "joined": (joined, 1), "workers": (workers, 0), "limit": (limit, 1)})
        if not 0 <= shortest < (float("inf") if longest is None else longest):
            raise ValueError(f"shortest must be >= 0 and < longest, got {shortest} and {longest}")
        if not speeds:
            raise ValueError("speeds must hold at least one factor; [1.0] changes nothing")
        for factor in speeds:
            check_speed(factor)
        if noise is not None and not (len(noise) == 2 and -100 <= noise[0] <= noise[1] <= 100):
            raise ValueError(
                f"noise must be the lowest and the highest ratio in dB, from -100 to 100, got {list(noise)}"
            )
        if not 0 <= dither < 1:
            raise ValueError(f"dither must be >= 0 and < 1, got {dither}")
        if cache is not None and (joined > 1 or noise is not None or any(factor != 1 for factor in speeds)):
            raise ValueError("cache needs joined 1, speeds [1.0] and noise null, which change waveforms in each epoch")
        self.cache = cache
        self.recipe, self.given = recipe, {} if mels is None else {"mels": mels}
        self.preprocess = self.prepared(None)
        self.dataset, self.root, self.batch = dataset, root, batch
        self.workers = workers
        given = {"train": train, "val": val, "test": test}
        self.splits = {split: [names] if isinstance(names, str) else names for split, names in given.items()}
        self.wanted_tokenizer, self.pieces = tokenizer, pieces
        self.seconds, self.padding, self.shortest, self.longest = seconds, padding, shortest, longest
        self.speeds, self.noise, self.dither, self.limit = tuple(speeds), noise, dither, limit
        self.joined = joined
        self.seed = global_seed() if seed is None else seed

    def prepared(self, base: Preprocess | None) -> AudioPreprocess:
        """The preprocessing `base`, or that of the recipe where one was given, with as many bands as were given."""
        if base is None or self.recipe is not None:
            base = RECIPES[self.recipe or "nemo"]
        assert isinstance(base, AudioPreprocess)
        return replace(base, **self.given)

    @classmethod
    def measuring(
        cls,
        known: Any,
        *,
        root: str | None = None,
        splits: Sequence[str] = (),
        batch: int = 64,
        workers: int | None = None,
    ) -> dict[str, Self]:
        """The data to evaluate a checkpoint on, by split: folders in LibriSpeech's layout below root, or shards."""
        if root is None or not splits:
            raise ValueError("speech needs --root DIR and --splits NAME..., folders in LibriSpeech's layout")
        given: dict[str, Any] = {"root": root, "batch": batch, "workers": workers}
        kind = "shards" if is_packed(root) else "librispeech"
        return {name: cls(dataset=kind, val=[name], **given) for name in splits}

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        """From text to token ids and back; trained on the training texts or read from a file at first use.

        Raises:
            ValueError: there are no training texts, or too few for that number of word pieces.
        """
        if self.wanted_tokenizer.endswith(".model"):
            return read_tokenizer(self.wanted_tokenizer)
        source = self.source("train")
        texts = [source.text(index) for index in range(len(source))]
        return TOKENIZERS[self.wanted_tokenizer](texts, self.pieces)

    @property
    def labelled(self) -> int:
        """How many tokens the tokenizer has, with the blank."""
        return self.tokenizer.vocabulary

    def described(self) -> str:
        """The training data of a run, in one line."""
        hours = float(np.nan_to_num(self.training.durations).sum()) / 3600
        train, val = f"{len(self.training):,} utterances ({hours:.2f} h)", f"{len(self.source('val')):,}"
        return f"{self.dataset}: {train} to train on, {val} to validate"

    def example(self) -> tuple[tuple[Tensor, ...], str]:
        """An input of the model, to count its multiply-adds, and the name of such an input."""
        features = self.preprocess(torch.zeros(10 * self.preprocess.rate))[None]
        return (features, torch.tensor([features.shape[1]])), "10 s of audio"

    def find(self, stage: str) -> None:
        """Finds the utterances of a stage, and their faults, before the first step."""
        if self.cache is not None:
            try:
                os.makedirs(self.cache, exist_ok=True)
            except OSError as error:
                raise ValueError(f"data.cache: cannot make the folder {self.cache!r}: {reason(error)}") from error
        splits = {"fit": ("train", "val"), "validate": ("val",), "test": ("test",)}
        for split in splits.get(stage, ()):
            self.source(split)
        if stage == "fit":
            _ = self.training

    def source(self, split: str) -> Corpus:
        """The utterances of split `train`, `val` or `test`, of any duration.

        Raises:
            ValueError: the split is not given, or its folders or manifests are invalid.
        """
        if split not in self._sources:
            names = self.splits[split] or []
            if not names and self.dataset != "synthetic":
                kinds = {"manifest": "manifests", "shards": "splits of the shards"}
                kind = kinds.get(self.dataset, "folders below root")
                other = "; `validate` measures data.val" if split == "test" and self.splits["val"] else ""
                raise ValueError(f"data.{split} is not given; it must list {kind}{other}")
            build = CORPORA[self.dataset]
            self._sources[split] = build(split, names, self.root, split == "train", self.limit)
        return self._sources[split]

    @functools.cached_property
    def training(self) -> Corpus:
        """The training utterances that are neither too short nor too long.

        Raises:
            ValueError: no utterance is left.
        """
        source = self.source("train")
        short = source.durations < self.shortest
        long = source.durations > (float("inf") if self.longest is None else self.longest)
        kinds = {f"shorter than {self.shortest} s": short, f"longer than {self.longest} s": long}
        out = " and ".join(f"{int(found.sum())} {kind}" for kind, found in kinds.items() if found.any())
        if not out:
            return source
        if (short | long).all():
            raise ValueError(f"no utterance is left to train on: of {len(source)}, {out} are omitted")
        rank_zero_info(f"of {len(source)} utterances, {out} are omitted from training")
        return source.take(np.flatnonzero(~(short | long)))

    def train_dataloader(self) -> DataLoader[Any]:
        """All training utterances in random order."""
        changes = (self.seed, self.speeds, self.noise, self.dither, self.joined)
        dataset = Clips(self.training, self.preprocess, *changes, cache=self.cache)
        return self._loader(dataset, slowest=min(self.speeds), training=True)

    def val_dataloader(self) -> DataLoader[Any]:
        """Every utterance of the validation set once, the longest first."""
        return self._loader(Clips(self.source("val"), self.preprocess, cache=self.cache), training=False)

    def test_dataloader(self) -> DataLoader[Any]:
        """Every utterance of the test set once, the longest first."""
        return self._loader(Clips(self.source("test"), self.preprocess, cache=self.cache), training=False)

    def _loader(self, dataset: Clips, *, slowest: float = 1.0, training: bool) -> DataLoader[Any]:
        # A file whose header cannot be read has no duration; reading it will give the reason.
        durations = np.nan_to_num(dataset.corpus.durations, nan=1.0)
        durations = (durations + (dataset.joined - 1) * (durations.max(initial=0.0) + GAP)) / slowest
        batches = DurationBatches(
            durations, seconds=self.seconds, padding=self.padding, batch=self.batch, training=training, seed=self.seed
        )
        return make_loader(
            dataset,
            batches,
            functools.partial(collate, mels=self.preprocess.mels),
            self.processes(self.dataset != "synthetic"),
        )

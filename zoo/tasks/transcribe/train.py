"""Speech recognition: CTC (Graves et al. 2006) with intermediate losses and consistency between views, or RNN-T (Graves
2012, arXiv:1211.3711), on spectra with random bands removed."""

import math
from collections import Counter
from typing import Any
from zlib import crc32

import torch
import torch.nn.functional as F
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor
from torchmetrics import MeanMetric, Metric, SumMetric
from torchmetrics.text import CharErrorRate, WordErrorRate

from zoo.data.augment import filter_bands, spec_augment, warp_frequencies
from zoo.data.speech import Batch
from zoo.inputs.audio import StreamingFeatures
from zoo.layer import Chunks
from zoo.models.conformer import Conformer
from zoo.outputs import frames_for, greedy, transducer_greedy
from zoo.outputs.tokens import Tokenizer, tokenizer_from_dict
from zoo.tasks.intervals import Measured, bootstrap_ratio, lowest, speaker_of
from zoo.tasks.task import Task
from zoo.tensors import mask_of
from zoo.text import counted

FREQUENT = 5  # how often a word occurs at least of which the recall is given
SCHEDULES = ("cosine", "noam", "noam_hold")
SILENT, CLIPPED = REMARKS = ("silent files with a transcript", "clipped files")
UNREADABLE, LONG, UNKNOWN, EMPTY, BETWEEN = FAULTS = (
    "unreadable files",
    "transcripts with more tokens than frames",
    "transcripts with characters outside the vocabulary",
    "empty transcripts",
    "transcripts with more tokens than frames between the blocks",
)


class Spoken(Metric):
    """The errors of each utterance, over all ranks: rows of a number for its speaker, word errors, words, character
    errors and characters."""

    rows: list[Tensor]

    def __init__(self) -> None:
        super().__init__()
        self.add_state("rows", [], dist_reduce_fx="cat")

    def update(self, rows: Tensor) -> None:
        """rows int64 [n, 5]."""
        self.rows.append(rows)

    def compute(self) -> Tensor:
        """The rows [n, 5]."""
        found = self.rows  # joined already where they come from several ranks
        return found if isinstance(found, Tensor) else torch.cat(found)


class Transcribe(Task):
    """A speech recogniser in training.

    Args:
        backbone: arguments of `zoo.create_model`: name, and any field of the model's config.
        schedule: `cosine`; `noam` (Vaswani et al. 2017: falls with the root of the step); `noam_hold` (Kim et al. 2022:
            stays at the peak, then falls with the step).
        hold: epochs at the peak, for noam_hold.
        warp: largest change of the frequencies of a training utterance, as of another speaker's vocal tract (Jaitly and
            Hinton 2013); 0 for none.
        filter: largest change of the level of a band of a training utterance, in units of its features, as of another
            microphone (FilterAugment, Nam et al. 2022, arXiv:2110.03282), where features are not normalised band by
            band; 0 for none.
        frequency_masks: bands of mel bins that training removes from each utterance.
        frequency_width: most mel bins in such a band.
        time_masks: bands of frames that training removes from each utterance.
        time_share: most frames in such a band, as a share of the utterance.
        intermediate: blocks whose tokens are trained by CTC too, through the same head (Lee and Watanabe 2021,
            arXiv:2102.03216).
        intermediate_weight: share of their mean in the loss.
        consistency: weight of the symmetric divergence between two views of each utterance that are masked differently
            (CR-CTC, Yao et al. 2024, arXiv:2410.05101); 0 for one view. A batch then counts twice in memory.
        chunks: sizes of chunks from which that of each batch is drawn, for a model that streams with any of them;
            null for that of the config.
        weight_decay: of matrices only; norms, biases and positions have none.
        options: those of every task.
    """

    command = "transcribe"
    score = ("val/wer", "min")
    files = "RECORDINGS"
    faulty = FAULTS + REMARKS
    batching = "data.seconds"
    unit = ("h of audio/h", "h/h")
    betas = (0.9, 0.98)
    model: Conformer  # pyright: ignore[reportIncompatibleVariableOverride]

    def __init__(
        self,
        backbone: dict[str, Any] = {},  # noqa: B006 (it is never changed, and --help shows it)
        schedule: str = "cosine",
        hold: float = 0.0,
        warp: float = 0.0,
        filter: float = 0.0,
        frequency_masks: int = 2,
        frequency_width: int = 27,
        time_masks: int = 5,
        time_share: float = 0.05,
        intermediate: list[int] | None = None,
        intermediate_weight: float = 0.3,
        consistency: float = 0.0,
        chunks: list[int] | None = None,
        weight_decay: float = 1e-3,
        **options: Any,
    ) -> None:
        super().__init__(backbone, weight_decay=weight_decay, **options)
        if not self.config.labelled:
            raise ValueError("model.backbone must be a speech model with a vocabulary, such as name=squeezeformer_xs")
        config = self.model.config
        if schedule not in SCHEDULES:
            raise ValueError(f"model.schedule: unknown schedule '{schedule}'; choose from: {', '.join(SCHEDULES)}")
        if hold < 0 or (hold and schedule != "noam_hold"):
            raise ValueError(f"model.hold must be >= 0, and 0 unless schedule is noam_hold, got {hold} with {schedule}")
        if not 0.0 <= intermediate_weight < 1.0 or consistency < 0:
            raise ValueError("model.intermediate_weight must be from 0 to 1 and model.consistency >= 0")
        self.transducer = config.transducer
        if self.transducer and (intermediate or consistency):
            raise ValueError("model.intermediate and model.consistency need a CTC head; this model has a transducer")
        if intermediate_weight != 0.3 and not intermediate:
            raise ValueError("model.intermediate_weight would be ignored: model.intermediate lists no block")
        if any(not 0 <= layer < config.depth - 1 for layer in intermediate or ()):
            raise ValueError(
                f"model.intermediate must list blocks before the last, from 0 to {config.depth - 2}, got {intermediate}"
            )
        if min(intermediate or (config.depth,)) < (first := max(config.strided, default=0)):
            raise ValueError(
                f"model.intermediate: the head needs the width of blocks {first} and later, got {intermediate}"
            )
        if chunks and (config.chunk is None or min(chunks) < 1):
            raise ValueError("model.chunks must list sizes >= 1, for a model whose config has a chunk")
        if not 0.0 <= warp < 1.0:
            raise ValueError(f"model.warp must be >= 0 and < 1, got {warp}")
        if not 0.0 <= filter < math.inf:
            raise ValueError(f"model.filter must be a finite number >= 0, got {filter}")
        self.warp, self.filter = warp, filter
        self.masks = (frequency_masks, frequency_width, time_masks, time_share)
        spec_augment(torch.zeros(1, 1, 1), torch.ones(1).long(), *self.masks)  # raises an error for impossible values
        self.schedule, self.hold, self.consistency = schedule, hold, consistency
        self.intermediate, self.intermediate_weight = tuple(intermediate or ()), intermediate_weight
        self.chunks = tuple(chunks or ())
        self.tokenizer: Tokenizer | None = None
        self.learned, self.tried = 0, 0  # utterances with a loss, and batches, on this rank and in this process
        self.spoken, self.mean_loss, self.with_loss = Spoken(), MeanMetric(), SumMetric()
        self.words, self.recognised = Counter[str](), Counter[str]()  # of this validation, on this rank

    @property
    def labels(self) -> Tokenizer:
        assert self.tokenizer is not None
        return self.tokenizer

    def outputs_wanted(self, data: Any) -> int:
        """The size of the tokenizer's vocabulary: that of the checkpoint if its head is kept, else of the data."""
        kept = None if self.start is None else self.start.labels
        if isinstance(kept, Tokenizer) and kept.vocabulary == self.config.labelled:
            self.tokenizer = kept
            if data.wanted_tokenizer.endswith(".model") and data.tokenizer != kept:
                raise ValueError("data.tokenizer differs from the tokenizer of model.weights; omit one of the two")
            if self.trainer.state.fn == TrainerFn.FITTING:
                rank_zero_info("the tokenizer of model.weights is used; data.tokenizer is ignored")
        else:
            self.tokenizer = data.tokenizer
        return self.labels.vocabulary

    def setup(self, stage: str) -> None:
        super().setup(stage)
        data, config = self.data, self.model.config
        if stage == "fit" and self.filter and data.preprocess.normalize == "bin":
            raise ValueError(
                "model.filter needs features that are not normalised per band, which would undo it; "
                "choose data.recipe=squeezeformer or streaming, or omit model.filter"
            )
        self.centres = data.preprocess.centres
        if config.chunk is not None:
            StreamingFeatures(data.preprocess)  # raises an error for features that need the whole utterance

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["tokenizer"] = self.labels.to_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        if (kept := checkpoint.get("tokenizer")) is not None and kept != self.labels.to_dict():
            rank_zero_warn("the tokenizer of --ckpt_path is kept; the data would give another one")
            self.tokenizer = tokenizer_from_dict(kept)

    def factor(self, step: int, per_epoch: int, steps: int) -> float:
        warmup = max(1, round(self.warmup * per_epoch))
        if self.schedule == "cosine":
            return super().factor(step, per_epoch, steps)
        if step < warmup:
            return (step + 1) / warmup
        if self.schedule == "noam":
            share = (warmup / (step + 1)) ** 0.5
        else:
            share = min(1.0, warmup / max(1, step + 1 - round(self.hold * per_epoch)))
        return max(share, self.final_rate / self.rate)

    def inputs_of(self, batch: Batch) -> tuple[Tensor, Tensor]:
        return batch.features, batch.lengths

    def amount(self, batch: Batch) -> Tensor:
        """Seconds of audio: those in a second are the hours in an hour."""
        return batch.lengths.sum() * self.data.preprocess.seconds_per_frame

    def encoded(self, batch: Batch, stage: str) -> tuple[list[int], list[list[int]]]:
        """The utterances that can have a loss, and their tokens; the others are noted."""
        self.note([f"skipped {fault}" for fault in batch.skipped], UNREADABLE, stage)
        self.note([f"{name} is silent but has a transcript" for name in batch.silent], SILENT, stage)
        self.note([f"{name} is clipped: it was recorded too loud" for name in batch.clipped], CLIPPED, stage)
        done = "skipped" if stage == "training" else "no loss of"
        frames = self.model.tokens(batch.lengths).tolist()
        kept, tokens = [], []
        for index, (text, name) in enumerate(zip(batch.texts, batch.names, strict=True)):
            try:
                found = self.labels.encode(text)
            except ValueError as error:
                self.note([f"{done} {name}: {error}"], UNKNOWN, stage)
                continue
            needed = 1 if self.transducer else frames_for(found)
            if not found:
                self.note([f"{done} {name}: its transcript is empty"], EMPTY, stage)
            elif frames[index] < needed:
                # Without the number of frames, which changes with the speed: each is named once.
                self.note([f"{done} {name}: it has fewer frames than its transcript needs, {needed}"], LONG, stage)
            else:
                kept.append(index)
                tokens.append(found)
        return kept, tokens

    def fate(self, kind: str, stage: str) -> str:
        if kind in REMARKS:
            return "used in"
        measured = kind == BETWEEN or (kind != UNREADABLE and stage == "validation")
        return "omitted from a loss in" if measured else "skipped in"

    def losses(self, logits: Tensor, lengths: Tensor, tokens: list[list[int]], head: Any) -> Tensor:
        """The CTC loss of each utterance, or that of RNN-T with the joint network of `head`: [B]."""
        device = logits.device
        sizes = torch.tensor([len(each) for each in tokens])
        targets = torch.nn.utils.rnn.pad_sequence([torch.tensor(each) for each in tokens], batch_first=True).to(device)
        blank = self.labels.blank
        if not self.transducer:
            scores = F.log_softmax(logits, -1, dtype=torch.float32).transpose(0, 1)
            return F.ctc_loss(scores, targets, lengths, sizes.to(device), blank, "none", zero_infinity=True)
        from torchaudio.functional import rnnt_loss

        logits = logits[:, : int(lengths.max())]  # the longest clip of the batch may have been omitted
        made = head(logits, targets).float()
        return rnnt_loss(made, targets.int(), lengths.int(), sizes.to(device).int(), blank, reduction="none")

    def loss_of(self, batch: Batch) -> Tensor:
        kept, tokens = self.encoded(batch, "training")
        self.learned, self.tried = self.learned + len(tokens), self.tried + 1
        if not tokens:
            return self.nothing()
        features, lengths, views = batch.features[kept], batch.lengths[kept], 2 if self.consistency else 1
        if views == 2:
            features, lengths, tokens = features.repeat(2, 1, 1), lengths.repeat(2), tokens * 2
        if self.warp:
            features = warp_frequencies(features, self.centres, self.warp)
        if self.filter:
            features = filter_bands(features, lengths, self.filter)
        features = spec_augment(features, lengths, *self.masks)
        made = self.model.encode(features, lengths, self.visible(), (*self.intermediate, -1))
        real = [each.lengths for each in made]
        logits = [self.model.logits(each.tokens) for each in made]
        head = self.model.head
        losses = [self.losses(each, number, tokens, head) for each, number in zip(logits, real, strict=True)]  # pyright: ignore
        loss = losses[-1].mean()
        if self.intermediate:
            fits = self.fitting_frames(real[:-1], tokens, [batch.names[index] for index in kept])
            between = (torch.stack(losses[:-1]) * fits).sum() / fits.sum().clamp(min=1)
            loss = (1 - self.intermediate_weight) * loss + self.intermediate_weight * between
        if views == 2:
            apart = divergence(logits[-1], real[-1])  # pyright: ignore[reportArgumentType]
            self.log("train/divergence", apart)
            loss = loss + self.consistency * apart
        self.log("train/loss", self.checked(loss), batch_size=len(tokens))
        return loss * self.share(len(tokens) // views)

    def fitting_frames(self, lengths: list[Any], tokens: list[list[int]], names: list[str]) -> Tensor:
        """[blocks, B], 1.0 where the frames of an intermediate block can hold the tokens; the others are noted."""
        needed = torch.tensor([frames_for(each) for each in tokens], device=self.device)
        fits = torch.stack([number >= needed for number in lengths])
        short = (~fits).any(0).nonzero()[:, 0].tolist()
        lines = [f"no intermediate loss of {names[index % len(names)]}: too few frames" for index in short]
        self.note(lines, BETWEEN, "training")
        return fits.float()

    def nothing(self) -> Tensor:
        """The loss of a batch without utterances: 0, after the same collective calls, so that no rank waits."""
        if self.trainer.world_size == 1:
            return self.no_loss()
        frames = torch.zeros(1, self.model.config.stride, self.model.config.mels, device=self.device)
        made = self.model.encode(frames, torch.zeros(1, dtype=torch.long, device=self.device))[0].tokens
        self.share(0)
        return self.no_loss() + made.sum() * 0.0

    def share(self, number: int) -> Tensor | float:
        """The weight of this rank's mean, so that the mean over ranks is that over utterances."""
        if self.trainer.world_size == 1:
            return 1.0
        numbers = self.all_gather(torch.tensor(float(number), device=self.device))
        return number * self.trainer.world_size / torch.as_tensor(numbers).sum()

    def visible(self) -> Chunks | None:
        if not self.chunks:
            return None
        chunk = self.chunks[int(torch.randint(len(self.chunks), ()))]
        return Chunks(chunk, self.model.config.left // chunk * chunk)

    def on_train_epoch_end(self) -> None:
        super().on_train_epoch_end()
        self.report("training")
        self.check_learned()

    def check_learned(self) -> None:
        """ValueError if ranks have trained, and none could use an utterance of the training set."""
        counts = torch.tensor([self.learned, self.tried], device=self.device)
        learned, tried = torch.as_tensor(self.all_gather(counts)).view(-1, 2).sum(0).tolist()
        if tried and not learned:  # a run that is resumed in a validation has tried none
            raise ValueError("no utterance of the training set could be used; the reason for each is printed above")

    def on_validation_epoch_start(self) -> None:
        if self.trainer.state.fn == TrainerFn.FITTING and not self.trainer.sanity_checking:
            self.check_learned()  # before the model is saved

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        kept, tokens = self.encoded(batch, "validation")
        rows = []
        if batch.texts:
            logits, lengths = self.measured(batch.features, batch.lengths)
            head: Any = self.measured.head
            found = transducer_greedy(head, logits, lengths) if self.transducer else greedy(logits.float(), lengths)
            said = [self.labels.decode(each) for each in found]
            for one, text, name in zip(said, batch.texts, batch.names, strict=True):
                self.words.update(text.split())
                self.recognised.update(Counter(text.split()) & Counter(one.split()))
                row = [crc32(speaker_of(name).encode(errors="surrogatepass"))]
                for metric in (WordErrorRate(), CharErrorRate()):
                    metric.update(one, text)
                    row += [int(metric.errors), int(metric.total)]
                rows.append(row)
            self.with_loss.update(len(tokens))
            if tokens:
                self.mean_loss.update(self.losses(logits[kept], lengths[kept], tokens, head))
        self.spoken.update(torch.tensor(rows, dtype=torch.int64, device=self.device).view(-1, 5))

    def on_validation_epoch_end(self) -> None:
        self.report("validation")
        speakers, wrong, words_of, false, letters = self.spoken.compute().cpu().numpy().T
        number, words = len(speakers), int(words_of.sum())
        if number == 0 and self.trainer.sanity_checking:
            return
        if words == 0:
            raise ValueError("no utterance of the validation set could be read, or none has a transcript")
        part = "test" if self.trainer.testing else "val"
        wer, cer = (float(errors.sum() / total.sum()) for errors, total in ((wrong, words_of), (false, letters)))
        self.log_dict({f"{part}/wer": wer, f"{part}/cer": cer})
        if self.with_loss.compute():
            self.log(f"{part}/loss", self.mean_loss.compute())
        size = f"n = {counted(words, 'word')} in {counted(number, 'utterance')}"
        found, other = bootstrap_ratio(wrong, words_of, speakers), bootstrap_ratio(false, letters, speakers)
        self.figures = [
            Measured("wer", "word error rate", words, found),
            Measured("cer", "character error rate", int(letters.sum()), other),
        ]
        if not self.fitting and self.trainer.world_size == 1:
            right = [self.recognised[word] for word in self.words]
            self.figures += lowest("recall", [*self.words], right, [*self.words.values()], FREQUENT)
        self.words.clear()
        self.recognised.clear()
        if found is not None:
            size += f", 95 % interval {found[0]:.4f} to {found[1]:.4f}"
        self.said = f"word error rate {wer:.4f}, character error rate {cer:.4f} ({size})"
        for metric in (self.spoken, self.mean_loss, self.with_loss):
            metric.reset()

    test_step = validation_step
    on_test_epoch_end = on_validation_epoch_end


def divergence(logits: Tensor, lengths: Tensor) -> Tensor:
    """The symmetric Kullback-Leibler divergence between the two halves of a batch of logits [2 B, T, V], each against
    the other held fixed: summed over the valid frames of an utterance, the mean over utterances."""
    scores = F.log_softmax(logits, -1, dtype=torch.float32)
    other = torch.cat(scores.detach().chunk(2)[::-1])
    apart = (other.exp() * (other - scores)).sum(-1)
    return apart.masked_fill(~mask_of(lengths, apart.shape[1]), 0.0).sum(1).mean()

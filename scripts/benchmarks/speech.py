"""Speech encoders: against others of their shape, in real time, and on long audio by their mixer.

python -m benchmarks.speech MIXER DTYPE THREADS SECONDS...: for each length of audio a line with the peaks of resident
memory, in MiB, of the parts of a model with this row of MIXERS, each above what the process held before the part ran.
It starts without timm, which benchmarks.models imports.
"""

import argparse
import copy
import functools
import re
import sys
import tempfile
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

import zoo
from benchmarks.measure import (
    DTYPES,
    Call,
    NotMeasured,
    Row,
    crossed,
    interleaved,
    markdown,
    milliseconds,
    randomise,
    ratio_cell,
    timed,
)
from benchmarks.peak import check_peaks, resident, said_alone
from zoo.convert import from_transformers
from zoo.layer import Context
from zoo.models.base import count_parameters
from zoo.models.conformer import Conformer

MELS, RATE = 80, 100  # of features: bands, and frames a second
RIVALS = {"squeezeformer_sm": "conformer_ctc_m"}
TWIN, DEPTH = "fastconformer_m", 16  # what transformers' Parakeet is made in the shape of
PARAKEET = {
    "hidden_size": 256,
    "num_attention_heads": 4,
    "intermediate_size": 1024,
    "conv_kernel_size": 9,
    "subsampling_factor": 8,
    "subsampling_conv_channels": 256,
    "num_mel_bins": MELS,
}
ENCODERS = ["conformer_ctc_s", "conformer_ctc_m", "squeezeformer_xs", "squeezeformer_s", "squeezeformer_sm"]
ENCODERS += ["fastconformer_s", "fastconformer_m", "efficient_conformer_s"]
COUNTED = "FlopCounterMode of torch.utils.flop_counter, 2 x multiply-adds, attention as under SDPBackend.MATH"
LONG = "conformer_ctc_m"  # with one block
# What it is made with; the others are compared with the first.
MIXERS = {
    "relative": {"mixer": "relative"},
    "relative(window=128)": {"mixer": "relative(window=128)"},
    "local(window=128), rope": {"mixer": "local(window=128)", "position": "rope"},
    "sla, rope": {"mixer": "sla", "position": "rope"},
    "softmax, rope": {"mixer": "softmax", "position": "rope"},
}
PARTS = ("mixer", "block", "model")


class Tokens(nn.Module):
    """The first of what an encoder gives."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, features: Tensor) -> Tensor:
        return self.encoder(features)[0]


def audio(seconds: int) -> Tensor:
    """Features of one clip."""
    return torch.randn(1, seconds * RATE, MELS)


def pairs(options: argparse.Namespace) -> Iterator[Row]:
    """Our encoders against each other, CTC heads included; forward."""
    from benchmarks.models import compare

    with tqdm(total=len(options.speech) * len(options.audio), desc="speech") as bar:
        for name, base in options.speech.items():
            ours, theirs = (Tokens(zoo.create_model(each)) for each in (name, base))
            for seconds in options.audio:
                bar.set_postfix_str(f"{name} against {base}, {seconds} s")
                row: Row = {"model": name, "base": base, "seconds": seconds, "batch": 1, "mode": "forward"}
                yield row | compare(ours, theirs, audio(seconds), "forward", options)
                bar.update()


def parakeet(options: argparse.Namespace) -> Iterator[Row]:
    """FastConformer without a head against transformers' encoder with the same weights; forward."""
    from benchmarks.models import compare, same

    try:
        from transformers import ParakeetEncoder, ParakeetEncoderConfig
    except ImportError:
        raise NotMeasured("transformers is not installed") from None
    config = ParakeetEncoderConfig(**PARAKEET, num_hidden_layers=options.depth, attn_implementation="sdpa")
    encoder = randomise(ParakeetEncoder(config))
    model = zoo.create_model(TWIN, depth=options.depth, vocabulary=0)
    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        save_file(encoder.state_dict(), Path(folder) / "model.safetensors")
        model.load_state_dict(from_transformers(folder).model.state_dict())
    ours, theirs = Tokens(model), Tokens(encoder)
    base = f"transformers {version('transformers')} ParakeetEncoder"
    for seconds in options.audio:
        same(TWIN, ours, base, theirs, audio(seconds))
    for seconds in tqdm(options.audio, desc="parakeet"):
        row: Row = {"model": TWIN, "base": base, "seconds": seconds, "batch": 1, "mode": "forward"}
        yield row | compare(ours, theirs, audio(seconds), "forward", options)


def gflop(name: str, seconds: int) -> float:
    """What a preset computes for one clip; counted as in training, where subsampling takes the clip as a whole."""
    with torch.device("meta"):
        model, features = zoo.create_model(name).eval(), audio(seconds)
    with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(features)
    return counter.get_total_flops() / 1e9


def real_time(options: argparse.Namespace) -> Iterator[Row]:
    """CPU time of encoders as a share of the audio's, all of them in turn; forward."""
    from benchmarks.models import step

    first = options.encoders[0]
    models = {name: zoo.create_model(name).to(DTYPES[options.dtype]) for name in options.encoders}
    models["again"] = copy.deepcopy(models[first])
    for seconds in tqdm(options.audio, desc="rtf"):
        torch.compiler.reset()
        features = audio(seconds).to(DTYPES[options.dtype])
        calls = {name: step(model, features, "forward", options.compile) for name, model in models.items()}
        taken = interleaved(calls, calls.pop("again"), options)
        noise = timed("noise", taken.pop("again"), taken[first])
        for name, times in taken.items():
            row: Row = {"model": name, "parameters": count_parameters(models[name]), "seconds": seconds, "batch": 1}
            row |= {"mode": "forward", "ms": milliseconds(times), "pairs": len(times)}
            row |= timed("rtf", times, [float(seconds)] * len(times))
            yield row | noise | {"gflop": gflop(name, seconds), "counted": COUNTED}


def parts(model: Conformer, seconds: int) -> dict[str, Call]:
    """Calls of the mixer and of the block on the tokens of so much audio, and of the model on its features: the
    subsampling, the block and the head."""
    features = audio(seconds).to(model.head.weight)
    number = model.tokens(features.shape[1])
    tokens = torch.randn(1, number, model.config.dim).to(features)
    context = model.position.place(Context(grid=(number,)))
    block = model.blocks[0]
    mixer = block.steps[model.config.layout.index("mixer")].branch
    return {
        "mixer": functools.partial(mixer, tokens, context),
        "block": functools.partial(block, tokens, context),
        "model": functools.partial(model, features),
    }


def shaped(name: str, dtype: str) -> Conformer:
    """The model of one block with a row of MIXERS."""
    return randomise(zoo.create_model(LONG, depth=1, **MIXERS[name])).to(DTYPES[dtype]).eval()


def check_memory(seconds: int) -> None:
    """NotMeasured where relative attention over so much audio does not fit, or where memory cannot be told."""
    check_peaks()
    config = zoo.models.configure(LONG)
    tokens = seconds * RATE // config.stride
    # Scores by offset are twice as many as pairs of tokens; half as much again is left for what else there is.
    needed = 3 * config.heads * tokens**2 * 4 / 2**30
    found = re.search(r"^MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text(), re.MULTILINE)
    available = int(found[1]) / 2**20 if found else 0.0
    if available < needed:
        wanted = f"relative attention over {seconds} s of audio takes {needed:.1f} GiB"
        raise NotMeasured(f"{wanted}, and {available:.1f} GiB are available; choose less with --long")


def peaks(name: str, options: argparse.Namespace) -> dict[int, dict[str, float]]:
    """MiB of each part for each length of audio, from a process of its own."""
    given = (name, options.dtype, str(options.threads), *map(str, options.long))
    lines = zip(options.long, said_alone("benchmarks.speech", *given), strict=True)
    return {seconds: dict(zip(PARTS, map(float, line.split()), strict=True)) for seconds, line in lines}


@torch.inference_mode()
def main(name: str, dtype: str, threads: str, *lengths: str) -> None:
    """What the process of `peaks` does."""
    torch.set_num_threads(int(threads))
    torch.manual_seed(0)
    model = shaped(name, dtype)
    for call in parts(model, 2).values():
        call()  # excludes what is loaded once
    for seconds in map(int, lengths):
        taken = []
        for call in parts(model, seconds).values():
            start = resident("VmRSS")
            Path("/proc/self/clear_refs").write_text("5")  # the peak is what is held now
            call()
            taken.append(resident("VmHWM") - start)
        print(*taken)


def long(options: argparse.Namespace) -> Iterator[Row]:
    """Mixers against the length of the audio, in time and in memory, as ratios to the first; forward."""
    check_memory(max(options.long))
    names = options.mixers_of_long
    first = names[0]
    memory = {name: peaks(name, options) for name in tqdm(names, desc="long, memory")}
    models = {name: shaped(name, options.dtype) for name in names}
    models["again"] = copy.deepcopy(models[first])
    with tqdm(total=len(options.long) * len(PARTS), desc="long") as bar, torch.inference_mode():
        for seconds in options.long:
            ready = {name: parts(model, seconds) for name, model in models.items()}
            for part in PARTS:
                bar.set_postfix_str(f"{part}, {seconds} s")
                calls = {name: ready[name][part] for name in models}
                taken = interleaved(calls, calls.pop("again"), options)
                noise = timed("noise", taken.pop("again"), taken[first])
                for name, times in taken.items():
                    mib = memory[name][seconds][part]
                    row: Row = {"mixer": name, "part": part, "blocks": 1, "seconds": seconds, "batch": 1}
                    row |= {"mode": "forward", "ms": milliseconds(times), "pairs": len(times)}
                    row |= timed("ratio", times, taken[first]) | noise
                    yield row | {"mib": mib, "mib_ratio": mib / memory[first][seconds][part]}
                bar.update()


def pair_table(rows: Sequence[Row]) -> str:
    header = ("model", "against", "audio", "ms", "ms against", "ratio (quartiles)", "noise (quartiles)")
    lines = []
    for row in rows:
        times = [f"{row['seconds']} s", f"{row['ms']:.1f}", f"{row['base_ms']:.1f}"]
        lines.append([str(row["model"]), str(row["base"]), *times, ratio_cell(row, "ratio"), ratio_cell(row, "noise")])
    return markdown(header, lines)


def real_time_table(rows: Sequence[Row]) -> str:
    """A row for each encoder and length, and how operations were counted."""
    header = ("model", "parameters", "audio", "ms", "real-time factor (quartiles)", "GFLOP")
    lines = []
    for row in rows:
        cells = [f"{row['parameters'] / 1e6:.1f} M", f"{row['seconds']} s", f"{row['ms']:.1f}"]
        factor = f"{row['rtf']:.4f} ({row['rtf_low']:.4f}-{row['rtf_high']:.4f})"
        lines.append([str(row["model"]), *cells, factor, f"{row['gflop']:.1f}"])
    noise = {f"{row['seconds']} s: {ratio_cell(row, 'noise')}": None for row in rows}
    return f"{markdown(header, lines)}\n\nGFLOP by {rows[0]['counted']}. Noise of a time at {', '.join(noise)}."


def long_table(rows: Sequence[Row]) -> str:
    """A row for each mixer and length of audio, a column for each part; a table for time and one for memory."""

    def table(unit: str, value: str, ratio: str) -> tuple[list[str], list[list[str]]]:
        return crossed(
            f"{unit} (ratio to {rows[0]['mixer']})",
            rows,
            lambda row: f"{row['seconds']} s: {row['mixer']}",
            lambda row: "model of 1 block" if row["part"] == "model" else str(row["part"]),
            lambda row: f"{row[value]:.1f} ({row[ratio]:.3f})",
        )

    header, lines = table("ms", "ms", "ratio")
    for seconds in dict.fromkeys(row["seconds"] for row in rows):
        noise = {row["part"]: ratio_cell(row, "noise") for row in rows if row["seconds"] == seconds}
        lines.append([f"{seconds} s: noise of the ratio", *noise.values()])
    return f"{markdown(header, lines)}\n\n{markdown(*table('MiB', 'mib', 'mib_ratio'))}"


if __name__ == "__main__":
    main(*sys.argv[1:])

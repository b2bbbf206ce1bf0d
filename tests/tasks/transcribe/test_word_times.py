"""The times of words against the sounds of recordings of single words, put one after the other."""

import os
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

import zoo
from zoo.outputs import greedy
from zoo.outputs.align import words

RATE, SILENCE = 16_000, 0.4


def onset(samples: np.ndarray) -> float:
    """Seconds until the power, over 10 ms, first exceeds that 30 dB below its largest."""
    power = np.convolve(samples**2, np.ones(160) / 160, "same")
    return float(np.flatnonzero(power > power.max() * 1e-3)[0]) / RATE


@pytest.mark.slow
def test_word_times_agree_with_onsets():
    """50 strings of three digits each, of the dev split: most are read right, and times are within 80 ms."""
    home = os.environ.get("ZOO_DATA")
    if home is None or not (root := Path(home, "fsdd/dev")).is_dir():
        pytest.skip("ZOO_DATA is not set to a folder with fsdd")
    files = sorted(root.rglob("*.flac"))
    said = {}
    for path in root.rglob("*.trans.txt"):
        said |= dict(line.split(maxsplit=1) for line in path.read_text().splitlines())
    np.random.default_rng(0).shuffle(files)
    model, preprocess, tokenizer, _ = zoo.load_checkpoint("squeezeformer_micro.spoken_digits")
    errors, right = [], 0
    for first in range(0, 150, 3):
        parts, starts, time, texts = [], [], 0.0, []
        for path in files[first : first + 3]:
            samples, rate = soundfile.read(path)
            assert rate == RATE
            noise = np.random.default_rng(first).normal(0, 1e-4, int(SILENCE * RATE))
            parts += [noise, samples]
            starts.append(time + SILENCE + onset(samples))
            time += (len(noise) + len(samples)) / RATE
            texts.append(said[path.stem].strip())
        wave = np.concatenate([*parts, np.zeros(int(SILENCE * RATE))])
        with torch.inference_mode():
            logits, lengths = model(preprocess(torch.tensor(wave, dtype=torch.float32))[None])
        tokens, frames = greedy(logits, lengths)[0], int(lengths[0])
        if tokenizer.decode(tokens).split() == texts:
            found = words(logits[0, :frames], tokens, tokenizer, len(wave) / RATE / frames)
            errors += [abs(each.start - start) for each, start in zip(found, starts, strict=True)]
            right += 1
    print(f"{right} of 50 strings right; median error of {len(errors)} onsets {np.median(errors):.3f} s")
    card = (Path(__file__).parents[3] / "checkpoints/squeezeformer_micro.spoken_digits/README.md").read_text()
    assert f"Of 50 strings of three of those recordings, {right} are right" in card and right > 35
    assert f"{np.median(errors):.3f} s from the onsets" in card and np.median(errors) <= 0.08

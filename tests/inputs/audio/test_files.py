import io
import math
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from torch import Tensor

from zoo.inputs.audio import EXTENSIONS, FORMATS, UnreadableAudio, audio_seconds, read_audio, stream_audio
from zoo.inputs.audio.containers import length_of


def tone(seconds: float, pitch: float = 440.0, rate: int = 16000) -> Tensor:
    return 0.5 * torch.sin(2 * math.pi * pitch * torch.arange(round(seconds * rate)) / rate)


def speechlike(samples: int) -> Tensor:
    """A tone that comes and goes over noise."""
    generator = torch.Generator().manual_seed(0)
    time = torch.arange(samples) / 16000
    return 0.3 * torch.sin(3000 * time) * torch.sin(6 * time) + 0.01 * torch.randn(samples, generator=generator)


def write(path: Path, waveform: Tensor, rate: int = 16000, **options: Any) -> Path:
    soundfile.write(path, waveform.numpy(), rate, **options)
    return path


@pytest.mark.parametrize("extension", ["wav", "flac", "ogg", "mp3"])
def test_formats(tmp_path: Path, extension: str):
    path = write(tmp_path / f"a.{extension}", tone(1.0))
    waveform = read_audio(path)
    assert waveform.dtype == torch.float32 and waveform.shape == (16000,)
    limit = 1e-4 if extension in ("wav", "flac") else 0.05
    assert (waveform - tone(1.0))[1600:-1600].abs().max() < limit
    assert audio_seconds(path) == 1.0


@pytest.mark.parametrize("rate", [8000, 44100, 48000])
def test_other_rates_are_resampled(tmp_path: Path, rate: int):
    waveform = read_audio(write(tmp_path / "a.wav", tone(1.0, rate=rate), rate, subtype="FLOAT"))
    assert waveform.shape == (16000,)
    assert (waveform - tone(1.0))[200:-200].abs().max() < 1e-3
    assert read_audio(tmp_path / "a.wav", rate=8000).shape == (8000,)


def test_channels_are_averaged(tmp_path: Path):
    left, right = tone(0.5), tone(0.5, 1000)
    path = write(tmp_path / "a.wav", torch.stack([left, right], 1), subtype="FLOAT")
    torch.testing.assert_close(read_audio(path), (left + right) / 2)


@pytest.mark.parametrize("extension", ["wav", "flac"])
def test_a_part_of_a_file(tmp_path: Path, extension: str):
    path = write(tmp_path / f"a.{extension}", speechlike(16000), subtype="PCM_16")
    whole = read_audio(path)
    assert torch.equal(read_audio(path, start=0.25, seconds=0.5), whole[4000:12000])
    assert torch.equal(read_audio(path, start=0.75, seconds=0.5), whole[12000:])
    with pytest.raises(UnreadableAudio, match=r"ends at 1.00 s, before the start at 1.50 s"):
        read_audio(path, start=1.5)


def test_silence_and_clipping_are_legal(tmp_path: Path):
    assert read_audio(write(tmp_path / "a.flac", torch.zeros(800))).abs().max() == 0
    clipped = read_audio(write(tmp_path / "b.wav", 20 * tone(0.1)))
    assert clipped.max() > 0.999 and clipped.min() == -1


def broken(folder: Path) -> dict[Path, str]:
    for extension in ("wav", "flac", "ogg", "mp3"):
        content = write(folder / f"whole.{extension}", speechlike(16000)).read_bytes()
        (folder / f"half.{extension}").write_bytes(content[: len(content) // 2])
        (folder / f"empty.{extension}").write_bytes(b"")
    (folder / "text.flac").write_bytes(b"no sound" * 100)
    (folder / "folder.wav").mkdir()
    write(folder / "none.wav", torch.zeros(0))
    holes = speechlike(1000)
    holes[3] = math.nan
    write(folder / "nan.wav", holes, subtype="FLOAT")
    holes[3] = math.inf
    write(folder / "inf.wav", holes, subtype="FLOAT")
    holes[3] = 1e19
    write(folder / "huge.wav", holes, subtype="FLOAT")
    lost = "cannot be read as audio (Error : flac decoder lost sync.)"
    reasons = {
        "half.wav": "truncated",
        "half.flac": lost,
        "half.ogg": "truncated",
        "half.mp3": "truncated",
        "missing.wav": "No such file",
    }
    reasons |= {f"empty.{extension}": "the file is empty" for extension in ("wav", "flac", "ogg", "mp3")}
    reasons |= {"text.flac": "cannot be read as audio (Format not recognised.)", "folder.wav": "it is a folder"}
    reasons |= {
        "none.wav": "it has no samples",
        "nan.wav": "NaN, infinite or above",
        "inf.wav": "NaN, infinite or above",
        "huge.wav": "NaN, infinite or above",
    }
    return {folder / name: reason for name, reason in reasons.items()}


def test_unreadable_files_say_why(tmp_path: Path):
    for path, reason in broken(tmp_path).items():
        with pytest.raises(UnreadableAudio) as error:
            read_audio(path)
        message = str(error.value)
        assert message.startswith(f"{path}: ") and reason in message and "\n" not in message
    for name in ("text.flac", "missing.wav", "empty.wav"):
        with pytest.raises(UnreadableAudio, match=name):
            audio_seconds(tmp_path / name)


# Headers that are wrong


KINDS: dict[str, dict[str, Any]] = {
    "wav": {},
    "rf64": {"format": "RF64"},
    "aiff": {},
    "au": {"subtype": "PCM_16"},
    "caf": {"subtype": "PCM_16"},
}


def with_length(path: Path, promised: int) -> None:
    """Writes another length of the sound into the header of a file."""
    content = path.read_bytes()
    length = length_of(io.BytesIO(content), len(content))
    assert length is not None and not length.wrong and length.promised is not None
    wide = length.form[1].upper() == "Q"
    new = struct.pack(
        length.form, promised if not wide or promised != 0xFFFFFFFF else -1 if length.form[1] == "q" else 2**64 - 1
    )
    path.write_bytes(content[: length.place] + new + content[length.place + len(new) :])


@pytest.mark.parametrize("extension", KINDS)
@pytest.mark.parametrize("promised", [0, 0xFFFFFFFF, 0x7FFF0000, 32044])
def test_a_length_that_was_never_filled_in(tmp_path: Path, extension: str, promised: int):
    if promised == 0x7FFF0000 and extension in ("rf64", "caf"):
        pytest.skip("64 bits can mean it")
    path = write(tmp_path / f"a.{extension}", tone(1.0), **KINDS[extension])
    whole = read_audio(path)
    assert len(whole) == 16000
    with_length(path, promised)
    assert torch.equal(read_audio(path), whole) and audio_seconds(path) == 1.0
    assert torch.equal(read_audio(path, start=0.5), whole[8000:])


def test_an_empty_riff_too(tmp_path: Path):
    path = write(tmp_path / "a.wav", tone(1.0))
    content = bytearray(path.read_bytes())
    content[4:8] = content[40:44] = bytes(4)
    path.write_bytes(content)
    assert len(read_audio(path)) == 16000


@pytest.mark.parametrize("extension", KINDS)
def test_half_a_file_is_truncated(tmp_path: Path, extension: str):
    path = write(tmp_path / f"a.{extension}", tone(1.0), **KINDS[extension])
    path.write_bytes(path.read_bytes()[:20000])
    pieces = stream_audio(path)
    assert 7900 < len(next(pieces)) < 10000
    with pytest.raises(UnreadableAudio, match=r"a\.\w+: truncated after 0.[56]\d s"):
        list(pieces)


def test_a_header_that_promises_no_sound_before_another_chunk(tmp_path: Path):
    path = write(tmp_path / "a.wav", torch.zeros(0))
    path.write_bytes(path.read_bytes() + b"LIST" + struct.pack("<I", 4) + b"INFO")
    with pytest.raises(UnreadableAudio, match="it has no samples"):
        read_audio(path)


@pytest.mark.parametrize("samples", [0, 2**36 - 1])
def test_a_flac_that_does_not_know_its_length(tmp_path: Path, samples: int):
    path = write(tmp_path / "a.flac", tone(2.0))
    whole, content = read_audio(path), bytearray(path.read_bytes())
    content[21] = content[21] & 0xF0 | samples >> 32
    content[22:26] = struct.pack(">I", samples & 0xFFFFFFFF)
    path.write_bytes(content)
    assert torch.equal(read_audio(path), whole) and audio_seconds(path) == 2.0
    assert torch.equal(read_audio(path, start=1.5, seconds=0.25), whole[24000:28000])
    with pytest.raises(UnreadableAudio, match=r"it ends at 2.00 s, before the start at 3.00 s"):
        read_audio(path, start=3.0)


@pytest.mark.parametrize("extension", KINDS)
def test_broken_headers_are_one_line(tmp_path: Path, extension: str, capfd: pytest.CaptureFixture[str]):
    path = write(tmp_path / f"a.{extension}", tone(0.5), **KINDS[extension])
    with_length(path, 0)
    content, generator = path.read_bytes(), np.random.default_rng(0)
    for _ in range(150):
        broken = bytearray(content)
        place, size = generator.integers(4, 100), generator.integers(1, 9)
        broken[place : place + size] = generator.choice([0, 0x7F, 0xFF]).astype(np.uint8).tobytes() * size
        path.write_bytes(broken)
        try:
            assert read_audio(path).isfinite().all()
        except UnreadableAudio as error:
            assert str(error).startswith(f"{path}: ") and str(error).isprintable()
    assert capfd.readouterr() == ("", "")  # soundfile prints what goes wrong in its callbacks


@pytest.mark.parametrize("size", [0, 7, 12, 100_000])
def test_headers_of_noise_end(size: int):
    for magic in (b"RIFF", b"FORM", b"caff", b".snd", b"RF64"):
        content = magic + bytes(size)
        found = length_of(io.BytesIO(content), len(content))
        assert found is None or found.found <= len(content)


# Kinds of files


@pytest.mark.parametrize("subtype", soundfile.available_subtypes("WAV"))
def test_subtypes_of_wav(tmp_path: Path, subtype: str):
    rate = 8000 if subtype in ("GSM610", "G721_32") else 16000
    try:
        path = write(tmp_path / "a.wav", speechlike(16000), rate, subtype=subtype)
    except soundfile.SoundFileError:
        pytest.skip("this libsndfile does not write it")
    sound = read_audio(path, rate)
    assert 16000 <= len(sound) < 17000  # some fill their last block
    assert torch.corrcoef(torch.stack([sound[:16000], speechlike(16000)]))[0, 1] > 0.9
    assert len(read_audio(path, rate, start=4000 / rate)) == len(sound) - 4000


def test_extensions_are_those_of_the_formats(tmp_path: Path):
    assert FORMATS.keys() <= soundfile.available_formats().keys() and len(EXTENSIONS) == len(set(EXTENSIONS))
    for name, extensions in FORMATS.items():
        for extension in extensions:
            more = {"subtype": "OPUS"} if extension == ".opus" else {"endian": "FILE"}
            rate = 48000 if extension == ".opus" else 16000
            path = write(tmp_path / f"a{extension}", tone(0.5, rate=rate), rate, format=name, **more)
            assert abs(len(read_audio(path)) - 8000) < 10


@pytest.mark.parametrize("subtype", ["VORBIS", "OPUS"])
def test_long_ogg_files_are_whole(tmp_path: Path, subtype: str):
    path = write(tmp_path / "a.ogg", speechlike(5 * 16000), format="OGG", subtype=subtype)
    assert len(read_audio(path)) == 5 * 16000
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(UnreadableAudio, match="truncated after [34]"):
        read_audio(path)


def test_formats_that_are_no_one_s_sound(tmp_path: Path):
    path = write(tmp_path / "a.wav", tone(0.1), format="MAT5")
    with pytest.raises(UnreadableAudio, match=r"a\.wav: MAT5 is not supported; allowed: WAV, "):
        read_audio(path)


@pytest.mark.parametrize("rate", [1, 999, 1_000_000])
def test_absurd_rates(tmp_path: Path, rate: int):
    with pytest.raises(UnreadableAudio, match=rf"a\.wav: sample rate must be 1000 to 768000 Hz, got {rate}"):
        read_audio(write(tmp_path / "a.wav", tone(0.1), rate))


def test_long_files_come_in_pieces(tmp_path: Path):
    sound = speechlike(2 * 900_000).view(-1, 2)
    path = write(tmp_path / "a.wav", sound, 32000, subtype="FLOAT")
    pieces = list(stream_audio(path))
    assert len(pieces) > 2 and sum(map(len, pieces)) == 450_000 and max(map(len, pieces)) < 300_000
    assert torch.equal(torch.cat(pieces), read_audio(path))


@pytest.mark.slow
def test_an_hour_of_stereo_takes_the_memory_of_its_result(tmp_path: Path):
    path = tmp_path / "a.wav"
    with soundfile.SoundFile(path, "w", 44100, 2) as file:
        for _ in range(60):
            file.write(np.zeros((44100 * 60, 2), np.float32))
    code = f"""
import resource
from zoo.inputs.audio import Resampler, stream_audio
Resampler(44100, 16000)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
assert sum(map(len, stream_audio({str(path)!r}))) == 3600 * 16000
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) >> 10)
"""
    assert int(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout) < 150

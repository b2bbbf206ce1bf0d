"""scripts/speak: the texts, and the data that it writes; a stand-in for the synthesizer hums each letter."""

import os
import shutil
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from random import Random
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import soundfile

from zoo.data.speech import Speech

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
HUM = """#!{python}
import sys, wave, math, struct
text, words = sys.stdin.read(), sys.argv
rate = 22050
number = len(text) * rate // 20
open({log!r}, "a").write(text + "\\n")
if text == {broken!r}:
    sys.exit(3)
tone = [math.sin(i * 0.003 * int(words[words.index("-p") + 1])) for i in range(number)]
with wave.open(sys.stdout.buffer, "wb") as file:
    file.setnchannels(1), file.setsampwidth(2), file.setframerate(rate)
    file.writeframes(struct.pack(f"<{{number}}h", *(int(9000 * each) for each in tone)))
"""


@pytest.fixture(scope="module")
def synthesis() -> dict[str, ModuleType]:
    sys.path.insert(0, str(SCRIPTS))
    try:
        return {name: import_module(f"synthesis.{name}") for name in ("texts", "voices", "command")}
    finally:
        sys.path.remove(str(SCRIPTS))


@pytest.fixture
def log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An espeak-ng on the PATH that hums; the texts that it got."""
    log, program = tmp_path / "log", tmp_path / "bin/espeak-ng"
    program.parent.mkdir()
    program.write_text(HUM.format(python=sys.executable, log=str(log), broken="B R O K E N"))
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")
    return log


def run(output: Path, *words: object) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, str(SCRIPTS / "speak"), str(output), "--engines=espeak-ng", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_numbers_in_words(synthesis: dict[str, ModuleType]):
    words = [synthesis["texts"].below_hundred(number) for number in range(100)]
    assert words[:3] == ["ZERO", "ONE", "TWO"] and words[13] == "THIRTEEN" and words[40] == "FORTY"
    assert words[79] == "SEVENTY NINE" and len({*words}) == 100
    assert len({*synthesis["texts"].DAYS}) == 31 and synthesis["texts"].DAYS[30] == "THIRTY FIRST"


def test_kinds(synthesis: dict[str, ModuleType], tmp_path: Path):
    texts = synthesis["texts"]
    (tmp_path / "words").write_text("Ann\nO\u2019Neil\nann\n\n12\n")
    (tmp_path / "text").write_text("Call me Ishmael. No! Some years ago; never mind how long.")
    words, sentences = texts.lines_of([tmp_path / "words"]), texts.sentences_of([tmp_path / "text"])
    assert words == ["ANN", "O'NEIL"] and sentences == ["CALL ME ISHMAEL", "SOME YEARS AGO", "NEVER MIND HOW LONG"]
    drawn = texts.rules([*texts.RULES, *texts.LISTED], words, sentences)
    said = [next(texts.texts([rule], set(), Random(0))) for rule in drawn]
    assert all(text == texts.cleaned(text) != "" for text in said)
    assert said[-2] in ("A N N", "O N E I L") and said[-1] in sentences
    for kind, option in (("spelled", "--words"), ("sentences", "--text")):
        with pytest.raises(ValueError, match=f"kind {kind} needs {option} FILE"):
            texts.rules([kind], [], [])


def test_what_is_excluded_is_not_said(synthesis: dict[str, ModuleType]):
    texts = synthesis["texts"]
    drawn = texts.rules(["sentences"], [], ["A B", "C D", "E F"])
    source = texts.texts(drawn, {"A B", "C D"}, Random(0))
    assert {next(source) for _ in range(50)} == {"E F"}
    with pytest.raises(ValueError, match="every text is excluded"):
        next(texts.texts(drawn, {"A B", "C D", "E F"}, Random(0)))


@pytest.mark.daily(4)
def test_data_that_trains(log: Path, tmp_path: Path):
    """Read by the data module as any LibriSpeech folder; made again, it is the same and nothing is spoken twice."""
    options = ("--hours=0.02", "--speakers=2", "--kinds", "digits", "letters")
    done = run(tmp_path / "out", *options)
    assert done.returncode == 0 and "2 speakers" in done.stdout, done.stderr
    files = sorted((tmp_path / "out").rglob("*.flac"))
    assert len(files) % 50 == 0 and soundfile.info(files[0]).samplerate == 16000
    lines = [line for path in (tmp_path / "out").rglob("*.trans.txt") for line in path.read_text().splitlines()]
    assert {line.split()[0] for line in lines} == {path.stem for path in files}
    said = log.read_text().splitlines()
    assert sorted(said) == sorted(line.partition(" ")[2] for line in lines)
    lengths = {path.stem: soundfile.info(path).duration for path in files}
    for line in lines:
        assert lengths[line.split()[0]] == pytest.approx(len(line.partition(" ")[2]) / 20, abs=0.01)
    data: Any = Speech(dataset="librispeech", root=str(tmp_path), train=["out"], val=["out"], workers=0)
    data.setup("fit")
    assert sum(len(batch.texts) for batch in data.val_dataloader()) == len(files)

    shutil.rmtree(chapter := files[0].parent)
    (chapter.parent / f".{chapter.name}.new").mkdir()  # a kill left it
    again = run(tmp_path / "out", *options)
    assert again.returncode == 0 and sorted((tmp_path / "out").rglob("*.flac")) == files
    assert len(log.read_text().splitlines()) == len(said) + 50
    assert sorted(log.read_text().splitlines()[len(said) :]) == sorted(
        line.partition(" ")[2] for line in next(chapter.glob("*.trans.txt")).read_text().splitlines()
    )


@pytest.mark.daily(3)
def test_wrong_arguments(log: Path, tmp_path: Path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/file").touch()
    (tmp_path / "broken").write_text("broken")
    bad = {
        "holds other files": [tmp_path / "mine"],
        "needs --words FILE": [tmp_path / "a", "--kinds=words"],
        "--hours must be > 0": [tmp_path / "a", "--hours=0"],
        "has no *.trans.txt": [tmp_path / "a", "--exclude", tmp_path / "mine"],
        "cannot say 'B R O K E N'": [tmp_path / "b", "--kinds=spelled", "--words", tmp_path / "broken"],
        "cannot read": [tmp_path / "a", "--kinds=words", "--words", tmp_path / "none"],
    }
    for words, arguments in bad.items():
        done = run(arguments[0], *arguments[1:])
        assert done.returncode == 1 and words in done.stderr, (words, done.stderr)
        assert done.stderr.startswith("scripts/speak: error: ") and done.stderr.count("\n") == 1
    assert not list(tmp_path.rglob("*.flac")) or not list((tmp_path / "b").rglob("*.trans.txt"))
    assert run(tmp_path / "c", "--hours=0.001").returncode == 0
    assert "holds speech of other settings" in run(tmp_path / "c", "--hours=0.001", "--seed=1").stderr


def test_an_engine_that_is_not_installed(synthesis: dict[str, ModuleType], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ValueError, match="flite is not installed; run: apt install flite, or choose --engines"):
        synthesis["voices"].voices(["flite"], 2, 0)


def test_a_voice_of_a_package(synthesis: dict[str, ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Pitch changes the rate, and speed keeps the duration; letters are spelled."""
    (tmp_path / "hibari.py").write_text(
        "import numpy as np\n"
        "class Hibari:\n"
        "    said = []\n"
        "    def __init__(self, voice): assert voice == 'heart'\n"
        "    def __call__(self, text, speed):\n"
        "        self.said.append((text, speed))\n"
        "        return np.sin(2 * np.pi * 200 * np.arange(int(24000 / speed)) / 24000).astype(np.float32)\n"
    )
    voices = synthesis["voices"]
    with pytest.raises(ValueError, match="hibari is not installed; run: pip install hibari-tts, or choose --engines"):
        voices.voices(["hibari"], 2, 0)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert {each.name for each in voices.voices(["hibari"], 2, 0)} == {"heart"}
    wave = voices.Voice("hibari", "heart", 1.25, 1.0).say("B U OH ONE")
    assert len(wave) == pytest.approx(16000, abs=2)
    spectrum = np.abs(np.fft.rfft(wave))
    assert np.argmax(spectrum) * 16000 / len(wave) == pytest.approx(250, abs=1)
    from hibari import Hibari  # pyright: ignore[reportMissingImports]

    assert Hibari.said == [("B, U, oh one.", 0.8)]


def test_voices_are_the_same_for_the_same_seed(synthesis: dict[str, ModuleType], log: Path):
    voices = synthesis["voices"].voices
    first = voices(["espeak-ng"], 30, 1)
    assert first == voices(["espeak-ng"], 30, 1) and first[:7] == voices(["espeak-ng"], 7, 1)
    assert first != voices(["espeak-ng"], 30, 2) and len({*first}) == 30

"""The command of scripts/speak: synthetic speech in LibriSpeech's layout."""

import argparse
import os
import shutil
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from random import Random

import numpy as np
import soundfile
from tqdm import tqdm

from synthesis.texts import LISTED, RULES, lines_of, rules, sentences_of, texts, transcripts
from synthesis.voices import ENGINES, RATE, Voice, voices

FIRST = 100_001  # number of the first speaker, above LibriSpeech's
CHAPTER = 50  # recordings in a chapter


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="scripts/speak",
        description="Speaks texts with the voices of speech synthesizers and writes them as LibriSpeech does, to\n"
        "pretrain on: OUT/<speaker>/<chapter>/*.flac and *.trans.txt. The same command resumes.",
        epilog="example:\n  scripts/speak data/spoken --hours 20 --kinds digits numbers dates letters spelled \\\n"
        "    --words /usr/share/dict/words --exclude data/an4/dev",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = made.add_argument
    add("output", type=Path, metavar="OUT", help="folder for the speakers")
    add("--hours", type=float, default=1.0, metavar="H", help="hours of speech (default: 1)")
    add("--speakers", type=int, default=60, metavar="N", help="voice, pitch and speed are a speaker (default: 60)")
    add("--engines", nargs="+", choices=[*ENGINES], default=["espeak-ng", "flite"], help="default: espeak-ng flite")
    add("--kinds", nargs="+", choices=[*RULES, *LISTED], default=[*RULES], help=f"default: {' '.join(RULES)}")
    add("--words", nargs="+", type=Path, default=[], metavar="FILE", help="a word a line, for words and spelled")
    add("--text", nargs="+", type=Path, default=[], metavar="FILE", help="text, for sentences")
    add("--exclude", nargs="+", type=Path, default=[], metavar="DIR", help="data whose texts are not spoken")
    add("--seed", type=int, default=0, metavar="N", help="of voices and texts (default: 0)")
    return made


def main(arguments: Sequence[str] | None = None) -> None:
    given = parser().parse_args(arguments)
    try:
        speak(given)
    except (ValueError, OSError) as error:
        sys.exit(f"scripts/speak: error: {error}")
    except KeyboardInterrupt:
        print("stopped; the same command resumes", file=sys.stderr)
        sys.exit(130)


def speak(given: argparse.Namespace) -> None:
    """Writes chapters until there are so many hours; those that exist are kept."""
    if not 0 < given.hours <= 10_000 or not 1 <= given.speakers <= 100_000:
        raise ValueError("--hours must be > 0 and <= 10000, --speakers from 1 to 100000")
    speakers = voices(given.engines, given.speakers, given.seed)
    drawn = rules(given.kinds, lines_of(given.words), sentences_of(given.text))
    excluded, home = transcripts(given.exclude), given.output
    check_settings(home, given)
    lines = [f"{FIRST + index} | {voice.engine} | {voice.name} | {voice.pitch} | {voice.speed}"
             for index, voice in enumerate(speakers)]  # fmt: skip
    header = "; SPEAKER | ENGINE | VOICE | PITCH | SPEED"
    (home / "SPEAKERS.TXT").write_text("\n".join([header, *lines]) + "\n", encoding="utf-8")
    done, number = 0.0, 0
    with tqdm(total=given.hours, unit="h", ncols=79, disable=None, bar_format="{l_bar}{bar}| {n:.2f}/{total} h") as bar:
        while done < given.hours:
            index, chapter = number % len(speakers), number // len(speakers) + 1
            folder = home / str(FIRST + index) / str(chapter)
            if not folder.is_dir():
                draw = Random(f"{given.seed} {index} {chapter}")
                source = texts(drawn, excluded, draw)
                write_chapter(folder, speakers[index], [next(source) for _ in range(CHAPTER)])
            hours = sum(soundfile.info(path).duration for path in folder.glob("*.flac")) / 3600
            done, number = done + hours, number + 1
            bar.update(hours)
    print(f"{done:.2f} hours, {number * CHAPTER:,} recordings of {min(number, len(speakers))} speakers in {home}")


def check_settings(home: Path, given: argparse.Namespace) -> None:
    """ValueError if the folder holds speech made with other settings."""
    home.mkdir(parents=True, exist_ok=True)
    names = ("speakers", "engines", "kinds", "words", "text", "exclude", "seed")
    text = "\n".join(f"{name}: {' '.join(map(str, np.atleast_1d(getattr(given, name))))}" for name in names) + "\n"
    path = home / "settings.txt"
    if path.exists():
        if path.read_text(encoding="utf-8") != text:
            raise ValueError(f"{home} holds speech of other settings (see {path}); choose another folder")
    elif any(home.iterdir()):
        raise ValueError(f"{home} holds other files; choose another folder")
    path.write_text(text, encoding="utf-8")


def write_chapter(folder: Path, voice: Voice, said: Sequence[str]) -> None:
    """Writes a chapter aside and renames it into place."""
    speaker, chapter = folder.parent.name, folder.name
    aside = folder.parent / f".{chapter}.new"
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for index, samples in enumerate(pool.map(voice.say, said)):
            loudest = float(np.abs(samples).max())
            path = aside / f"{speaker}-{chapter}-{index:04d}.flac"
            soundfile.write(path, samples * (0.5 / loudest), RATE, subtype="PCM_16")
    lines = [f"{speaker}-{chapter}-{index:04d} {text}" for index, text in enumerate(said)]
    (aside / f"{speaker}-{chapter}.trans.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    os.replace(aside, folder)

"""Texts to speak, in capitals as LibriSpeech has them: digits, numbers, dates, letters, codes, words, sentences."""

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from random import Random

ONES = ["ZERO", "ONE", "TWO", "THREE", "FOUR", "FIVE", "SIX", "SEVEN", "EIGHT", "NINE"]
TEENS = ["TEN", "ELEVEN", "TWELVE", "THIRTEEN", "FOURTEEN", "FIFTEEN", "SIXTEEN", "SEVENTEEN", "EIGHTEEN", "NINETEEN"]
TENS = ["TWENTY", "THIRTY", "FORTY", "FIFTY", "SIXTY", "SEVENTY", "EIGHTY", "NINETY"]
MONTHS = [
    "JANUARY",
    "FEBRUARY",
    "MARCH",
    "APRIL",
    "MAY",
    "JUNE",
    "JULY",
    "AUGUST",
    "SEPTEMBER",
    "OCTOBER",
    "NOVEMBER",
    "DECEMBER",
]
DAYS = [
    "FIRST",
    "SECOND",
    "THIRD",
    "FOURTH",
    "FIFTH",
    "SIXTH",
    "SEVENTH",
    "EIGHTH",
    "NINTH",
    "TENTH",
    "ELEVENTH",
    "TWELFTH",
    "THIRTEENTH",
    "FOURTEENTH",
]
DAYS += ["FIFTEENTH", "SIXTEENTH", "SEVENTEENTH", "EIGHTEENTH", "NINETEENTH", "TWENTIETH"]
DAYS += [f"TWENTY {day}" for day in DAYS[:9]] + ["THIRTIETH", "THIRTY FIRST"]
ALPHABET = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def below_hundred(number: int) -> str:
    """An integer from 0 to 99 in words."""
    if number < 20:
        return (ONES + TEENS)[number]
    tens, one = divmod(number, 10)
    return TENS[tens - 2] + (f" {ONES[one]}" if one else "")


def digits(draw: Random) -> str:
    said = [
        "OH" if digit == "ZERO" and draw.random() < 0.4 else digit for digit in draw.choices(ONES, k=draw.randint(1, 7))
    ]
    return " ".join(said)


def numbers(draw: Random) -> str:
    hundreds = f"{below_hundred(draw.randint(1, 99))} HUNDRED"
    return draw.choice([" ".join(below_hundred(draw.randint(0, 99)) for _ in range(draw.randint(1, 3))), hundreds])


def dates(draw: Random) -> str:
    year = f"NINETEEN {below_hundred(draw.randint(10, 99))}"
    return f"{draw.choice(MONTHS)} {draw.choice(DAYS)}" + (f" {year}" if draw.random() < 0.7 else "")


def letters(draw: Random) -> str:
    return " ".join(draw.choices(ALPHABET, k=draw.randint(3, 8)))


def codes(draw: Random) -> str:
    return " ".join(draw.choices([*ALPHABET, *ONES], k=draw.randint(3, 8)))


RULES: dict[str, Callable[[Random], str]] = {
    "digits": digits,
    "numbers": numbers,
    "dates": dates,
    "letters": letters,
    "codes": codes,
}
LISTED = ("words", "spelled", "sentences")  # kinds that need a file


def cleaned(line: str) -> str:
    """A line in capitals, with letters, apostrophes and single spaces alone."""
    return " ".join(re.sub(r"[^A-Z' ]+", " ", line.upper().replace("\u2019", "'")).split())


def lines_of(paths: Iterable[Path]) -> list[str]:
    """The lines of files that hold words, cleaned, each once; ValueError if a file cannot be read or there are none."""
    found: dict[str, None] = {}
    for path in paths:
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"cannot read {path}: {error}") from None
        found |= dict.fromkeys(line for each in text.splitlines() if (line := cleaned(each)))
    return list(found)


def sentences_of(paths: Iterable[Path], most: int = 24) -> list[str]:
    """The sentences of files of up to so many words, cleaned."""
    joined = " ".join(path.read_text(encoding="utf-8") for path in paths)
    parts = (cleaned(part) for part in re.split(r"[.!?;:]+\s", joined))
    return list(dict.fromkeys(part for part in parts if 2 <= len(part.split()) <= most))


def rules(kinds: Sequence[str], words: Sequence[str], sentences: Sequence[str]) -> list[Callable[[Random], str]]:
    """The rule of each kind; ValueError if one has nothing to draw from."""
    lists: dict[str, Callable[[Random], str]] = {}
    if words:
        lists["words"] = lambda draw: " ".join(draw.choices(words, k=draw.randint(1, 4)))
        lists["spelled"] = lambda draw: " ".join(re.sub("[^A-Z]", "", draw.choice(words))[:12])
    if sentences:
        lists["sentences"] = lambda draw: draw.choice(sentences)
    known = RULES | lists
    if lacking := [kind for kind in kinds if kind not in known]:
        raise ValueError(f"kind {lacking[0]} needs {'--text' if lacking[0] == 'sentences' else '--words'} FILE")
    return [known[kind] for kind in kinds]


def transcripts(folders: Iterable[Path]) -> set[str]:
    """The texts of data in LibriSpeech's layout."""
    found: set[str] = set()
    for folder in folders:
        paths = sorted(folder.rglob("*.trans.txt"))
        if not paths:
            raise ValueError(f"{folder} has no *.trans.txt, so there is nothing to exclude")
        for path in paths:
            found |= {cleaned(line.partition(" ")[2]) for line in path.read_text(encoding="utf-8").splitlines()}
    return found


def texts(drawn: Sequence[Callable[[Random], str]], excluded: set[str], draw: Random) -> Iterator[str]:
    """Endless texts, the kinds in equal shares, none of them excluded; ValueError if all are."""
    tries = 0
    while True:
        if (text := draw.choice(drawn)(draw)) and text not in excluded:
            tries = 0
            yield text
        elif (tries := tries + 1) > 10_000:
            raise ValueError("nothing is left to say: every text is excluded")

"""Finds the length field in the headers of audio containers, for files whose header is wrong."""

import struct
from typing import BinaryIO, NamedTuple

CHUNKS = {b"RIFF": ("<I", b"data"), b"RIFX": (">I", b"data"), b"RF64": ("<I", b"data"), b"FORM": (">I", b"SSND")}
UNKNOWN = 0x7FFF0000  # programs that write into a pipe claim at least this many
MOST_CHUNKS = 1000
OGG_PAGE = 65307  # bytes of the largest page


class Length(NamedTuple):
    """The bytes of audio that a header claims, None if unknown, and those that exist. `place` is the offset of the
    number in the file, `form` its format for `struct`."""

    place: int
    form: str
    promised: int | None
    found: int

    @property
    def wrong(self) -> bool:
        """Whether the claimed number is not that of the file."""
        return self.promised is None or self.promised > self.found

    @property
    def corrected(self) -> bytes:
        return struct.pack(self.form, min(self.found, 0xFFFFFFFE))


def length_of(file: BinaryIO, size: int) -> Length | None:
    """The length that a WAV, RF64, AIFF, AU or CAF file of `size` bytes claims; None for other and broken formats."""
    file.seek(0)
    head = file.read(36)
    if head[:4] in CHUNKS:
        form, wanted = CHUNKS[head[:4]]
        start = 12
    elif head[:4] == b"caff":
        form, wanted, start = ">q", b"data", 8
    elif head[:4] == b".snd" and len(head) >= 12:
        at, promised = struct.unpack(">II", head[4:12])
        return _length(file, 8, ">I", promised, at, size)
    else:
        return None
    wide = head[:4] == b"RF64" and head[12:16] == b"ds64" and len(head) == 36
    width = struct.calcsize(form)
    for _ in range(MOST_CHUNKS):
        file.seek(start)
        chunk = file.read(4 + width)
        if len(chunk) < 4 + width:
            return None
        promised = struct.unpack(form, chunk[4:])[0]
        if chunk[:4] == wanted:
            place = start + 4
            if wide and promised == 0xFFFFFFFF:
                place, form, promised = 28, "<Q", struct.unpack("<Q", head[28:36])[0]
            return _length(file, place, form, promised, start + 4 + width, size)
        if promised < 0:
            return None
        start += 4 + width + promised + (promised % 2 if width == 4 else 0)
    return None


def _length(file: BinaryIO, place: int, form: str, promised: int, start: int, size: int) -> Length:
    found = max(0, size - start)
    if promised == 0:
        unknown = found > 0 and not _chunks_follow(file, start, size)
    else:
        unknown = promised < 0 or promised >= (UNKNOWN if form[1] == "I" else 1 << 62)
    return Length(place, form, None if unknown else promised, found)


def _chunks_follow(file: BinaryIO, start: int, size: int) -> bool:
    """Whether a chunk without audio is followed by another chunk, not by audio."""
    file.seek(start)
    head = file.read(8)
    if len(head) < 8 or not head[:4].isascii() or not head[:4].decode().isprintable():
        return False
    return any(struct.unpack(form, head[4:])[0] <= size - start - 8 for form in ("<I", ">I"))


def ogg_ends(file: BinaryIO, size: int) -> bool:
    """Whether the last page of an ogg file is complete and marked as the last."""
    file.seek(max(0, size - 2 * OGG_PAGE))
    end = file.read()
    last = end.rfind(b"OggS")
    if last < 0 or len(end) < last + 27:
        return False
    segments = end[last + 27 : last + 27 + end[last + 26]]
    whole = len(end) >= last + 27 + end[last + 26] + sum(segments)
    return whole and bool(end[last + 5] & 4)

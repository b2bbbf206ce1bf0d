"""Frames of videos: upright, each at its time; and files that are not whole videos."""

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("av")

from filming import CODECS, film, picture, sound, turned  # noqa: E402
from zoo.inputs.videos import UnreadableVideo, Video, is_video  # noqa: E402


def read(path: Path) -> tuple[list[np.ndarray], list[float], str | None]:
    with Video(str(path)) as video:
        frames = list(video)
    return [np.asarray(each.image, dtype=int) for each in frames], [each.time for each in frames], video.fault


@pytest.mark.parametrize("suffix", CODECS)
def test_a_film_gives_its_frames(tmp_path: Path, suffix: str):
    path = film(tmp_path / f"film{suffix}")
    images, times, fault = read(path)
    assert fault is None and len(images) == 30 and is_video(str(path))
    assert times == pytest.approx([number / 25 for number in range(30)], abs=0.002)
    for number, image in enumerate(images):
        wanted = picture(number, 64, 48)
        assert image.shape == (48, 64, 3) and np.abs(image - wanted).mean() < (30 if suffix == ".gif" else 6)
    with Video(str(path)) as video:
        assert video.number in (None, 30)


def test_frames_keep_their_times(tmp_path: Path):
    times = [0.5, 0.52, 0.9, 1.4, 1.401, 7.0]
    _, found, fault = read(film(tmp_path / "film.mp4", times=times))
    assert fault is None and found == pytest.approx([time - 0.5 for time in times], abs=1e-3)


@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
def test_a_last_frame_that_is_shown_for_long_is_no_cut(tmp_path: Path, suffix: str):
    path = film(tmp_path / f"film{suffix}", times=[0.0, 0.04, 0.08], last=20.0)
    images, times, fault = read(path)
    assert fault is None and len(images) == 3 and times[-1] == pytest.approx(0.08, abs=1e-3)


@pytest.mark.parametrize("quarters", range(4))
def test_a_turned_film_is_upright(tmp_path: Path, quarters: int):
    images, _, fault = read(turned(film(tmp_path / "film.mp4", frames=2), quarters))
    wanted = np.rot90(picture(0, 64, 48), -quarters)
    assert fault is None and images[0].shape == wanted.shape and np.abs(images[0] - wanted).mean() < 6


@pytest.mark.parametrize("size", [(1, 1), (3, 5), (2, 64), (33, 47)])
def test_any_size_is_read(tmp_path: Path, size: tuple[int, int]):
    images, _, fault = read(film(tmp_path / "film.gif", frames=3, size=size))
    assert fault is None and [each.shape for each in images] == [(size[1], size[0], 3)] * 3


@pytest.mark.parametrize("suffix", [".mkv", ".webm", ".avi"])
def test_what_a_file_that_is_cut_off_holds_is_read(tmp_path: Path, suffix: str):
    path = film(tmp_path / f"film{suffix}", frames=60)
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 3 // 4])
    images, _, fault = read(path)
    assert 0 < len(images) < 60 and fault is not None and fault.startswith("the file is cut off: it ends at ")


def test_what_can_be_decoded_of_a_broken_file_is_read(tmp_path: Path):
    path = film(tmp_path / "film.mp4", frames=60)
    values = bytearray(path.read_bytes())
    middle = len(values) // 3
    values[middle : middle + 80] = bytes(range(80))
    path.write_bytes(values)
    images, _, fault = read(path)
    assert 0 < len(images) < 60 and fault is not None and "\n" not in fault


def write_pipe(path: Path) -> None:
    os.mkfifo(path)


NO_VIDEOS = {
    "empty": (lambda path: path.write_bytes(b""), "the file is empty"),
    "text": (lambda path: path.write_text("no video"), "not a video (MP4, MOV, "),
    "image": (lambda path: Image.new("RGB", (8, 8)).save(path, "PNG"), "not a video (MP4, MOV, "),
    "audio": (sound, "the file has no video stream"),
    "header": (lambda path: path.write_bytes(film(path).read_bytes()[:900]), "not a video (MP4, "),
    "pipe": (write_pipe, "not a regular file"),
    "missing": (lambda path: None, "No such file or directory"),
}


@pytest.mark.parametrize("kind", NO_VIDEOS)
def test_what_is_no_video_is_refused_in_one_line(tmp_path: Path, kind: str):
    write, message = NO_VIDEOS[kind]
    write(tmp_path / "film.mp4")
    with pytest.raises(UnreadableVideo) as error:
        Video(str(tmp_path / "film.mp4"))
    text = str(error.value).removeprefix(f"{tmp_path}/film.mp4: ")
    assert text.startswith(message) and "\n" not in text


def test_a_playlist_opens_no_other_file(tmp_path: Path):
    film(tmp_path / "secret.mp4")
    lines = ["#EXTM3U", "#EXT-X-TARGETDURATION:10", "#EXTINF:10,", "secret.mp4", "#EXT-X-ENDLIST"]
    (tmp_path / "film.mp4").write_text("\n".join(lines))
    (tmp_path / "list.mp4").write_text("ffconcat version 1.0\nfile secret.mp4\n")
    for name in ("film.mp4", "list.mp4"):
        with pytest.raises(UnreadableVideo, match="not a video"):
            Video(str(tmp_path / name))


@pytest.mark.parametrize("name", [b"with:colon %03d.mp4", b"not \xff Unicode.mp4", "犬\n.mp4".encode()])
def test_any_name_is_read(tmp_path: Path, name: bytes):
    path = film(tmp_path / "film.mp4", frames=2)
    renamed = Path(os.fsdecode(os.fsencode(tmp_path) + b"/" + name))
    path.rename(renamed)
    assert len(read(renamed)[0]) == 2


def test_a_gif_of_one_frame_is_an_image(tmp_path: Path):
    Image.new("RGB", (8, 8)).save(tmp_path / "still.gif")
    (tmp_path / "broken.gif").write_bytes(b"GIF89a")
    os.mkfifo(tmp_path / "pipe.gif")
    assert not is_video(str(tmp_path / "pipe.gif"))
    assert not is_video(str(tmp_path / "still.gif")) and not is_video(str(tmp_path / "broken.gif"))
    assert is_video("any/FILM.MP4") and not is_video("any/photo.jpg")

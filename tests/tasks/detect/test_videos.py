"""`zoo detect predict` on videos: what is written, and every file that is not a whole video."""

import csv
import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

av = pytest.importorskip("av")

from detecting import saved  # noqa: E402
from filming import film, turned  # noqa: E402
from training import refused  # noqa: E402
from zoo.__main__ import main  # noqa: E402
from zoo.inputs import videos as inputs  # noqa: E402
from zoo.inputs.videos import Video  # noqa: E402
from zoo.outputs.label_map import LabelMap  # noqa: E402
from zoo.tasks.detect import videos  # noqa: E402
from zoo.tasks.detect.answers import Detector  # noqa: E402
from zoo.weights import load_checkpoint  # noqa: E402

LABELS = LabelMap(("cat\nor two", "犬", "a very long name of a category"), (7, 3, 90))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return saved(tmp_path_factory.mktemp("checkpoint") / "model", LABELS, 32)


@pytest.fixture(autouse=True)
def beside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def predict(*arguments: Any) -> None:
    main(["detect", "predict", *map(str, arguments), "--device", "cpu", "--output", "out"])


def fails(*arguments: Any) -> str:
    return refused("detect", "predict", *arguments, "--device", "cpu", "--output", "out")


def written() -> dict[str, Any]:
    return json.loads(Path("out/detections.json").read_text())


def left() -> set[str]:
    return {path.name for path in Path("out").iterdir()}


RESULTS = {"detections.json", "detections.csv", "detections.png"}


@pytest.mark.parametrize("batch", [1, 4])
def test_what_is_written_of_a_video(model: str, batch: int, capsys: pytest.CaptureFixture[str]):
    times = [0.0, 0.04, 0.2, 0.21, 1.0]
    film(Path("clip.mov"), times=times)
    Image.new("RGB", (40, 30), "red").save("photo.png")
    predict(model, "clip.mov", "photo.png", "--threshold", "0.2", "--batch", batch)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 and lines[1].startswith("clip.mov  5 frames in 1.0 s; in one frame at most ")
    assert left() == RESULTS | {"clip.mp4"}
    found = written()
    frames = [each for each in found["images"] if "frame" in each]
    assert [each["file_name"] for each in found["images"]] == ["photo.png"] + ["clip.mov"] * 5
    assert [each["id"] for each in found["images"]] == [1, 2, 3, 4, 5, 6]
    assert [each["frame"] for each in frames] == [0, 1, 2, 3, 4]
    assert [each["time"] for each in frames] == pytest.approx(times, abs=1e-3)
    assert {(each["width"], each["height"]) for each in frames} == {(64, 48)}
    checkpoint = load_checkpoint(model)
    with Video("clip.mov") as video:
        originals = list(video)
    for each, original in zip(frames, originals, strict=True):
        wanted = [each for each in checkpoint(original.image) if each.score >= 0.2]
        got = [other for other in found["annotations"] if other["image_id"] == each["id"]]
        assert [each["score"] for each in got] == pytest.approx([each.score for each in wanted], abs=1e-4)
    with open("out/detections.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert sum(bool(row["score"]) for row in rows) == len(found["annotations"]) > 5
    assert {row["frame"] for row in rows if row["path"] == "clip.mov"} == {"0", "1", "2", "3", "4"}
    assert {(row["frame"], row["time"]) for row in rows if row["path"] == "photo.png"} == {("", "")}
    with Video("out/clip.mp4") as video:
        annotated = list(video)
    assert [each.time for each in annotated] == pytest.approx(times, abs=1e-3)
    for each, original in zip(annotated, originals, strict=True):
        assert each.image.size == (64, 48)
        apart = np.abs(np.asarray(each.image, dtype=int) - np.asarray(original.image, dtype=int)).mean()
        assert apart > 3  # boxes and names


def test_a_video_without_objects_is_copied(model: str, capsys: pytest.CaptureFixture[str]):
    film(Path("clip.mp4"), frames=3, size=(34, 48))
    predict(model, "clip.mp4", "--threshold", "1")
    assert "3 frames in 0.1 s; in one frame at most no objects" in capsys.readouterr().out
    assert written()["annotations"] == [] and len(written()["images"]) == 3
    with Video("clip.mp4") as one, Video("out/clip.mp4") as other:
        for before, after in zip(one, other, strict=True):
            assert np.abs(np.asarray(before.image, dtype=int) - np.asarray(after.image, dtype=int)).mean() < 6


@pytest.mark.parametrize("size", [(1, 1), (33, 47), (3, 200)])
def test_odd_sizes_get_one_more_row_or_column(model: str, size: tuple[int, int]):
    film(Path("clip.gif"), frames=2, size=size)
    predict(model, "clip.gif")
    with Video("out/clip.mp4") as video:
        sizes = {each.image.size for each in video}
    assert sizes == {(size[0] + size[0] % 2, size[1] + size[1] % 2)}
    assert {(each["width"], each["height"]) for each in written()["images"]} == {size}


def test_a_turned_video_is_written_upright(model: str):
    turned(film(Path("clip.mp4"), frames=2), 1)
    predict(model, "clip.mp4", "--threshold", "1")
    with Video("out/clip.mp4") as video:
        (first, _) = video
    values = np.asarray(first.image)
    assert values.shape == (64, 48, 3) and values[5, -5, 0] > 200 and values[5, 5, 0] < 100


def test_a_video_that_is_cut_off_gives_what_it_holds(model: str, capsys: pytest.CaptureFixture[str]):
    path = film(Path("clip.mkv"), frames=60)
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 3 // 4])
    Path("broken.mp4").write_bytes(b"no video")
    film(Path("whole.avi"), frames=2)
    assert fails(model, ".") == "2 of 3 files had an error"
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("zoo: ")]
    assert len(errors) == 3 and errors[2].startswith("zoo: 1 of 3 files done; wrote ")
    assert left() == RESULTS | {"clip.mp4", "whole.mp4"}
    found = [each for each in written()["images"] if each["file_name"] == "./clip.mkv"]
    assert 1 < len(found) < 61 and "error" in found[-1] and "frame" in found[0]
    with Video("out/clip.mp4") as video:
        assert len(list(video)) == len(found) - 1 and video.fault is None


def test_files_that_are_no_videos_write_nothing(model: str):
    Path("a.mp4").write_bytes(b"no video")
    assert fails(model, "a.mp4") == "no prediction for the file; nothing was written to out"
    assert left() == set()


def test_names_never_collide(model: str):
    Path("a").mkdir()
    Path("b").mkdir()
    for path in ("a/clip.mp4", "b/clip.mp4", "b/clip.avi"):
        film(Path(path), frames=1 + len(path) % 3)
    predict(model, "a", "b")
    assert left() == RESULTS | {"clip.mp4", "clip-2.mp4", "clip-3.mp4"}


def test_a_video_is_never_replaced_by_its_result(model: str):
    Path("out").mkdir()
    before = film(Path("out/clip.mp4"), frames=2).read_bytes()
    for given in ("out/clip.mp4", "out"):
        assert fails(model, given).startswith("out/clip.mp4 is one of the videos and would be replaced")
    Path("link.mp4").symlink_to("out/clip.mp4")
    Path("sub").mkdir()
    shutil.copy("out/clip.mp4", "sub/clip.mp4")
    assert fails(model, "link.mp4", "sub").startswith("out/clip.mp4 is one of the videos")
    assert Path("out/clip.mp4").read_bytes() == before and left() == {"clip.mp4"}


def test_a_second_run_does_not_take_the_results_of_the_first(model: str):
    film(Path("clip.mp4"), frames=2)
    for _ in range(2):
        predict(model, ".")
        assert left() == RESULTS | {"clip.mp4"} and len(written()["images"]) == 2


def test_without_the_package_images_are_still_done(
    model: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    film(Path("clip.mp4"), frames=2)
    Image.new("RGB", (40, 30)).save("photo.png")
    monkeypatch.setattr(inputs, "find_spec", lambda name: None)
    assert fails("no such checkpoint", "clip.mp4") == 'videos need av; run: pip install "zoo[video]"'
    assert fails(model, ".") == "1 of 2 files had an error"
    assert './clip.mp4: videos need av; run: pip install "zoo[video]"' in capsys.readouterr().err
    assert len(written()["images"]) == 2 and left() == RESULTS


def test_only_a_batch_of_frames_is_held(model: str, monkeypatch: pytest.MonkeyPatch):
    film(Path("clip.mp4"), frames=23)
    read, seen = [0], []
    frames, answers = Video.__iter__, Detector.__call__

    def counted(video: Video) -> Any:
        for frame in frames(video):
            read[0] += 1
            yield frame

    def call(detector: Detector, parts: list[Any]) -> Any:
        seen.append((len(parts), read[0]))
        return answers(detector, parts)

    monkeypatch.setattr(Video, "__iter__", counted)
    monkeypatch.setattr(Detector, "__call__", call)
    predict(model, "clip.mp4", "--batch", "5")
    assert [each for each in seen if each[0]] == [(5, 5), (5, 10), (5, 15), (5, 20), (3, 23)]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_stop_while_writing_leaves_no_half_file(model: str, monkeypatch: pytest.MonkeyPatch, error: BaseException):
    film(Path("clip.mp4"), frames=20)
    predict(model, "clip.mp4")
    before = Path("out/clip.mp4").read_bytes()
    calls = iter(range(100))

    def stop(*given: Any) -> Any:
        if next(calls) == 10:
            raise error
        return annotated(*given)

    annotated = videos.annotated
    monkeypatch.setattr(videos, "annotated", stop)
    with pytest.raises(SystemExit):
        predict(model, "clip.mp4")
    assert left() == RESULTS | {"clip.mp4"} and Path("out/clip.mp4").read_bytes() == before


def test_an_encoder_that_fails_is_one_line(model: str, monkeypatch: pytest.MonkeyPatch):
    film(Path("clip.mp4"), frames=3)
    monkeypatch.setattr(videos, "CODECS", ("gif",))
    assert fails(model, "clip.mp4").startswith("cannot write out/clip.mp4: ")
    assert left() == set()


def test_a_frame_that_the_model_cannot_take_ends_its_video(
    model: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    film(Path("clip.mp4"), frames=6)
    answers = Detector.__call__

    def odd(detector: Detector, parts: list[Any]) -> Any:
        return [ValueError("no\nfinite score") if n == 3 else each for n, each in enumerate(answers(detector, parts))]

    monkeypatch.setattr(Detector, "__call__", odd)
    assert fails(model, "clip.mp4") == "1 of 1 file had an error"
    assert "zoo: clip.mp4: frame 3: no finite score" in capsys.readouterr().err
    assert [each.get("frame") for each in written()["images"]] == [0, 1, 2, None]
    with Video("out/clip.mp4") as video:
        assert len(list(video)) == 3


@pytest.mark.parametrize("codec", videos.CODECS)
def test_frames_of_other_sizes_and_times_that_run_back_are_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, codec: str
):
    monkeypatch.setattr(videos, "CODECS", (codec,))
    with videos.Writer(tmp_path / "clip.mp4") as writer:
        for size, time in (((31, 20), 0.0), ((64, 64), 0.5), ((8, 90), 0.5), ((31, 20), 0.1)):
            writer.add(Image.new("RGB", size, "white"), time)
    with Video(str(tmp_path / "clip.mp4")) as video:
        frames = list(video)
    assert video.fault is None and [each.time for each in frames] == pytest.approx([0.0, 0.5, 0.5, 0.5], abs=1e-3)
    assert all(each.image.size == (32, 20) and np.asarray(each.image)[:, :30].min() > 240 for each in frames)
    assert [path.name for path in tmp_path.iterdir()] == ["clip.mp4"]


def test_names_and_scores_are_drawn_inside_the_image():
    image = Image.new("RGB", (60, 20))
    objects = [{"label": "犬\n", "score": 0.5, "box": box} for box in ([0, 0, 59, 19], [60, 20, 60, 20], [3, 3, 3, 9])]
    drawn = videos.annotated(image, objects, {"犬\n": "#ff0000"})
    assert drawn.size == image.size and not np.asarray(image).any()
    assert (np.asarray(drawn)[:, :, 0] == 255).sum() > 60


def test_results_of_a_name_that_is_not_unicode(model: str):
    path = os.fsdecode(b"clip \xff.mp4")
    film(Path("clip.mp4"), frames=2).rename(path)
    predict(model, path)
    assert left() == RESULTS | {path}


def test_the_help_fits_a_screen(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        main(["detect", "predict", "--help"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 24 and max(map(len, lines)) <= 80

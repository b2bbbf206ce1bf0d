"""`zoo classify predict`: classifies images; writes lines, JSON, CSV and an image."""

from pathlib import Path

from zoo.tasks import predicting as files
from zoo.tasks.predicting import Parser, count

FILES = ("predictions.json", "predictions.csv", "predictions.png")
COLUMNS = ("path", "label", "probability", "index", "error")


def parser() -> Parser:
    made = Parser(
        "zoo classify predict",
        "Classifies images: prints path, label and probability of each,\nand writes "
        f"{', '.join(FILES)}.\nAn image that cannot be read is reported, and the exit status is then 1.",
        "zoo classify predict vit_micro.digits photos/ scan.png",
    )
    made.add_argument("name", metavar="NAME", help=files.NAME)
    made.add_argument("paths", metavar="PATH", nargs="+", help="an image, or a folder to search for images")
    files.add_options(made)
    files.add_maps(made)
    made.add_argument("--top", metavar="N", type=count, default=5, help="labels per image in the JSON (default: 5)")
    made.add_rare("--batch", metavar="N", type=count, default=32, help="images per batch (default: 32)")
    return made


def main(arguments: list[str]) -> None:
    """Classifies images as given by the arguments. ValueError at the end if one had an error."""
    given = parser().parse_intermixed_args(arguments)
    from zoo.inputs.images import EXTENSIONS
    from zoo.tasks.classify import answers, maps
    from zoo.tasks.maps import check_weights

    output, device = Path(given.output).expanduser(), files.device_for(given.device)
    paths = files.find_files(given.paths, EXTENSIONS, "image", [output / FILES[2], output / files.MAPS])
    found = files.load_for("classify", given.name)
    if given.maps:
        check_weights(found.model, given.name)
    files.make_output(output)  # before the work, so that a bad name fails early

    answer = answers.classifier(found, given.top, given.precision, device)
    entries, shown = answers.predict(paths, answer, given.batch)
    if not shown:
        raise files.nothing_done(output, entries, "image")
    draws = {FILES[2]: lambda: answers.draw(entries, shown)}
    if given.maps:
        draws[files.MAPS] = lambda: maps.draw(entries, shown, answer)
    written = files.write(output, FILES[:2], COLUMNS, entries, draws)
    files.finish(output, written, entries, "image")

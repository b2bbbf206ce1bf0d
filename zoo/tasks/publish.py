"""`zoo publish`: uploads a checkpoint to the Hugging Face Hub, and its page if asked."""

import argparse
from collections.abc import Sequence


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="zoo publish",
        description="Uploads a checkpoint to the Hugging Face Hub in one commit, after its probe has passed;\n"
        "downloads and checks it again; and prints its address. It can be repeated after an\ninterruption.",
        epilog="example:\n  zoo publish vit_micro.digits OWNER/vit_micro.digits --dry-run",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    made.add_argument("name", metavar="NAME", help="a checkpoint: a folder, or a name under checkpoints/")
    made.add_argument("repository", metavar="OWNER/NAME", help="its name on the Hub; created if it does not exist")
    made.add_argument("--dry-run", action="store_true", help="print what would be uploaded, and ask the Hub nothing")
    page = "also put the page of `zoo page` into a static Space of the same name, which costs nothing to run"
    made.add_argument("--page", action="store_true", help=page)
    made.add_argument("--runtime", metavar="DIR", help="with --page: as in `zoo page`")
    made.add_argument("--webgpu", action="store_true", help="with --page: as in `zoo page`")
    made.add_argument("--pr", action="store_true", help="open a pull request in an existing repository")
    made.add_argument("--tag", metavar="TAG", help="tag of this upload, to load it as OWNER/NAME@TAG")
    made.add_argument("--message", metavar="TEXT", help="title of the commit or the pull request")
    made.add_argument("--private", action="store_true", help="create the repository and the Space as private")
    return made


def main(arguments: Sequence[str] | None = None) -> None:
    """Uploads as given by the arguments, and prints the addresses. ValueError or OSError of one line otherwise."""
    given = vars(parser().parse_args(arguments))
    page, runtime, webgpu, pr = (given.pop(name) for name in ("page", "runtime", "webgpu", "pr"))
    if page and pr:
        raise ValueError("a pull request has no page; publish with --page after it is merged")
    if (runtime is not None or webgpu) and not page:
        raise ValueError(f"{'--webgpu' if webgpu else '--runtime'} is for --page")
    if page:
        from zoo.tasks.page.command import Options
        from zoo.tasks.page.space import publish_with_page

        print(publish_with_page(**given, options=Options(runtime=runtime, webgpu=webgpu)))
    else:
        from zoo.weights.hub import publish

        print(publish(**given, pr=pr))

"""Arguments of training: which config is read, and errors in plain words."""

from pathlib import Path

import pytest

from zoo.tasks.arguments import completed, option, translated


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        ("fit --model.rate=1", "fit --model.rate=1"),
        ("fit --ckpt_path RUN", "fit --config RUN/config.yaml --trainer.default_root_dir=RUN STATE"),
        ("fit --ckpt_path=RUN/resume/last.ckpt", "fit --config RUN/config.yaml --trainer.default_root_dir=RUN STATE"),
        ("fit --config x.yaml --ckpt_path=RUN", "fit --config x.yaml STATE"),
        ("fit --ckpt_path last --trainer.default_root_dir RUN", "fit --config RUN/config.yaml STATE"),
        ("fit --ckpt_path last --config RUN/mine.yaml", "fit --config RUN/mine.yaml STATE"),
        ("fit -c RUN/mine.yaml --ckpt_path last", "fit -c RUN/mine.yaml STATE"),
        (
            "fit -c RUN/mine.yaml --ckpt_path last --trainer.default_root_dir=RUN/x",
            "fit --ckpt_path=null",  # nothing to resume there, so it starts
        ),
        ("fit -c=RUN/mine.yaml --ckpt_path RUN", "fit -c=RUN/mine.yaml STATE"),
        ("fit --ckpt_path RUN/other", "fit --ckpt_path RUN/other"),
        ("fit --model.weights RUN/best", "fit --model.weights RUN/best"),
        ("test --model.weights=RUN/best", "test --config RUN/config.yaml --model.weights=RUN/best"),
        ("validate --model.weights RUN/best --config=x.yaml", "validate --model.weights RUN/best --config=x.yaml"),
        ("validate --model.weights owner/name", "validate --model.weights owner/name"),
    ],
)
def test_which_config_is_read(arguments: str, wanted: str, tmp_path: Path):
    """What stands later wins, so a flag that is given wins over the config."""
    (tmp_path / "resume").mkdir()
    for name in ("config.yaml", "resume/last.ckpt"):
        (tmp_path / name).write_text("")
    (tmp_path / "mine.yaml").write_text(f"trainer: {{default_root_dir: {tmp_path}}}")
    found = completed("classify", arguments.replace("RUN", str(tmp_path)).split())
    paths = {"RUN": str(tmp_path), "STATE": f"--ckpt_path={tmp_path}/resume/last.ckpt"}
    words = wanted.replace("STATE", paths["STATE"]).replace("RUN", paths["RUN"]).split()
    assert [word for word in words if word not in found] == [] and found[0] == words[0]
    assert [word for word in found if word.startswith("--config")] == [w for w in words if w.startswith("--config")]
    assert option(found, "ckpt_path") == option(words, "ckpt_path")


@pytest.mark.parametrize(
    ("message", "wanted"),
    [
        (
            "Parser key \"model.rate\":\n  Expected a <class 'float'>. Got value: fast",
            "--model.rate must be a number, got fast",
        ),
        ("Subcommand 'fit' does not accept option 'data.mode'", "unknown option --data.mode"),
        ("argument --data.size: expected one argument", "--data.size: expected one argument"),
        ("Unrecognized arguments: stray", "Unrecognized arguments: stray"),
        ('Parser key "x": anything else', "--x: anything else"),
    ],
)
def test_errors_of_the_parser_in_plain_words(message: str, wanted: str):
    assert translated(message) == wanted

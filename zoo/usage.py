"""What `zoo TASK --help` and `zoo TASK VERB --help` print, without importing PyTorch."""

from zoo.quick import columns, facts

VERBS = {
    "fit": "train a model",
    "validate": "measure a model on the validation data",
    "test": "measure a model on the test data",
    "predict": "run a model on your own files",
    "stream": "transcribe audio while it arrives",
    "sample": "draw images from a model",
    "encode": "write the latents of images, to train on them",
    "export": "write a model as an ONNX file",
}
EXAMPLES = {
    "classify": ["--config configs/classify/vit_micro_digits.yaml"],
    "detect": ["--config configs/detect/rtdetr_micro_bccd.yaml", "--data.root DIR"],
    "generate": ["--config configs/generate/dit_micro_digits.yaml"],
    "transcribe": ["--config configs/transcribe/squeezeformer_micro_fsdd.yaml", "--data.root DIR"],
}
# The options in short help, if the task has them, each in a line of 80 columns; the others are in --help-all.
USUAL = {
    "config": "YAML file of options; later ones replace them",
    "model.backbone.name": "the model; `zoo list` shows the names",
    "model.backbone.FIELD": "mixer, norm, classes, ...; see `zoo info NAME`",
    "model.weights": "checkpoint to start from or to measure",
    "model.samples": "samples to compare with images",
    "model.features": "checkpoint whose features compare them",
    "model.rate": "peak learning rate",
    "data.dataset": "kind of data, as in configs/",
    "data.root": "folder of the data",
    "data.train": "folders or manifests to train on",
    "data.val": "folders or manifests for validation",
    "data.size": "side of the images in pixels",
    "data.batch": "samples in a batch",
    "data.seconds": "seconds of audio in a batch",
    "trainer.max_epochs": "number of epochs",
    "trainer.default_root_dir": "folder of the run: logs, checkpoints, state",
    "ckpt_path": "run to resume or to measure: RUN, or its state",
}
FIT_ONLY = ("model.rate", "data.train", "trainer.max_epochs")
MEASURE_ONLY = ("model.samples", "model.features")


def task_help(task: str) -> str:
    """What `zoo TASK --help` prints."""
    found = facts()["tasks"][task]
    about = VERBS | ({"predict": "add noise to images and restore them"} if task == "generate" else {})
    verbs = [(verb, about.get(verb, "")) for verb in found["verbs"]]
    lines = [f"usage: zoo {task} VERB [OPTIONS]", "", f"{found['about']}.", "", "verbs:", *columns(verbs), ""]
    lines += [f"`zoo {task} VERB --help` shows the options of a verb.", "", "example:"]
    return "\n".join([*lines, example(task, "fit")])


def verb_help(task: str, verb: str) -> str:
    """What `zoo TASK fit --help` prints: the options that are used most."""
    found = facts()["tasks"][task]
    options = found["options"] | found["own"][verb]
    pairs = []
    for name, said in USUAL.items():
        given = options.get(name)
        elsewhere = MEASURE_ONLY if verb == "fit" else FIT_ONLY
        if (given is None and not name.startswith("model.backbone.")) or name in elsewhere:
            continue
        default = (given or {}).get("default")
        pairs.append((f"--{name}", said + (f" [default: {default}]" if default is not None else "")))
    lines = [
        f"usage: zoo {task} {verb} [--config FILE] [--OPTION VALUE ...]",
        "",
        f"{found['about']}: {VERBS[verb]}.",
        "",
    ]
    lines += ["most used options (--help-all shows every option):", *columns(pairs), "", "example:"]
    return "\n".join([*lines, example(task, verb)])


def example(task: str, verb: str) -> str:
    """A command that trains by a recipe, over two lines if it is long, or that measures a checkpoint."""
    usual = [f"--config configs/{task}/NAME.yaml"] if verb == "fit" else ["--model.weights RUN/best"]
    first, *more = EXAMPLES.get(task, usual) if verb == "fit" else usual
    return f"  zoo {task} {verb} {first}" + (f" \\\n      {' '.join(more)}" if more else "")

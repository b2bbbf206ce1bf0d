"""`zoo TASK fit|validate|test`: LightningCLI, with one folder for all that a run leaves behind."""

import io
import logging
import os
import pickle
import warnings
from pathlib import Path
from typing import Any

import lightning
import torch
from jsonargparse import ArgumentError
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback, LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.cli import LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.plugins.io import CheckpointIO
from lightning.pytorch.utilities import rank_zero_only

from zoo.layer import unfinished
from zoo.tasks.task import Task
from zoo.text import one_line, reason
from zoo.weights import save_model

# Warnings of Lightning about what is meant to be so.
NOISE = (
    "LightningCLI's args parameter",
    ".*isinstance.treespec, LeafSpec",
    ".*in eval mode at the start",
    "Be aware that when using `ckpt_path`, callbacks",
    "Checkpoint directory .* exists and is not empty",
)


def no_advertisement(record: logging.LogRecord) -> bool:
    return "litlogger" not in record.getMessage()


class Keep(Callback):
    """After every validation writes the measured model as a checkpoint of the zoo: `last`, and `best` by the score.

    While a layer has not reached its final form (prepbn still blends), there is no `best`.
    """

    def __init__(self, folder: Path, score: str, mode: str) -> None:
        self.folder, self.score, self.sign = folder, score, 1.0 if mode == "max" else -1.0
        self.best = -self.sign * float("inf")

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.best = state_dict["best"]

    def on_validation_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        assert isinstance(pl_module, Task)
        if not pl_module.fitting or trainer.fast_dev_run:  # pyright: ignore[reportAttributeAccessIssue]
            return
        value = float(trainer.callback_metrics[self.score])
        # While a layer still changes its form, the model is not yet what is trained.
        better = self.sign * value > self.sign * self.best and not unfinished(pl_module.measured)
        if better:
            self.best = value
        for name in ("last", "best") if better else ("last",):
            self.save(trainer, pl_module, name, value)

    @rank_zero_only
    def save(self, trainer: lightning.Trainer, task: Any, name: str, value: float) -> None:
        assert isinstance(task, Task)
        data: Any = trainer.datamodule  # pyright: ignore[reportAttributeAccessIssue]
        save_model(
            task.measured,
            self.folder / name,
            preset=task.preset,
            preprocess=data.preprocess,
            labels=task.labels,
            source=f"trained by zoo on {data.dataset}, epoch {trainer.current_epoch + 1}",
            metrics={self.score: round(value, 4)},
        )


class States(CheckpointIO):
    """The files that a run goes on from: written aside and renamed, read as tensors and numbers and never as code."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | os.PathLike[str], storage_options: Any = None
    ) -> None:
        target = Path(path)
        aside = target.with_name(f".{target.name}.new")
        fate = "the previous one is untouched" if target.exists() else "nothing was left behind"
        buffer = io.BytesIO()
        torch.save(checkpoint, buffer)
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with open(aside, "wb") as file:
                file.write(buffer.getbuffer())
                file.flush()
                os.fsync(file.fileno())
            os.replace(aside, target)
        except OSError as error:
            raise OSError(f"cannot write {target}: {reason(error)}; {fate}") from error
        finally:
            aside.unlink(missing_ok=True)

    def load_checkpoint(
        self, path: str | os.PathLike[str], map_location: Any = "cpu", weights_only: bool | None = True
    ) -> dict[str, Any]:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                state = torch.load(path, map_location="cpu", weights_only=True)
        except OSError as error:
            raise OSError(f"cannot read {path}: {reason(error)}") from error
        except pickle.UnpicklingError as error:
            raise ValueError(f"{path} holds more than tensors and numbers; no code from a file is ever run") from error
        except Exception as error:  # a broken file may raise anything
            raise ValueError(f"{path} is truncated, or no state of a training run") from error
        if not isinstance(state, dict) or not {"state_dict", "loops"} <= state.keys():
            raise ValueError(f"{path} is no state of a training run; FOLDER/resume/last.ckpt is one")
        return state

    def remove_checkpoint(self, path: str | os.PathLike[str]) -> None:
        Path(path).unlink(missing_ok=True)


class SaveConfig(SaveConfigCallback):
    """Writes what was asked for as `config.yaml` into the run's folder."""

    def save_config(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        if stage == "fit":
            path = Path(trainer.default_root_dir, "config.yaml")
            self.parser.save(self.config, path, skip_none=False, overwrite=True)


class Command(LightningCLI):
    """LightningCLI whose `trainer.default_root_dir` holds logs, checkpoints to resume from, and the model itself."""

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        verbs = {verb: LightningCLI.subcommands()[verb] for verb in ("fit", "validate", "test")}
        return {verb: skipped | {"weights_only"} for verb, skipped in verbs.items()}

    def _parse_ckpt_path(self) -> None:
        """Nothing: the configuration is what was asked for, whatever a checkpoint says."""

    def instantiate_trainer(self, **kwargs: Any) -> lightning.Trainer:
        settings = self._get(self.config_init, "trainer", default={})
        folder = Path(settings.default_root_dir or "runs/latest")
        extra: list[Callback] = []
        if self.config["subcommand"] == "fit":
            if (folder / "resume").exists() and self.config["fit"].ckpt_path is None:
                way = f"go on with --ckpt_path {folder}/resume/last.ckpt, or choose another --trainer.default_root_dir"
                raise ValueError(f"{folder} holds a run already, which would be lost; {way}")
            folder.mkdir(parents=True, exist_ok=True)
            if settings.logger is None:
                kwargs["logger"] = [CSVLogger(folder, name="csv"), TensorBoardLogger(folder, name="tensorboard")]
            if settings.enable_checkpointing is not False:
                place = {"dirpath": folder / "resume", "save_on_train_epoch_end": True, "enable_version_counter": False}
                score, mode = self.model.score
                best = ModelCheckpoint(filename="best", monitor=score, mode=mode, **place)
                last = ModelCheckpoint(filename="last", **place)  # save_last would wait for the next best
                extra += [Keep(folder, score, mode), best, last]
            if settings.logger is not False:
                extra.append(LearningRateMonitor("step"))
        else:
            kwargs["logger"] = settings.logger or False
            kwargs["enable_checkpointing"] = bool(settings.callbacks)
        kwargs["default_root_dir"] = str(folder)
        kwargs["plugins"] = [*(settings.plugins or []), States()]
        callbacks = settings.callbacks or []
        return super().instantiate_trainer(**kwargs, callbacks=[*callbacks, *extra])

    def before_validate(self) -> None:
        given = self.config[self.config["subcommand"]]
        if given.model.weights is None and given.ckpt_path is None:
            raise ValueError("what is to be measured? give --model.weights=FOLDER/best or --ckpt_path")

    before_test = before_validate


def warning_line(message: Warning | str, *_: object) -> str:
    """A warning as it is printed: what it says, without the line of code that said it."""
    return f"warning: {one_line(message, most=1000)}\n"


def main(task: Any, data: Any, name: str, arguments: list[str]) -> None:
    """Runs one verb; `--trainer.default_root_dir` names the run's folder, `--ckpt_path` what to go on from."""
    torch.set_float32_matmul_precision("high")
    warnings.formatwarning = warning_line
    for message in NOISE:
        warnings.filterwarnings("ignore", message=message)
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(no_advertisement)
    each = {"allow_abbrev": False, "exit_on_error": False}
    try:
        Command(
            task,
            data,
            args=arguments,
            save_config_callback=SaveConfig,
            save_config_kwargs={"save_to_log_dir": False},
            trainer_defaults={"use_distributed_sampler": False},
            seed_everything_default=0,
            auto_configure_optimizers=False,
            parser_kwargs={
                "prog": f"zoo {name}",
                "exit_on_error": False,
                **{verb: each for verb in ("fit", "validate", "test")},
            },
        )
    except ArgumentError as error:
        raise ValueError(f"{error} (zoo {name} {arguments[0]} --help lists all options)") from None
    except MisconfigurationException as error:
        raise ValueError(str(error)) from None

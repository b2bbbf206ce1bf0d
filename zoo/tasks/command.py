"""`zoo TASK fit|validate|test`: LightningCLI, with one folder for all that a run leaves behind."""

import pickle
import warnings
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import Callback, LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only

from zoo.tasks.task import Task
from zoo.weights import save_model


class Keep(Callback):
    """After every validation writes the measured model as a checkpoint of the zoo: `last`, and `best` by accuracy."""

    def __init__(self, folder: Path, score: str) -> None:
        self.folder, self.score = folder, score
        self.best = -float("inf")

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.best = state_dict["best"]

    def on_validation_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        assert isinstance(pl_module, Task)
        if not pl_module.fitting or trainer.fast_dev_run:  # pyright: ignore[reportAttributeAccessIssue]
            return
        value = float(trainer.callback_metrics[self.score])
        better = value > self.best
        self.best = max(value, self.best)
        for name in ("last", "best") if better else ("last",):
            self.save(trainer, pl_module, name, value)

    @rank_zero_only
    def save(self, trainer: lightning.Trainer, task: Any, name: str, value: float) -> None:
        assert isinstance(task, Task)
        data: Any = trainer.datamodule  # pyright: ignore[reportAttributeAccessIssue]
        save_model(
            task.measured,
            self.folder / name,
            preset=task.backbone.get("name"),
            preprocess=data.preprocess,
            labels=data.classes,
            source=f"trained by zoo on {data.dataset}, epoch {trainer.current_epoch + 1}",
            metrics={self.score: value},
        )


class Command(LightningCLI):
    """LightningCLI whose `trainer.default_root_dir` holds logs, checkpoints to resume from, and the model itself."""

    def instantiate_trainer(self, **kwargs: Any) -> lightning.Trainer:
        settings = self._get(self.config_init, "trainer", default={})
        folder = Path(settings.default_root_dir or "runs/latest")
        extra: list[Callback] = []
        if self.config["subcommand"] == "fit":
            if settings.logger is None:
                kwargs["logger"] = [CSVLogger(folder, name="csv"), TensorBoardLogger(folder, name="tensorboard")]
            if settings.enable_checkpointing is not False:
                best = ModelCheckpoint(
                    folder / "resume",
                    filename="best",
                    monitor="val/accuracy",
                    mode="max",
                    save_last=True,
                    save_on_train_epoch_end=True,
                    enable_version_counter=False,
                )
                extra += [Keep(folder, "val/accuracy"), best]
            if settings.logger is not False:
                extra.append(LearningRateMonitor("step"))
        else:
            kwargs["logger"] = settings.logger or False
        callbacks = settings.callbacks or []
        return super().instantiate_trainer(**kwargs, callbacks=[*callbacks, *extra])


def main(task: Any, data: Any, name: str, arguments: list[str]) -> None:
    """Runs one verb. `--trainer.default_root_dir` names the run's folder, `--ckpt_path FOLDER/resume/last.ckpt` goes on."""
    torch.set_float32_matmul_precision("high")
    for message in ("LightningCLI's args parameter", ".*isinstance.treespec, LeafSpec", ".*in eval mode at the start"):
        warnings.filterwarnings("ignore", message=message)
    try:
        Command(
            task,
            data,
            args=arguments,
            save_config_kwargs={"overwrite": True},
            trainer_defaults={"use_distributed_sampler": False},
            seed_everything_default=0,
            auto_configure_optimizers=False,
            parser_kwargs={
                "prog": f"zoo {name}",
                **{verb: {"allow_abbrev": False} for verb in ("fit", "validate", "test")},
            },
        )
    except pickle.UnpicklingError as error:
        raise ValueError(f"--ckpt_path holds more than tensors and numbers, and code is never run: {error}") from None

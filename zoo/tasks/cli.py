"""`zoo TASK fit|validate|test`: LightningCLI, with one folder for all files of a run."""

import atexit
import os
import shutil
import signal
import sys
from pathlib import Path
from subprocess import Popen
from typing import Any, NoReturn

import lightning
import torch
import yaml
from jsonargparse import ArgumentError
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback, LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.exceptions import SIGTERMException

from zoo.tasks.arguments import check_path, completed, translated, usual_folder
from zoo.tasks.output import Output
from zoo.tasks.quiet import quiet
from zoo.tasks.resuming import OtherModel, disconnected, restoring
from zoo.tasks.run import Keep, Run
from zoo.tasks.states import Saving, States
from zoo.tasks.stopping import Signals, Stop, Stopped

VERBS = ("fit", "validate", "test")


class Command(LightningCLI):
    """LightningCLI whose `trainer.default_root_dir` holds logs, the state to resume from, and the model itself."""

    run: Run | None = None
    keep: Keep | None = None
    signals: Signals | None = None

    def __init__(self, *arguments: Any, command: str, verbose: bool, **options: Any):
        self.command, self.verbose, self.changed = command, verbose, dict[str, str]()
        self.parent = os.getppid()
        try:
            super().__init__(*arguments, **options)
        finally:
            if self.run is not None:
                self.drop_empty_logs()
                self.run.close()
            if self.signals is not None:
                self.signals.close()

    def drop_empty_logs(self) -> None:
        """Removes the folders that the loggers made, where no training began that they could log."""
        trainer = getattr(self, "trainer", None)  # there is none where its settings were refused
        if trainer is None or self.keep is None or self.keep.began or not trainer.is_global_zero:
            return
        for logger in trainer.loggers:
            if isinstance(logger, CSVLogger | TensorBoardLogger):
                shutil.rmtree(logger.log_dir, ignore_errors=True)

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        verbs = {verb: LightningCLI.subcommands()[verb] for verb in VERBS}
        return {verb: skipped | {"weights_only", "verbose"} for verb, skipped in verbs.items()}

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        more = {} if subcommand == "fit" else {"verbose": self.verbose}
        return super()._prepare_subcommand_kwargs(subcommand) | more

    def add_arguments_to_parser(self, parser: Any) -> None:
        parser.add_class_arguments(Saving, "save")  # also where nothing is saved: the config of a run has it

    def _run_subcommand(self, subcommand: str) -> None:
        try:
            self.run_verb(subcommand)
        except Exception:
            launcher = self.trainer.strategy.launcher
            if isinstance(launcher, _SubprocessScriptLauncher) and launcher.procs:
                end_all(launcher.procs)
            raise

    def run_verb(self, subcommand: str) -> None:
        """Runs it, and says in one line what a user can mend."""
        try:
            super()._run_subcommand(subcommand)
        except OtherModel as error:
            names = [name for name in self.changed if name.startswith("model.backbone.")] or [
                name for name in self.changed if name.startswith("model.")
            ]
            if not names:
                raise
            raise ValueError(f"{error.start}: {', '.join(self.changed[name] for name in names)}") from error
        except (AttributeError, IndexError, KeyError, RuntimeError, TypeError) as error:
            if self.trainer.world_size > 1 and disconnected(error):
                self.end_without(error)
            if not restoring(error):
                raise
            what = f"{type(error).__name__}: {error}"
            raise ValueError(
                f"{self.given.ckpt_path} is not a state that this run can be resumed from: {what}"
            ) from error

    def end_without(self, error: BaseException) -> NoReturn:
        """Ends this rank because another is gone. One rank reports it: the first, or the second if that is gone."""
        rank = self.trainer.global_rank
        if rank == 0 or rank == 1 and os.getppid() != self.parent:  # Lightning starts the others from the first
            way = f"; resume with --ckpt_path={self.run.folder}" if self.run and self.run.state.exists() else ""
            raise ConnectionError(f"rank {rank} lost the connection to another rank, which has ended{way}") from error
        sys.exit(1)

    def _parse_ckpt_path(self) -> None:
        """Does nothing: the configuration is the requested one, not that of a checkpoint."""

    @property
    def given(self) -> Any:
        """The config of the verb."""
        return self.config[self.config["subcommand"]]

    def before_instantiate_classes(self) -> None:
        given, fit = self.given, self.config["subcommand"] == "fit"
        if given.trainer.use_distributed_sampler:
            raise ValueError("trainer.use_distributed_sampler must be false: the data module splits the set over ranks")
        if fit and str(given.trainer.precision) in ("64", "64-true"):
            raise ValueError("trainer.precision must be 32-true, 16-mixed, bf16-mixed or bf16-true")
        if fit and given.trainer.limit_train_batches == 0:
            raise ValueError("trainer.limit_train_batches must be > 0 for training")
        for option in ("accumulate_grad_batches", "val_check_interval", "check_val_every_n_epoch"):
            value = given.trainer[option]
            if fit and isinstance(value, int | float) and value <= 0:
                raise ValueError(f"trainer.{option} must be above 0, not {value}")
        if fit and (given.trainer.gradient_clip_val or 0) < 0:
            raise ValueError(f"trainer.gradient_clip_val must be at least 0, not {given.trainer.gradient_clip_val}")
        if not fit and given.model.weights is None and given.ckpt_path is None:
            raise ValueError("nothing to measure: give --model.weights FOLDER/best or --ckpt_path")
        path = given.ckpt_path
        if path is not None:
            check_path(Path(path))
        if not fit:
            return
        self.signals = Signals()
        folder = given.trainer.default_root_dir or usual_folder(self.command, given.model.backbone.get("name"))
        self.run = Run(folder)
        self.run.open(resumed=self.run.has(path))
        if path is not None and self.run.config.exists():
            self.compare(self.run.config)

    def recorded(self) -> str:
        """The config of the run, as stored in its folder."""
        config = self.given.clone()
        config.ckpt_path = None
        config.trainer.default_root_dir = str(self.run.folder) if self.run else None
        return self._parser("fit").dump(config, skip_none=False, skip_validation=True)

    def compare(self, path: Path) -> None:
        """Prints which options of a resumed run differ from those it was started with."""
        before, now = (flat(yaml.safe_load(text) or {}) for text in (path.read_text(), self.recorded()))
        keys = [key for key in now if now[key] != before.get(key) and (key in before or not key.startswith("save."))]
        self.changed = {key: f"{key} {now[key]} (was {before.get(key)})" for key in keys}
        if keys:
            print(f"changed   {', '.join(self.changed.values())}", file=sys.stderr)

    def instantiate_trainer(self, **kwargs: Any) -> lightning.Trainer:
        settings = self._get(self.config_init, "trainer", default={})
        callbacks = list(settings.callbacks or [])
        extra: list[Callback] = []
        kwargs["enable_checkpointing"] = any(isinstance(each, ModelCheckpoint) for each in callbacks)
        if not self.verbose:
            kwargs["enable_model_summary"] = False
        saving = self._get(self.config_init, "save", default=Saving())
        if self.run is not None and self.signals is not None:
            folder, (score, mode) = self.run.folder, self.model.score
            keep = self.keep = Keep(self.run, score, mode, self.recorded(), saving)
            if not self.verbose:
                extra.append(Output(keep, folder, self.command, settings.enable_progress_bar is not False))
            if settings.logger is None:
                kwargs["logger"] = [CSVLogger(folder, name="csv"), TensorBoardLogger(folder, name="tensorboard")]
            if settings.enable_checkpointing is not False and not settings.fast_dev_run:
                kwargs["enable_checkpointing"] = True
                extra += [keep, Stop(keep, self.signals)]
            if settings.logger is not False and not settings.fast_dev_run:
                extra.append(LearningRateMonitor("step"))
            kwargs["default_root_dir"] = str(folder)
        else:
            kwargs["logger"] = settings.logger or False
        kwargs["enable_progress_bar"] = self.verbose or self.run is not None
        kwargs["plugins"] = [*(settings.plugins or []), States(saving.keep)]
        try:
            trainer = super().instantiate_trainer(**kwargs, callbacks=[*callbacks, *extra])
        except (TypeError, ModuleNotFoundError) as error:  # devices that cannot be, a package that is not installed
            raise ValueError(f"trainer: {error}") from error
        if self.signals is not None:
            trainer._signal_connector.register_signal_handlers = lambda: None  # Lightning's may wait for other ranks
            launcher = trainer.strategy.launcher
            self.signals.pass_on = None if launcher is None else launcher.kill
        return trainer

    def before_validate(self) -> None:
        if self.trainer.is_global_zero:
            name = self.given.model.weights or self.given.ckpt_path
            print(f"measuring {name} on {self.datamodule.dataset}", file=sys.stderr)

    before_test = before_validate

    def after_validate(self) -> None:
        if self.trainer.is_global_zero:
            print(self.model.said)

    after_test = after_validate


def end_all(ranks: list[Popen[bytes]]) -> None:
    """Ends the ranks that this process has started, which may wait for it without end."""
    started = ranks.copy()
    ranks.clear()  # or else Lightning, which looks after them, would end this process, too
    for process in started:
        process.kill()
    if torch.distributed.is_initialized() and torch.distributed.get_backend() == "gloo":
        leave_ranks()  # on GPUs it may wait for them
        atexit.register(end_at_once)


def end_at_once() -> None:
    """Ends the process, once its error is printed: threads of gloo that lost the other ranks can abort one that frees
    its memory first."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1)


def leave_ranks() -> None:
    """Leaves the group of ranks, whose threads may abort a process as it ends."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def flat(values: Any, place: str = "") -> dict[str, Any]:
    """Nested mappings as one, with dots between the names."""
    if not isinstance(values, dict):
        return {place: values}
    found: dict[str, Any] = {}
    for key, value in values.items():
        found |= flat(value, f"{place}.{key}" if place else str(key))
    return found


def main(task: Any, data: Any, name: str, arguments: list[str]) -> None:
    """Runs one verb; `--trainer.default_root_dir` names the run's folder, `--ckpt_path` the state to resume from."""
    torch.set_float32_matmul_precision("high")
    verbose = "--verbose" in arguments
    arguments = [argument for argument in arguments if argument != "--verbose"]
    each = {"allow_abbrev": False, "exit_on_error": False}
    try:
        with quiet(verbose):
            Command(
                task,
                data,
                command=name,
                verbose=verbose,
                args=completed(name, arguments),
                save_config_callback=None,
                trainer_defaults={"use_distributed_sampler": False},
                seed_everything_default=0,
                auto_configure_optimizers=False,
                parser_kwargs={"prog": f"zoo {name}", "exit_on_error": False, **{verb: each for verb in VERBS}},
            )
        leave_ranks()
    except ArgumentError as error:
        all_options = f"zoo {name} {arguments[0]} --help-all lists all options"
        raise ValueError(f"{translated(str(error))} ({all_options})") from None
    except MisconfigurationException as error:
        raise ValueError(str(error)) from None
    except Stopped as stop:
        if getattr(rank_zero_only, "rank", 0) != 0:
            sys.exit()  # the first rank reports; an error here would kill it before its end
        print(f"zoo: {stop}", file=sys.stderr)
        sys.exit(128 + stop.number)
    except SIGTERMException:
        sys.exit(128 + signal.SIGTERM)

"""FSDP2 by Lightning: parameters, gradients and moments in equal parts on the ranks, a block at a time."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.strategies import ModelParallelStrategy, StrategyRegistry
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.fsdp._fully_shard._fsdp_common import TrainingState

from zoo.block import Block

CALLED = ("features", "encode", "tokens")  # methods of models that tasks call beside forward
WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)


class FSDP2(ModelParallelStrategy):
    """`--trainer.strategy=fsdp2`: every rank holds a part of each block and gathers one block at a time.

    States and checkpoints are those of a run in one process, gathered on the first rank.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(tensor_parallel_size=1, save_distributed_checkpoint=False, **options)

    @property
    def lightning_restore_optimizer(self) -> bool:
        return True

    def setup_environment(self) -> None:
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()

    def shard(self, model: nn.Module) -> None:
        """Divides the parameters of a model over the ranks, each block on its own."""
        mesh = self.device_mesh["data_parallel"]
        for module in model.modules():
            if isinstance(module, Block):
                fully_shard(module, mesh=mesh)
        # What is outside of the blocks stays gathered until backward, for a head that is called on its own.
        fully_shard(model, mesh=mesh, reshard_after_forward=False)
        for name in CALLED:
            if callable(getattr(type(model), name, None)):
                _gather_in(model, name)

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any | None = None
    ) -> None:
        if self.is_global_zero:
            self.checkpoint_io.save_checkpoint(checkpoint, filepath, storage_options=storage_options)

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        return self.checkpoint_io.load_checkpoint(checkpoint_path)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        assert self.lightning_module is not None
        set_model_state_dict(self.lightning_module, checkpoint["state_dict"], options=WHOLE)

    def optimizer_state(self, optimizer: Any) -> dict[str, Any]:
        """The whole state as the optimizer of one process has it, by numbers of parameters; empty but on one rank."""
        module: Any = self.lightning_module
        found: Any = get_optimizer_state_dict(module, getattr(optimizer, "_optimizer", optimizer), options=WHOLE)
        if not found:
            return {}
        number = {name: number for number, name in enumerate(self._named(optimizer))}
        groups = [{**group, "params": [number[name] for name in group["params"]]} for group in found["param_groups"]]
        return {"state": {number[name]: state for name, state in found["state"].items()}, "param_groups": groups}

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        module: Any = self.lightning_module
        for optimizer, given in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            names = self._named(optimizer)
            state: dict[str, Any] = {"state": {names[number]: state for number, state in given["state"].items()}}
            state["param_groups"] = [
                {**group, "params": [names[number] for number in group["params"]]} for group in given["param_groups"]
            ]
            set_optimizer_state_dict(module, optimizer, state, options=WHOLE)

    def _named(self, optimizer: Any) -> list[str]:
        """The names of an optimizer's parameters, in its order."""
        assert self.lightning_module is not None
        names = {id(parameter): name for name, parameter in self.lightning_module.named_parameters()}
        return [names[id(parameter)] for group in optimizer.param_groups for parameter in group["params"]]

    def teardown(self) -> None:
        super().teardown()
        self.checkpoint_io.teardown()


def _gather_in(model: Any, name: str) -> None:
    """Makes a method gather the parameters as forward does, unless forward has called it."""
    plain = getattr(model, name)
    register_fsdp_forward_method(model, name)
    gathering, state = getattr(model, name), model._get_fsdp_state()

    def either(*arguments: Any, **options: Any) -> Any:
        inside = state._training_state == TrainingState.FORWARD
        return (plain if inside else gathering)(*arguments, **options)

    setattr(model, name, either)


StrategyRegistry.register("fsdp2", FSDP2, description="FSDP2: parameters divided over the ranks by blocks")


def gathered(model: nn.Module, copy: nn.Module) -> nn.Module | None:
    """A sharded model on the CPU of the first rank, None on the others; all ranks have to call it.

    Args:
        model: a model that `FSDP2.shard` has divided.
        copy: a copy of it from before, which takes its weights on the first rank.
    """
    state = get_model_state_dict(model, options=WHOLE)
    if torch.distributed.get_rank() != 0:
        return None
    copy.load_state_dict(state, assign=True)
    return copy.cpu()  # what is not in the state dict, too, if it was moved

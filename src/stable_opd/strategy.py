"""The strategy that shards: `trainer.strategy: sharded`."""

import shutil
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy, Strategy, StrategyRegistry
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.optim import Optimizer
from transformers import PreTrainedModel

from stable_opd import shards
from stable_opd.options import UpdateOptions
from stable_opd.sharding import is_sharded, load_state, shard, spread_like
from stable_opd.students import LoRA
from stable_opd.teachers.base import Teacher

#: The name of the strategy in a configuration.
NAME = "sharded"
PRECISIONS = ("32-true", "bf16-mixed", "bf16-true")


class ShardedStrategy(ModelParallelStrategy):
    """Spread weights, gradients and state of the optimizer over all processes (FSDP2).

    Lightning's `ModelParallelStrategy` over one dimension of processes, whose checkpoints are loaded by any number of
    them.

    Args:
        save_distributed_checkpoint: Let each process write its part into a folder. If not, the first process writes one
            file, which any strategy loads; then everything has to fit into its host's memory.
        process_group_backend: Of torch.distributed; none takes that of the device.
        timeout: How long processes wait for each other. Rollouts end at different times.
    """

    def __init__(
        self,
        save_distributed_checkpoint: bool = True,
        process_group_backend: str | None = None,
        timeout: timedelta | None = timedelta(minutes=30),
    ) -> None:
        super().__init__("auto", 1, save_distributed_checkpoint, process_group_backend, timeout)

    @property
    def processes(self) -> DeviceMesh:
        """All processes, in one dimension."""
        return self.device_mesh["data_parallel"]

    def spread(self, model: PreTrainedModel) -> None:
        """Spread the weights of a model over the processes, unless they are."""
        if not is_sharded(model):
            shard(model, self.processes, str(self.precision_plugin.precision))

    @property
    def lightning_restore_optimizer(self) -> bool:
        """Whether Lightning asks for `load_optimizer_state_dict`."""
        return True

    def setup_environment(self) -> None:
        """Meet the other processes."""
        self._data_parallel_size = self.num_nodes * self.num_processes  # Lightning's "auto" is the number of nodes
        super().setup_environment()

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Return the state of the module; what is spread over processes stays so until it is written."""
        return Strategy.lightning_module_state_dict(self)

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """Return the state of an optimizer, likewise."""
        return Strategy.optimizer_state(self, optimizer)

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """Write a checkpoint; every process has to call it.

        Raises:
            OSError: If some process cannot write.
        """
        if self.is_global_zero and Path(filepath).is_dir():
            shutil.rmtree(filepath)  # before the others know of the path
        path = Path(self.broadcast(str(filepath)))
        if self._save_distributed_checkpoint:
            shards.write(checkpoint, path, self.is_global_zero)
        else:
            Strategy.save_checkpoint(self, shards.gathered(checkpoint, self.is_global_zero), path, storage_options)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Read a checkpoint of this strategy, or one file of any other."""
        path = Path(self.broadcast(str(checkpoint_path)))
        if path.is_dir():
            return shards.read(path, self._empty)
        found: dict[str, Any] = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        return found

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Let the module take its state."""
        assert self.lightning_module is not None
        load_state(self.lightning_module, checkpoint["state_dict"], strict)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Let the optimizers take their state."""
        states = []
        for optimizer, saved in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            parameters = [each for group in optimizer.param_groups for each in group["params"]]
            state = {
                number: {name: spread_like(each, parameters[number]) for name, each in kept.items()}
                for number, kept in saved["state"].items()
            }
            states.append({**saved, "state": state})
        Strategy.load_optimizer_state_dict(self, {"optimizer_states": states})

    def _empty(self, size: torch.Size, dtype: torch.dtype) -> Tensor:
        return dist.tensor.empty(size, dtype=dtype, device_mesh=self.processes)


if NAME not in StrategyRegistry:
    StrategyRegistry.register(NAME, ShardedStrategy, ShardedStrategy.__doc__)


def check_strategy(strategy: Strategy | str | None, precision: str | None = None) -> None:
    """Refuse what cannot train here.

    Args:
        strategy: Of the trainer, or its name.
        precision: Of the trainer.

    Raises:
        ValueError: If it cannot.
    """
    name = strategy if isinstance(strategy, str) else type(strategy).__name__
    if isinstance(strategy, FSDPStrategy) or name.startswith("fsdp"):
        raise ValueError(
            f"Expected a strategy that lets a step go backward several times, but got {name} (FSDP1), which expects "
            f"one backward pass, after the step, and is deprecated by torch. Use trainer.strategy: {NAME} (FSDP2)."
        )
    if isinstance(strategy, ModelParallelStrategy) and not isinstance(strategy, ShardedStrategy):
        raise ValueError(
            f"Expected trainer.strategy: {NAME} (a ModelParallelStrategy over all processes, without tensor "
            f"parallelism, whose checkpoints any number of processes loads), but got {name}. Name that one instead."
        )
    if isinstance(strategy, ShardedStrategy) and precision not in (None, *PRECISIONS):
        raise ValueError(
            f"Expected a trainer.precision of {', '.join(PRECISIONS)} for trainer.strategy: {NAME}, but got "
            f"{precision}. Use bf16-mixed."
        )


def check_checkpoint(path: Path | str | None, strategy: Strategy) -> None:
    """Refuse a checkpoint in shards where it cannot be read.

    Args:
        path: Where a run goes on; None if it begins.
        strategy: Of the trainer.

    Raises:
        ValueError: If it cannot.
    """
    if path is not None and Path(path).is_dir() and not isinstance(strategy, ShardedStrategy):
        raise ValueError(
            f"Expected trainer.strategy: {NAME}, because the checkpoint {path} is in shards, but got "
            f"{type(strategy).__name__}. Name that one, on any number of devices, or turn the checkpoint into a model "
            "by `stable-opd export`."
        )


def check_recipe(adapter: LoRA | None, update: UpdateOptions, teacher: Teacher) -> None:
    """Refuse what does not go with sharded weights.

    Args:
        adapter: Of the student.
        update: How it learns.
        teacher: Who scores its tokens.

    Raises:
        ValueError: If something does not.
    """
    if adapter is not None or update.offload:
        raise ValueError(
            f"Expected neither model.adapter nor model.update.offload, because trainer.strategy is {NAME}, but got "
            f"adapter {adapter} and offload {update.offload}. Leave them out: each process keeps but a part of "
            "everything. Or use trainer.strategy: ddp."
        )
    if teacher.reads_by_student:
        raise ValueError(
            f"Expected a teacher with weights of its own, because trainer.strategy is {NAME}, but got "
            f"{type(teacher).__name__} with the student as a teacher. Use a LocalTeacher in the place of SelfTeacher, "
            "or trainer.strategy: ddp."
        )


def check_optimizer(optimizer: Optimizer, sharded: bool) -> None:
    """Refuse an optimizer that cannot update sharded weights.

    Args:
        optimizer: Of the student.
        sharded: Whether its weights are.

    Raises:
        ValueError: If it cannot.
    """
    if sharded and type(optimizer).__module__.startswith("bitsandbytes"):
        raise ValueError(
            f"Expected an optimizer of torch, because trainer.strategy is {NAME}, but got {type(optimizer).__name__} "
            "of bitsandbytes, which knows no sharded weights. Use torch.optim.AdamW: each process keeps but a part of "
            "its state."
        )

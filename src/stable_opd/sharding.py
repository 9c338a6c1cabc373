"""Models whose weights are spread over the processes: each keeps a part, and they are gathered where they are used.

A block of a model is gathered for its forward and backward pass and given up again; what stands outside of the blocks
(embeddings, last norm, head) is gathered for the time of a function that is called inside the model (`inside`). While
answers are written nobody may wait for anybody, because they end at different lengths; so the engines get a copy that
is whole (`InferenceCopy`).
"""

import copy
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import PreTrainedModel

Result = TypeVar("Result")


def blocks(model: PreTrainedModel) -> list[nn.Module]:
    """Return the layers of a model that are gathered one by one.

    Raises:
        ValueError: If the model does not say which these are.
    """
    names = set(getattr(model, "_no_split_modules", None) or ())
    found = [part for part in model.modules() if type(part).__name__ in names]
    if not found:
        raise ValueError(
            f"Expected a model that names its blocks (_no_split_modules), but got {type(model).__name__}. Use "
            "trainer.strategy: ddp, or a Llama, Qwen, Mistral or Gemma model."
        )
    return found


def shard(model: PreTrainedModel, mesh: DeviceMesh, precision: str) -> None:
    """Spread the weights of a model over processes, in place.

    Args:
        model: A causal language model, the same on every process.
        mesh: The processes, in one dimension.
        precision: Of the trainer. With ``bf16-mixed``, weights are gathered in bfloat16, and gradients added up in
            float32.
    """
    mixed = precision == "bf16-mixed"
    policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32) if mixed else MixedPrecisionPolicy()
    for part in (*blocks(model), model):
        fully_shard(part, mesh=mesh, mp_policy=policy)
    sharded: Any = model
    sharded.stable_opd_inside = lambda function: function()
    register_fsdp_forward_method(sharded, "stable_opd_inside")


def is_sharded(model: nn.Module) -> bool:
    """Return whether the weights of a model are spread over processes."""
    return isinstance(model, FSDPModule)


def inside(model: nn.Module, function: Callable[[], Result]) -> Result:
    """Call a function that runs a model's body and reads its head.

    Where the model is sharded, all processes have to call it equally often, and gradients flow through the tensors that
    are returned. Without gradients the head stays gathered afterwards, for whoever got hold of it, until `reshard`.
    """
    sharded: Any = model
    result: Result = sharded.stable_opd_inside(function) if is_sharded(model) else function()
    return result


def reshard(model: nn.Module | None) -> None:
    """Give up what is gathered of a model, so that its parameters are the parts that this process keeps."""
    for part in () if model is None else model.modules():
        if isinstance(part, FSDPModule):
            part.reshard()


def whole(tensor: Tensor) -> Tensor:
    """Return a tensor with the parts of all processes; all have to ask for it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def spread_like(value: Any, model: Any) -> Any:
    """Return a process's part of a tensor, if another tensor is spread over processes and this one is not yet."""
    if not isinstance(model, DTensor) or not isinstance(value, Tensor) or isinstance(value, DTensor):
        return value
    if value.shape != model.shape:
        return value
    # Every process has all of it, so nothing is sent.
    return distribute_tensor(value.to(model.device), model.device_mesh, model.placements, src_data_rank=None)


def load_state(module: nn.Module, state: Mapping[str, Any], strict: bool = True) -> None:
    """Let a module take its state, of which each process keeps its part where the module does.

    Args:
        module: Sharded or not, in whole or in part.
        state: Tensors that are whole, or spread in the same way.
        strict: Whether the names have to be the same.
    """
    own = dict(module.named_parameters(remove_duplicate=False))
    module.load_state_dict({name: spread_like(each, own.get(name)) for name, each in state.items()}, strict=strict)


class InferenceCopy:
    """A model that is whole on each process while answers are written, and takes no memory otherwise.

    Args:
        model: The model before it is sharded.
        device: Where it writes.
        precision: Of the trainer; with ``bf16-mixed`` the weights are gathered in bfloat16.
    """

    def __init__(self, model: PreTrainedModel, device: torch.device, precision: str) -> None:
        memo: dict[int, Any] = {
            id(each): nn.Parameter(each.new_empty(0), requires_grad=False) for each in model.parameters()
        }
        self.model: PreTrainedModel = copy.deepcopy(model, memo).eval()
        nn.Module.to(self.model, device)
        self.filled, self.mixed = False, precision == "bf16-mixed"

    @torch.no_grad()
    def fill(self, sharded: PreTrainedModel) -> PreTrainedModel:
        """Gather the weights of the model as it learns, unless they are there; every process has to call it."""
        if not self.filled:
            reshard(sharded)
            with torch.inference_mode(False):
                for name, each in sharded.named_parameters():
                    part = each.detach().to(torch.bfloat16) if self.mixed else each.detach()
                    self.model.get_parameter(name).data = whole(part)
            self.filled = True
        return self.model

    def release(self) -> None:
        """Give the memory back, as the weights are about to change."""
        for each in self.model.parameters():
            each.data = each.data.new_empty(0)
        self.filled = False

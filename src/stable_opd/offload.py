"""Things that rest in the host's memory while they are not in use."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.optim import Optimizer


def module_bytes(module: nn.Module) -> int:
    """Return the bytes of a module's parameters; those that are shared count once."""
    return sum(parameter.numel() * parameter.element_size() for parameter in module.parameters())


@contextmanager
def visiting(module: nn.Module, device: torch.device) -> Iterator[None]:
    """Have a module on a device for the time of a context, and in the host's memory afterwards."""
    nn.Module.to(module, device)
    try:
        yield
    finally:
        nn.Module.to(module, "cpu")


def move_state(optimizer: Optimizer, device: torch.device) -> None:
    """Move what an optimizer remembers of each parameter; the count of its steps stays where it is."""
    for state in optimizer.state.values():
        for name, value in state.items():
            if isinstance(value, Tensor) and value.dim() > 0:
                state[name] = value.to(device)

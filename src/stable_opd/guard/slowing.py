"""A factor on the learning rate, whatever the schedule does."""

from collections.abc import Sequence
from typing import Any

from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle


class Slowing:
    """Multiplies the learning rate by a factor while the optimizer takes a step, and leaves it as it was.

    So no schedule sees it: neither one that reckons with the rate of the last step, nor one that sets it anew.

    Attributes:
        factor: The factor.
    """

    def __init__(self) -> None:
        self.factor = 1.0
        self._handles: list[RemovableHandle] = []

    def attach(self, optimizers: Sequence[Optimizer]) -> None:
        """Begin with some optimizers."""
        self.detach()
        for optimizer in optimizers:
            rates: list[Any] = []

            def before(optimizer: Optimizer, *_: Any, rates: list[Any] = rates) -> None:
                rates[:] = [group["lr"] for group in optimizer.param_groups]
                for group in optimizer.param_groups:
                    group["lr"] = group["lr"] * self.factor

            def after(optimizer: Optimizer, *_: Any, rates: list[Any] = rates) -> None:
                for group, rate in zip(optimizer.param_groups, rates, strict=True):
                    group["lr"] = rate

            self._handles += [optimizer.register_step_pre_hook(before), optimizer.register_step_post_hook(after)]

    def detach(self) -> None:
        """Let the optimizers go."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

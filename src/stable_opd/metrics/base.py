"""What our metrics have in common."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor
from torchmetrics import MeanMetric, Metric


class ExactMetric(Metric):
    """A metric that keeps counting in the precision of its states when the module around it is cast to another.

    In bfloat16, which training in ``bf16-true`` casts a whole module to, 256 + 1 is 256.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], exclude_state: Sequence[str] | None = None) -> Any:
        return super()._apply(lambda state: state.to(fn(state).device), exclude_state or ())


class Accuracy(ExactMetric, MeanMetric):
    """Mean grade of answers."""

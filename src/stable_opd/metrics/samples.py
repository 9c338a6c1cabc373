"""What several answers to each prompt say together."""

from typing import Any

import torch
from torch import Tensor

from stable_opd.metrics.base import ExactMetric


def pass_at_k(right: Tensor, samples: int, k: int) -> Tensor:
    """Return the unbiased estimate of the probability that one of k answers to a prompt is right.

    It is 1 - C(n-c, k) / C(n, k) for c right answers among n: the share of the choices of k answers that hold a right
    one. As a product, 1 - prod_{i=n-c+1..n} (1 - k/i), no binomial coefficient has to fit into a number.

    Source: Chen et al. 2021 (arXiv 2107.03374).

    Args:
        right: How many answers to each prompt are right, (P,) integers.
        samples: How many answers to each prompt there are, n.
        k: How many are drawn of them, at most n.

    Returns:
        The estimate of each prompt, (P,) float64.
    """
    place = torch.arange(1, samples + 1, dtype=torch.float64, device=right.device)
    wrong = (samples - right)[:, None]
    return 1 - torch.where(place > wrong, 1 - k / place, 1.0).prod(-1)


class PassAtK(ExactMetric):
    """Share of the prompts to which one of k answers is right, for k = 2, 4, 8, ... and the number of answers.

    That of one answer is the mean grade. Prompts are counted, so that those of several processes may differ in number.

    Args:
        samples: Answers to each prompt, at least 2.
        kwargs: As for every torchmetrics metric.
    """

    higher_is_better = True
    full_state_update = False
    passed: Tensor
    prompts: Tensor

    def __init__(self, samples: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.samples = samples
        self.ks = sorted({*(1 << power for power in range(1, samples.bit_length())), samples})
        self.add_state("passed", torch.zeros(len(self.ks)), dist_reduce_fx="sum")
        self.add_state("prompts", torch.zeros(()), dist_reduce_fx="sum")

    def update(self, grades: Tensor) -> None:
        """Count prompts.

        Args:
            grades: Grades of the answers to each prompt, (P, samples); right is a grade of 1.
        """
        right = (grades >= 1).sum(-1).cpu()  # not every device knows float64
        self.passed += torch.stack([pass_at_k(right, self.samples, k).sum() for k in self.ks]).to(self.passed)
        self.prompts += len(right)

    def compute(self) -> dict[str, Tensor]:
        """Return ``pass_at_2`` and so on; nan before the first prompt."""
        return {f"pass_at_{k}": share for k, share in zip(self.ks, self.passed / self.prompts, strict=True)}

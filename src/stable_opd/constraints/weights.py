"""Staying near the initial student in the weights themselves."""

import torch
from torch import Tensor, nn

from stable_opd.constraints.base import WeightedConstraint
from stable_opd.controllers import Controller
from stable_opd.schedules import Schedule
from stable_opd.sharding import whole
from stable_opd.types import Evidence, TokenLoss


@torch.no_grad()
def pull_to(student: nn.Module, reference: nn.Module, weight: float) -> Tensor:
    """Add the gradient of weight / 2 * ||theta - theta_0||^2 to that of the trainable parameters.

    Args:
        student: The model whose gradients are added to; where there is none yet, it is made.
        reference: A model with the same parameters.
        weight: Factor of the penalty.

    Returns:
        ||theta - theta_0||^2 / 2 over the trainable parameters, a scalar in float32.
    """
    total = torch.zeros((), dtype=torch.float32)
    for ours, theirs in zip(student.parameters(), reference.parameters(), strict=True):
        if not ours.requires_grad:
            continue
        difference = ours - theirs.to(ours)
        total = total.to(ours.device) + whole(difference.float().square().sum()) / 2
        if weight == 0:
            continue
        if ours.grad is None:
            ours.grad = difference.mul_(weight)
        else:
            ours.grad.add_(difference, alpha=weight)
    return total


class InitialWeights(WeightedConstraint):
    """Squared distance of the student's weights to those of the initial student (L2-SP).

        weight / 2 * ||theta - theta_0||^2

    It holds all behaviour a little, also at states that no rollout visits, and costs no forward pass; but distances
    between weights say little about distances between distributions. Its gradient goes through the optimizer with the
    others, so an adaptive one rescales it. Prefer `ReferenceKL`, which counts only what changes what is said.

    Source: Li et al. 2018 (arXiv 1802.01483), for image models; the default is of this project.

    Args:
        weight: Factor of the term in the objective.
        schedule: Changes the weight in the course of the training; none keeps it constant.
        controller: Changes the weight so that half the squared distance comes to a target; none leaves it alone.
    """

    keeps_reference: bool = True
    positionwise: bool = True

    def __init__(
        self, weight: float = 0.01, schedule: Schedule | None = None, controller: Controller | None = None
    ) -> None:
        super().__init__(weight, schedule, controller)

    def forward(self, evidence: Evidence) -> TokenLoss:
        """Speak about no token."""
        nothing = torch.zeros_like(evidence.behaviour_logprobs)
        return TokenLoss(nothing, nothing, torch.zeros_like(evidence.in_loop))

    def pull(self, student: nn.Module, reference: nn.Module | None, progress: float) -> tuple[Tensor, Tensor]:
        """Add the gradient of the penalty to that of the student's parameters, and return its loss and value.

        Raises:
            ValueError: If there is no reference.
        """
        if reference is None:
            raise ValueError(
                "Expected the initial student, but got None. Start a Trainer, which keeps a copy of it for terms that "
                "declare keeps_reference."
            )
        weight = self.scale_at(progress) * self.strength
        value = pull_to(student, reference, weight)
        return weight * value, value

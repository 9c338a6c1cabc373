"""What the reference is: the initial student, or a copy that follows the student."""

from abc import abstractmethod
from typing import ClassVar

import torch
from torch import nn

from stable_opd.registry import Component


class Reference(Component):
    """Who the constraints hold the student against; one of a run."""

    kind: ClassVar[str] = "reference"
    #: Whether it changes in the course of the training, so that checkpoints have to hold it.
    moves: bool = False

    @abstractmethod
    def update(self, reference: nn.Module, student: nn.Module, step: int) -> None:
        """Change the reference after an optimizer step, in place.

        Args:
            reference: A frozen copy of the student, of the initial one at first.
            student: The model that learns.
            step: Optimizer steps taken so far, from 1.
        """

    def check(self, dtype: torch.dtype) -> None:
        """Refuse a precision in which the reference cannot do its work; here any will do.

        Args:
            dtype: Of the student and of the reference.

        Raises:
            ValueError: If it cannot.
        """


class InitialStudent(Reference):
    """The initial student, for good: it bounds how far the student may go.

    Source: Luo et al. 2026 (arXiv 2604.08527, eq. 6).
    """

    def update(self, reference: nn.Module, student: nn.Module, step: int) -> None:
        """Change nothing."""


class MovingAverage(Reference):
    """An exponential moving average of the student's weights: it bounds how fast the student may go.

        anchor <- decay * anchor + (1 - decay) * student, after every optimizer step

    Prefer `InitialStudent` where the student is to stay near what it could do at first.

    Source: EMA-PG (arXiv 2602.04417), with decays of 0.99 to 0.9999.

    Args:
        decay: Share of the average that stays in every step, from 0 to below 1.
    """

    moves: bool = True

    def __init__(self, decay: float = 0.999) -> None:
        if not 0 <= decay < 1:
            raise ValueError(
                f"Expected a decay of at least 0 and below 1, but got {decay}. Use InitialStudent for a reference "
                "that does not move."
            )
        self.decay = decay

    def check(self, dtype: torch.dtype) -> None:
        """Refuse a precision in which a small move rounds to nothing.

        Raises:
            ValueError: If it is one of 16 bits.
        """
        if dtype in (torch.bfloat16, torch.float16):
            raise ValueError(
                f"Expected a student in float32, but got {dtype}, in which a moving average would round its moves "
                "away. Use the precision 32-true or bf16-mixed, or the reference PeriodicReset."
            )

    @torch.no_grad()
    def update(self, reference: nn.Module, student: nn.Module, step: int) -> None:
        """Move the average a little towards the student."""
        for average, current in zip(reference.parameters(), student.parameters(), strict=True):
            average.lerp_(current.detach().to(average), 1 - self.decay)


class PeriodicReset(Reference):
    """A copy of the student that is renewed every so many steps: it bounds how far the student may go at a time.

    Prefer `MovingAverage` where jumps of the reference, and of the loss with it, are not wanted.

    Source: the reference resets of ProRL (arXiv 2505.24864).

    Args:
        every: Optimizer steps between two copies.
    """

    moves: bool = True

    def __init__(self, every: int = 200) -> None:
        if every < 1:
            raise ValueError(f"Expected every of at least 1, but got {every}.")
        self.every = every

    @torch.no_grad()
    def update(self, reference: nn.Module, student: nn.Module, step: int) -> None:
        """Copy the student if it is time."""
        if step % self.every == 0:
            for copy, current in zip(reference.parameters(), student.parameters(), strict=True):
                copy.copy_(current)

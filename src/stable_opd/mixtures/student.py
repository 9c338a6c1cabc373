"""Pure on-policy distillation."""

import torch

from stable_opd.mixtures.base import Mixture
from stable_opd.types import Author, Evidence, Plan, Prompts, TokenLoss


def student_rows(prompts: Prompts, samples: int) -> Plan:
    """Plan ``samples`` rows of the student's for each prompt; the rows of a prompt stand together."""
    rows = [prompt for prompt in range(len(prompts)) for _ in range(samples)]
    return Plan(rows, [Author.STUDENT] * len(rows))


class StudentOnly(Mixture):
    """Only the student's own rollouts: plain on-policy distillation, the one that can collapse.

    Source: Luo et al. 2026 (arXiv 2604.08527), the baseline.
    """

    positionwise: bool = True

    def plan(self, prompts: Prompts, samples: int, progress: float, step: int) -> Plan:
        """Plan the student's rows and nothing else."""
        return student_rows(prompts, samples)

    def forward(self, evidence: Evidence) -> TokenLoss:
        """Return zeros: there are no rows to speak about."""
        zero = torch.zeros_like(evidence.student.sampled)
        return TokenLoss(zero, zero, torch.zeros_like(evidence.in_loop))

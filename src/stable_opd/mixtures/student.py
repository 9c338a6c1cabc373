"""Pure on-policy distillation."""

from stable_opd.mixtures.base import Mixture, nothing
from stable_opd.types import Author, Evidence, Plan, Prompts, TokenLoss


def student_rows(prompts: Prompts, samples: int) -> Plan:
    """Plan ``samples`` rows of the student's for each prompt; the rows of a prompt stand together."""
    rows = [prompt for prompt in range(len(prompts)) for _ in range(samples)]
    return Plan(rows, [Author.STUDENT] * len(rows))


def with_rows(plan: Plan, prompts: Prompts, samples: int, author: Author) -> Plan:
    """Return a plan with ``samples`` more rows for each prompt, by another author, after all others."""
    rows = student_rows(prompts, samples).prompt
    return plan._replace(prompt=[*plan.prompt, *rows], author=[*plan.author, *[author] * len(rows)])


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
        return nothing(evidence)
